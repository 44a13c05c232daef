"""The page of distillation: its verdicts follow from ledger and cards, and it says what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.distillation_page import different, distinct, main
from dllm_toolkit.evaluation.ledger import Header, Record
from dllm_toolkit.testing.ledgers import toy_record

# forwards, problems of 40 with a right answer
ROWS = {
    "slow": (10, 40),
    "teacher[threshold=0.9]": (5, 40),
    "teacher[threshold=0.5]": (2, 20),
    "sft[threshold=0.9]": (5, 40),
    "dscd[threshold=0.9]": (4, 39),
    "dparallel[threshold=0.9]": (2, 40),
}


def record(name: str, index: int) -> Record:
    forwards, right = ROWS[name]
    return toy_record(name, index, forwards=forwards, correct=index < right)


def a_ledger(directory: Path, names: tuple[str, ...] = tuple(ROWS)) -> Path:
    recipe = {"task": {"_component_": "stories"}, "configurations": {name: {"model": "m", "decoder": "fast_dllm"} for name in names}}
    header = Header("hash", recipe, made_on={"device": "a machine"}, configurations=names, baselines={"vanilla": "slow"})
    with ledger.open_ledger(directory / "ledger.jsonl", header) as book:
        for name in names:
            for index in range(40):
                book.append([record(name, index)])
    return directory


def a_card(home: Path, name: str, student: int, teacher: int = 0) -> None:
    where = home / name / "model"
    where.mkdir(parents=True)
    training = {"steps": 10, "sequences": 100, "lanes": {"student": student, "teacher": teacher}}
    objective = {"sft": "masked_diffusion"}.get(name, name)
    given = ", noise: {_component_: monotone}, block_length: 16" if name == "dscd" else ""
    (where / "card.json").write_text(json.dumps({"training": training, "recipe": f"objective: {{_component_: {objective}{given}}}\n"}))


def test_the_page_says_what_each_student_is_worth(tmp_path: Path) -> None:
    for name, lanes in {"sft": (1000, 0), "dparallel": (1000, 0), "dscd": (750, 750)}.items():
        a_card(tmp_path / "distil", name, *lanes)
    assert main([str(a_ledger(tmp_path / "run")), str(tmp_path / "page.md"), str(tmp_path / "distil")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "`dparallel` reaches 1.5 times the teacher's tokens per forward (2.00) at an accuracy within 1 point" in page
    assert "| `dparallel` | 0.9 | 5.00 | 2.50 | 100.0 % |" in page and "| `teacher` | 0.9 | 2.00 | 1.00 |" in page
    assert "`dscd` has no point within 1 point of the reference; its best is 2.50 tokens per forward at 97.5 % accuracy" in page
    assert "+3.0 forwards saved against `sft` (+3.0 to +3.0)." in page
    assert "(CD4LM, arXiv 2601.02236).<br>`block_length: 16` |" in page
    assert "| `dscd` |" in page and page.count("| 1.00 |\n") >= 3  # the three students have the same compute
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_samples_are_counted_by_problem(tmp_path: Path) -> None:
    def sample(problem: str, *output: int) -> Record:
        return replace(record("slow", 0), problem=problem, output=output, tokens=len(output))

    same, other = (sample("p#1", 1, 2), sample("p#2", 1, 2)), (sample("q#1", 1, 2), sample("q#2", 3))
    assert different([*same, *other]) == (1.5, 2)
    a_card(tmp_path / "distil", "sft", 1000)
    recipe = {"task": {"_component_": "repeated"}, "configurations": {"sft": {"decoder": "fast_dllm"}}}
    (tmp_path / "samples").mkdir()
    header = Header("hash", recipe, made_on={"device": "a machine"}, configurations=("sft",))
    with ledger.open_ledger(tmp_path / "samples" / "ledger.jsonl", header) as book:
        for one in (*same, *other):
            book.append([replace(one, configuration="sft")])
    arguments = [str(a_ledger(tmp_path / "run")), str(tmp_path / "page.md"), str(tmp_path / "distil"), str(tmp_path / "samples")]
    assert main(arguments) == 0
    page = (tmp_path / "page.md").read_text()
    assert "2 answers to each of 2 problems" in page and "| different of 2 |" in page and "| 1.50 |" in page


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, home = str(tmp_path / "page.md"), tmp_path / "distil"
    run = a_ledger(tmp_path / "run", ("slow", "sft[threshold=0.9]"))
    assert main([str(run), page, str(home)]) == 2 and "no student" in capsys.readouterr().err
    a_card(home, "sft", 10)
    assert main([str(run), page, str(home)]) == 2 and "no curve of the teacher" in capsys.readouterr().err
    (home / "sft" / "model" / "card.json").write_text("{}")
    assert main([str(run), page, str(home)]) == 2 and "is no card of a student" in capsys.readouterr().err
    assert main([page]) == 2 and not (tmp_path / "page.md").exists()


def test_variety_counts_different_runs() -> None:
    same, other = record("slow", 0), record("slow", 1)
    assert distinct([same, other]) == pytest.approx(1000 / 14)  # one run of four equal tokens among 2 x 7
