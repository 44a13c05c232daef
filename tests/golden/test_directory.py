"""The golden command: a table, one JSON line, an exit code; clear words for a directory that holds no vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dllm_toolkit.testing import golden


def directory(tmp_path: Path, *, ids_off_by: int = 0, repository: str | None = None) -> Path:
    """A directory with two cases of one file; in the first an id may be wrong, or the source another."""
    (tmp_path / "cases").mkdir()
    (tmp_path / "llada-tiny").symlink_to(golden.SHIPPED / "llada-tiny")
    cases = golden.load_cases(golden.SHIPPED / "cases" / "dparallel_llada.json")[:2]
    cases[0]["generated_ids"][0] += ids_off_by
    cases[0]["name"] = "some_other_name"
    cases[0]["source"]["repo"] = repository or cases[0]["source"]["repo"]
    (tmp_path / "cases" / "mine.json").write_text(json.dumps({"cases": cases}), encoding="utf-8")
    return tmp_path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(directory(tmp_path)) == 0
    said = last_line(capsys)
    assert (said["cases"], said["passed"], said["differing"]) == (2, 2, {})


def test_a_difference_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(directory(tmp_path, ids_off_by=1)) == 1
    said = last_line(capsys)
    assert said["passed"] == 1 and list(said["differing"]) == ["mine/some_other_name"]  # type: ignore[call-overload]


def test_an_unknown_source_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(directory(tmp_path, repository="somebody/else")) == 0
    said = last_line(capsys)
    assert (said["passed"], said["not_built"]) == (1, 1)


def test_no_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(golden.GoldenError, match="no recorded cases"):
        golden.main(tmp_path)
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "broken.json").write_text('{"cases": [{"name": "x"}]}', encoding="utf-8")
    with pytest.raises(golden.GoldenError, match=r"broken.json holds no recorded cases, .*args, checkpoint"):
        golden.main(tmp_path)
    monkeypatch.setattr(golden, "SHIPPED", tmp_path / "nowhere")
    with pytest.raises(golden.GoldenError, match="dllm-toolkit golden DIR"):
        golden.main()


def test_a_case_without_an_argument_it_needs(tmp_path: Path) -> None:
    path = directory(tmp_path) / "cases" / "mine.json"
    cases = golden.load_cases(path)
    del cases[1]["args"]["block_length"]
    path.write_text(json.dumps({"cases": cases}), encoding="utf-8")
    with pytest.raises(golden.GoldenError, match="block_length"):
        golden.main(tmp_path)
