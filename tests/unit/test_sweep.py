"""Sweeps: what a grid holds, how its cells are called, what is refused and where, and what it will cost."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from dllm_toolkit import cli, recipe
from dllm_toolkit.evaluation import compare, cost
from dllm_toolkit.evaluation.cost import duration, estimate, family, print_costs
from dllm_toolkit.evaluation.measure import RunOptions
from dllm_toolkit.models.fresh import fresh
from dllm_toolkit.recipe import RecipeError
from dllm_toolkit.recipe_errors import Mark
from dllm_toolkit.sweep import LARGEST, SWEEP, expand, is_cell
from dllm_toolkit.yaml_marks import node_of, parse

ROOT = Path(__file__).resolve().parents[2]


def cells(text: str) -> dict[str, Any]:
    """The configurations that a recipe's `configurations` stand for."""
    return expand(parse(text, Mark("r.yaml", 1))).plain()["configurations"]


def test_a_grid_is_the_product_and_the_last_sweep_is_fastest() -> None:
    found = cells(
        "configurations: {d2f: {decoder: {_component_: d2f, threshold: {_sweep_: [0.7, 0.90]}, block_length: {_sweep_: [16, 32]}}}}"
    )
    assert list(found) == [f"d2f[threshold={t},block_length={b}]" for t, b in itertools.product((0.7, 0.9), (16, 32))]
    assert [one["decoder"] for one in found.values()] == [
        {"_component_": "d2f", "threshold": t, "block_length": b} for t, b in itertools.product((0.7, 0.9), (16, 32))
    ]


