"""`dllm-toolkit golden [DIR]`: the directory is handed on, the exit code comes back, a wrong directory is one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dllm_toolkit import cli
from dllm_toolkit.testing import golden

VECTORS = Path(__file__).resolve().parents[1] / "golden" / "vectors"


def test_arguments_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(golden, "main", lambda directory=None: seen.append(directory) or 1)
    assert cli.main(["golden"]) == 1 and cli.main(["golden", "somewhere"]) == 1
    assert seen == [None, Path("somewhere")]


def test_a_directory_without_vectors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["golden", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no recorded cases in" in err


def test_a_case_that_differs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(VECTORS / "llada-tiny", tmp_path / "llada-tiny")
    (tmp_path / "cases").mkdir()
    case = json.loads((VECTORS / "cases" / "llada_generate.json").read_text())["cases"][0]
    for change, code in ((0, 0), (1, 1)):
        altered = {**case, "nfe": case["nfe"] + change}
        (tmp_path / "cases" / "llada_generate.json").write_text(json.dumps({"cases": [altered]}))
        assert cli.main(["golden", str(tmp_path)]) == code
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("file ") and json.loads(lines[-1])["cases"] == 1
