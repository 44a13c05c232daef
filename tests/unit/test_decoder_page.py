"""The page of decoders: whatever is registered and in the ledger is on it, and its sentences follow from the numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dllm_toolkit import registry
from dllm_toolkit.evaluation import decoder_page, ledger
from dllm_toolkit.evaluation.decoder_page import Run, curves_of, main, paired
from dllm_toolkit.evaluation.ledger import Header, Record
from dllm_toolkit.evaluation.left_out import LEFT_OUT, LeftOut
from dllm_toolkit.evaluation.report import summaries_of
from dllm_toolkit.testing.ledgers import toy_record

PROBLEMS = 40


def fast(threshold: float, **more: Any) -> dict[str, Any]:
    return {"model": "teacher", "decoder": {"_component_": "fast_dllm", "threshold": threshold, **more}, "cache": "dual"}


CONFIGURATIONS: dict[str, Any] = {
    "vanilla": {"model": "teacher", "decoder": "vanilla"},
    "autoregressive": {"model": "ar", "decoder": "autoregressive", "cache": "block_causal"},
    "safe": fast(0.9),
    "bold": fast(0.5),
    "hasty": fast(0.1),
    "slow": {"model": "teacher", "decoder": "semi_ar", "cache": "prefix"},
    "deer": {"model": "ar", "decoder": "autoregressive", "cache": "block_causal", "driver": {"_component_": "deer", "drafter": "teacher"}},
}
# forwards, problems with a right answer, problems with an exact solution
OUTCOMES = {
    "vanilla": (20, 40, 40),
    "autoregressive": (10, 40, 40),
    "safe": (5, 40, 39),
    "bold": (4, 40, 20),
    "hasty": (2, 10, 5),
    "slow": (20, 38, 38),
    "deer": (3, 40, 40),
}


def record(name: str, index: int) -> Record:
    forwards, right, exact = OUTCOMES[name]
    return toy_record(name, index, forwards=forwards, correct=index < right, exact=index < exact)


def header() -> Header:
    return Header(
        recipe_hash=ledger.recipe_hash({"configurations": CONFIGURATIONS}),
        recipe={"task": {"_component_": "stories", "size": PROBLEMS}, "configurations": CONFIGURATIONS},
        made_of={"code": "c"},
        made_on={"device": "a machine", "threads": 1, "dtype": "float32"},
        configurations=tuple(CONFIGURATIONS),
        baselines={"autoregressive": "autoregressive", "vanilla": "vanilla"},
    )


def run_of(names: tuple[str, ...] = tuple(CONFIGURATIONS)) -> Run:
    records = [record(name, index) for name in names for index in range(PROBLEMS)]
    return Run(header(), records, summaries_of(header(), records))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a ledger on the disk, by the command."""
    directory = tmp_path_factory.mktemp("page")
    with ledger.open_ledger(directory / "run" / "ledger.jsonl", header()) as book:
        for name in CONFIGURATIONS:
            for index in range(PROBLEMS):
                book.append([record(name, index)])
    target = directory / "docs" / "decoders.md"
    assert main([str(directory / "run"), str(target), str(directory / "run")]) == 0
    assert all((target.parent / name).stat().st_size > 10_000 for name in ("decoders.png", "decoders_sweep.png"))
    return target.read_text(encoding="utf-8")


def test_everything_registered_is_on_the_page(page: str) -> None:
    methods = page.partition("## Results")[0]
    for kind in ("decoder", "driver", "cache"):
        for name in registry.names(kind):
            assert (f"| `{name}` |" in methods) == (name not in decoder_page.TEMPLATES), name
    d2f = next(line for line in methods.splitlines() if line.startswith("| `d2f` |"))
    assert "schedule: `pipelined`; commit: `gate`" in d2f and "**block_causal**" in d2f and "dual" in d2f and "**dual**" not in d2f
    assert "](https://arxiv.org/abs/2508.09192)" in d2f
    deer = next(line for line in methods.splitlines() if line.startswith("| `deer` |"))
    assert deer.endswith("| yes |") and "arxiv.org/abs/2512.15176" in deer