@given(some.lists(some.sets(some.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_combination_once(values: list[set[int]]) -> None:
    keys = [f"k{index}" for index in range(len(values))]
    tree = {"configurations": {"a": {key: {SWEEP: sorted(one)} for key, one in zip(keys, values, strict=True)}}}
    found = expand(node_of(tree)).plain()["configurations"]
    assert [tuple(one[key] for key in keys) for one in found.values()] == list(itertools.product(*map(sorted, values)))
    assert all(name == f"a[{','.join(f'{key}={one[key]}' for key in keys)}]" and is_cell(name) for name, one in found.items())


def test_names() -> None:
    # components by their names, mappings of names, sweeps inside of values, and as much of a key as tells two apart
    found = cells("configurations: {a: {decoder: {_sweep_: [vanilla, {_component_: d2f, threshold: {_sweep_: [0.5, 1e-4]}}]}}}")
    assert list(found) == ["a[decoder=vanilla]", "a[decoder=d2f,threshold=0.5]", "a[decoder=d2f,threshold=0.0001]"]
    found = cells(
        "configurations: {a: {decoder: {_sweep_: {fast: {_component_: d2f, threshold: 0.5}, safe: vanilla}}}, b: {decoder: vanilla}}"
    )
    assert found["a[decoder=fast]"] == {"decoder": {"_component_": "d2f", "threshold": 0.5}} and list(found)[1:] == ["a[decoder=safe]", "b"]
    found = cells("configurations: {a: {decoder: {n: {_sweep_: [1]}, m: {_sweep_: [3]}}, cache: {n: {_sweep_: [2]}}}}")
    assert list(found) == ["a[decoder.n=1,m=3,cache.n=2]"]
    found = cells("configurations: {a: {decoder: {stop: [{n: {_sweep_: [1, null]}}, plain, [1, 2]]}}}")
    assert list(found) == ["a[n=1]", "a[n=null]"] and found["a[n=1]"]["decoder"]["stop"] == [{"n": 1}, "plain", [1, 2]]


def test_without_a_sweep_nothing_changes() -> None:
    node = parse("configurations: {a: {decoder: {_component_: d2f, tokens: [1, 2]}}}", Mark("r.yaml", 1))
    assert expand(node) is node


REFUSED = {
    "outside": ("task: {size: {_sweep_: [1, 2]}}", r"r.yaml:1: task.size: a sweep stands inside a configuration"),
    "no list": (
        "configurations:\n  a:\n    n: {_sweep_: 3}",
        r"r.yaml:3: .*takes a list of values, got the number 3.*write: `_sweep_: \[3, ...\]`",
    ),
    "empty": ("configurations:\n  a:\n    n: {_sweep_: []}", r"r.yaml:3: configurations.a.n: `_sweep_` is empty"),
    "twice": ("configurations: {a: {n: {_sweep_: [0.8, 0.80]}}}", r"two values of the sweep are called '0.8'"),
    "two components": (
        "configurations: {a: {d: {_sweep_: [{_component_: x, n: 1}, {_component_: x, n: 2}]}}}",
        r"called 'x'.*write: `_sweep_: \{<name>: \{_component_: x, n: 2\}, ...\}`",
    ),
    "no short name": ("configurations: {a: {n: {_sweep_: [[1, 2]]}}}", r"a list in a sweep has no short name"),
    "odd name": ("configurations: {a: {n: {_sweep_: ['asset:teacher']}}}", r"letters, digits and _ . \+ -, got 'asset:teacher'"),
    "not alone": ("configurations: {a: {d: {_component_: d2f, _sweep_: [x]}}}", r"stands alone, got _component_ beside it"),
    "whole": ("configurations:\n  a: {_sweep_: [1]}", r"r.yaml:2: configurations.a: a whole configuration is no value"),
    "same name": ('configurations: {a: {n: {_sweep_: [1]}}, "a[n=1]": {n: 1}}', r"two configurations are called 'a\[n=1\]'"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_sweep_is_refused_at_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cells(text)


def test_a_huge_grid_is_counted_not_made() -> None:
    sweeps = ", ".join(f"k{index}: {{_sweep_: [{', '.join(map(str, range(10)))}]}}" for index in range(12))
    with pytest.raises(
        RecipeError, match=r"make 1,000,000,000,000 configurations, and at most 1,000 .* write: `sweep: \{largest: 1000000000000\}`"
    ):
        cells(f"configurations: {{a: {{{sweeps}}}}}")
    many = f"configurations: {{a: {{n: {{_sweep_: [{', '.join(map(str, range(LARGEST + 1)))}]}}}}}}"
    with pytest.raises(RecipeError, match=r"1,001 configurations"):
        cells(many)
    assert len(cells(f"{many}\nsweep: {{largest: 1001}}")) == 1001


def test_the_shipped_sweep() -> None:
    loaded = recipe.load(ROOT / "recipes/compare/sweep.yaml")
    names = list(loaded.tree["configurations"])
    assert len(names) == 30 and "d2f[threshold=0.9]" in names and "deer[draft_length=16]" in names
    again = recipe.Recipe(loaded.path, expand(loaded.node))
    assert again.hash() == loaded.hash()  # what is written into the run's directory is the grid itself


RECIPE = """
task: {{_component_: stories, size: 3, seed: 7}}
models: {{teacher: {{_component_: load, path: "{models}"}}}}
configurations:
  fast:
    model: teacher
    decoder: {{_component_: fast_dllm, block_length: 8, threshold: {{_sweep_: [0.01, 0.9]}}}}
    cache: {{_sweep_: [none, dual]}}
run: {{max_new_tokens: 8, device: cpu, threads: 1, warm_up: 0}}
output: {output}
report: {{tensorboard: false, html: false}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "teacher"
    fresh(width=16, layers=1, heads=2, max_positions=128).save_pretrained(directory)
    return directory


@pytest.fixture
def path(models: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(models=models, output=tmp_path / "run"))
    return file


def test_plan_run_and_rerun(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["compare", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "plan: 4 configurations; 12 of 12 answers to decode, about " in shown.out and not (tmp_path / "run").exists()
    lines = [line for line in shown.out.splitlines() if line.startswith("  fast[")]
    assert len(lines) == 4 and all("decoded alone" in line for line in lines)

    assert cli.main(["compare", str(path)]) == 0
    shown = capsys.readouterr()
    assert "plan: 4 configurations; 12 of 12" in shown.err and "plan:" not in shown.out
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished cell was decoded again")

    monkeypatch.setattr(cost, "measured", never)
    monkeypatch.setattr("dllm_toolkit.evaluation.measure._decode", never)
    # finished cells are skipped, by the recipe and by the one in the run's directory
    for file in (path, tmp_path / "run" / "recipe.yaml"):
        assert cli.main(["compare", str(file)]) == 0
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before
    capsys.readouterr()
    assert cli.main(["compare", str(path), "--dry-run"]) == 0
    assert "plan: 4 configurations; 4 are finished and skipped; 0 of 12 answers" in capsys.readouterr().out
    # another seed is another recipe: the dry run says so, and takes no figure from that ledger
    monkeypatch.setattr(cost, "measured", lambda row, run, device: cost.Rate(2.0, 0.5, "a test"))
    assert cli.main(["compare", str(path), "--dry-run", "run.seed=1"]) == 0
    shown = capsys.readouterr()
    assert "belongs to another recipe" in shown.err and "12 of 12 answers to decode, about 24 forwards and 6.0 s" in shown.out
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


def test_overrides_change_a_sweep(path: Path) -> None:
    at = "configurations.fast.decoder.threshold"
    assert list(recipe.load(path, [f"{at}=0.5"]).tree["configurations"]) == ["fast[cache=none]", "fast[cache=dual]"]
    assert list(recipe.load(path, [f"{at}={{_sweep_: [0.2]}}", "configurations.fast.cache=dual"]).tree["configurations"]) == [
        "fast[threshold=0.2]"
    ]
    with pytest.raises(RecipeError, match="<override> task.size"):
        recipe.load(path, ["task.size={_sweep_: [1, 2]}"])
    child = path.with_name("child.yaml")
    child.write_text("base: recipe.yaml\nconfigurations: {fast: {decoder: {_sweep_: [vanilla, semi_ar]}, cache: none}}\n")
    assert list(recipe.load(child).tree["configurations"]) == ["fast[decoder=vanilla]", "fast[decoder=semi_ar]"]


def test_bad_cells_are_named_before_anything_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*overrides: str) -> str:
        assert cli.main(["compare", str(path), *overrides]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err and not (tmp_path / "run").exists()
        return shown.err

    # every pair that does not fit, each with the line of its value
    error = fails("configurations.fast.cache={_sweep_: [none, block_causal]}")
    assert error.count("the cache block_causal") == 2 and "configurations.fast[threshold=0.9,cache=block_causal].cache" in error
    assert "recipe.yaml:8: configurations.fast[threshold=0.01,cache=none]" not in error
    path.write_text(path.read_text().replace("[none, dual]", "[none, block_causal]"))
    assert fails().count("recipe.yaml:8: configurations.fast[threshold=") == 2
    # a value that the component's type, or its constructor, refuses
    path.write_text(path.read_text().replace("[0.01, 0.9]", "[0.01, high]"))
    assert "recipe.yaml:7: configurations.fast[threshold=high,cache=none].decoder.threshold: expected" in fails()
    path.write_text(
        path.read_text().replace("model: teacher\n    decoder", "model: {_sweep_: [teacher, pupil]}\n    decoder").replace("high", "0.9")
    )
    assert "recipe.yaml:6: configurations.fast[model=pupil,threshold=0.01,cache=none].model" in fails()


def test_a_cell_that_is_another_configuration_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(
        path.read_text().replace(
            "run:", "  plain: {model: teacher, decoder: {_component_: fast_dllm, block_length: 8, threshold: 0.9}}\nrun:", 1
        )
    )
    assert cli.main(["compare", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml:9: configurations.plain: it is the same configuration as fast[threshold=0.9,cache=none]" in error


def test_rates_come_from_the_nearest_answers(models: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = recipe.load(path).checked(compare.CompareRecipe)
    built = loaded.build(compare.CompareRecipe)
    problems = tuple(built.task.problems())
    rows = compare._rows(loaded, built, problems)
    configurations = loaded.tree["configurations"]
    assert len({family(one) for one in configurations.values()}) == 2  # one for each cache

    class Answer:
        configuration, nfe, seconds = rows[0].name, 4, 0.25

    asked = []
    monkeypatch.setattr(cost, "measured", lambda row, run, device: asked.append(row.name) or cost.Rate(6.0, 1.0, "now"))
    costs = estimate(rows, configurations, [Answer()], 3, RunOptions(), torch.device("cpu"))  # type: ignore[list-item]
    assert asked == [rows[1].name]
    assert [(one.done, one.missing, one.forwards, one.seconds) for one in costs] == [
        (1, 2, 8.0, 0.5),
        (0, 3, 18.0, 3.0),
        (0, 3, 12.0, 0.75),
        (0, 3, 18.0, 3.0),
    ]
    assert costs[2].rate.source == f"{rows[0].name} in the ledger"
    stream = io.StringIO()
    print_costs(costs, stream)
    assert stream.getvalue().startswith("plan: 4 configurations; 11 of 12 answers to decode, about 56 forwards and 7.2 s\n")


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.04, 89, 90, 5399, 7200)] == ["0.0 s", "89.0 s", "2 min", "90 min", "2.0 h"]