def test_every_configuration_is_in_the_table(page: str) -> None:
    table = page.partition("## Results")[2].partition("## What helps here")[0]
    for number, name in enumerate(CONFIGURATIONS, 1):
        assert f"| {number} | `{name}` |" in table
    assert "| `autoregressive` under `deer` | **block_causal** | 100.0 % (" in table
    assert "| `fast_dllm` | dual | 25.0 % (" in table and "40 problems of stories, batch 1, a machine, 1 thread, float32" in table


def test_sentences_follow_from_the_numbers(page: str) -> None:
    text = page.partition("## What helps here")[2].partition("## Threshold sweeps")[0]
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("- `")}
    assert set(lines) == {"safe", "bold", "hasty", "slow", "deer"}
    assert "keeps accuracy (no problem differs)" in lines["safe"]
    assert "keeps exact solutions (-2.5 points, interval -7.5 to +0.0 includes zero)" in lines["safe"]
    assert "against `vanilla`, with 4.00 times fewer forwards and 4.00 times fewer lanes, at 4.00 times" in lines["safe"]
    assert "lowers exact solutions (-50.0 points" in lines["bold"] and "excludes zero" in lines["bold"]
    assert "lowers accuracy (-75.0 points" in lines["hasty"]
    assert "against `autoregressive`, with 3.33 times fewer forwards" in lines["deer"]
    assert "- **Fewer forwards, accuracy and exact solutions kept or raised** (2): `safe`, `deer`." in text
    assert "- **Fewer forwards, accuracy kept, fewer exact solutions** (1): `bold`." in text
    assert "- **Fewer forwards, lower accuracy** (1): `hasty`." in text and "- **As many forwards or more** (1): `slow`." in text
    assert "Accuracy does not tell 4 of these 5 configurations from their baselines" in text


def test_sweeps_are_found_and_have_an_area(page: str) -> None:
    curves = curves_of(run_of())
    assert [(curve.name, curve.settings) for curve in curves] == [("fast_dllm, threshold", ("0.9", "0.5", "0.1"))]
    text = page.partition("## Threshold sweeps")[2].partition("## Left out")[0]
    assert "y_max the best of this pool: 100.0 % accuracy, 100.0 % exact solutions" in text
    # accuracy: 2 x 100 and the point at 25 left out; then 2.5 x 100 + 0.5 x 100
    assert "0.9: 2.00 at 100.0 % (97.5 %), 0.5: 2.50 at 100.0 % (50.0 %), 0.1: 5.00 at 25.0 % (12.5 %) | 250 |" in text
    assert "Single points: `vanilla` 0.50 at 100.0 % (100.0 %), `autoregressive` 1.00" in text


def test_two_arguments_that_differ_are_no_curve() -> None:
    run = run_of(("safe", "bold"))
    changed = {**CONFIGURATIONS, "bold": fast(0.5, block_length=8), "safe": fast(0.9, block_length=16)}
    other = dataclasses.replace(run, header=dataclasses.replace(run.header, recipe={**run.header.recipe, "configurations": changed}))
    assert len(curves_of(run)) == 1 and curves_of(other) == []


def test_paired_differences() -> None:
    assert (paired([1, 1], [1, 1]).mean, paired([1, 1], [1, 1]).verdict) == (0.0, "keeps")
    assert paired([1] * 50, [0] * 50).verdict == "raises" and paired([0] * 50, [1] * 50).verdict == "lowers"
    mixed = paired([1, 0] * 30, [0, 1] * 30)
    assert mixed.verdict == "keeps" and mixed.low < 0 < mixed.high


def test_what_is_left_out_says_why_unless_it_is_built(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.partition("## Left out")[2]
    assert all(f"| {one.name} |" in text for one in LEFT_OUT) and "arxiv.org/abs/2602.06036" in text
    assert all(one.reason.endswith(".") for one in LEFT_OUT)
    monkeypatch.setattr(decoder_page, "LEFT_OUT", (LeftOut("A", "Why.", unless=("d2f",)), LeftOut("B", "Why.", unless=("nothing",))))
    assert "| A |" not in decoder_page._left_out_section() and "| B |" in decoder_page._left_out_section()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "usage: " in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "x.md")]) == 2
    assert "there is no ledger at " in capsys.readouterr().err and not (tmp_path / "x.md").exists()
