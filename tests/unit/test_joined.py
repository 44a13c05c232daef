"""Reports of several runs: numbers are the ledger's, tests are the closed forms, and what was counted differently is refused by name."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dllm_toolkit import cli
from dllm_toolkit.evaluation import comparable, joined_page, joined_text, ledger, provenance, statistics
from dllm_toolkit.evaluation.joined import MEASURES, Joined, join
from dllm_toolkit.evaluation.ledger import Header, Record
from dllm_toolkit.evaluation.runs import ReportError
from dllm_toolkit.testing.ledgers import toy_record

PROBLEMS = 24
RUN = {"max_new_tokens": 80, "batch_size": 2}
TASK = {"_component_": "stories", "size": PROBLEMS, "seed": 7}
# of each configuration: model, decoder, forwards of a problem, right answers
ROWS: dict[str, tuple[str, Any, int, int]] = {
    "vanilla": ("teacher", "vanilla", 20, 20),
    "autoregressive": ("ar", "autoregressive", 10, 22),
    "d2f[threshold=0.9]": ("student", {"_component_": "d2f", "threshold": 0.9}, 5, 20),
    "d2f[threshold=0.5]": ("student", {"_component_": "d2f", "threshold": 0.5}, 2, 10),
}


def record(name: str, index: int, **changes: Any) -> Record:
    """Two problems a batch, of which later ones took longer."""
    _, _, forwards, right = ROWS[name]
    clock = {"seconds": 0.05 * forwards, "batch": index // 2, "batch_rows": 2, "batch_seconds": 0.1 * forwards + 0.01 * (index // 2)}
    made = toy_record(name, index, forwards=forwards, correct=index < right, exact=index < right - 2, nfe=forwards + index % 3, **clock)
    return dataclasses.replace(made, **changes)


def write(
    folder: Path, names: tuple[str, ...], *, count: int = PROBLEMS, recipe: Any = None, record_changes: Any = None, **header: Any
) -> Path:
    """A run in `folder`. recipe: top-level keys to change; record_changes: of every record."""
    configurations = {name: {"model": ROWS[name][0], "decoder": ROWS[name][1], "cache": "block_causal"} for name in names}
    tree = {"task": TASK, "models": {}, "configurations": configurations, "run": RUN, "output": str(folder), **(recipe or {})}
    fixed: dict[str, Any] = {
        "made_of": {"code": "c", "grader": "g1", "problems": "p1", "weights.teacher": "w1", "weights.student": "w2"},
        "made_on": {"device": "a machine", "kind": "cpu", "dtype": "float32", "threads": 1},
        "configurations": names,
        "baselines": {"autoregressive": None, "vanilla": "vanilla" if "vanilla" in names else None},
    }
    records = [record(name, index, **(record_changes or {})) for name in names for index in range(count)]
    put(folder, Header(ledger.recipe_hash(tree), tree, **{**fixed, **header}), records)
    return folder


def put(folder: Path, header: Header, records: Sequence[Record]) -> None:
    """The file that `open_ledger` and `append` make, without waiting for the disk at every batch."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [ledger._line("header", dataclasses.asdict(header)), *(ledger._line("record", dataclasses.asdict(one)) for one in records)]
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write(folder / "one", ("vanilla", "autoregressive")), write(folder / "two", ("d2f[threshold=0.9]", "d2f[threshold=0.5]"))


@pytest.fixture(scope="module")
def joined(runs: tuple[Path, Path]) -> Joined:
    return join(runs)


# --- numbers


def test_values_are_the_ledgers_and_lie_in_their_intervals(joined: Joined, runs: tuple[Path, Path]) -> None:
    single = [summary for run in runs for summary in ledger.summarise(ledger.read(run / "ledger.jsonl")[1])]
    assert [row.summary for row in joined.rows] == single and joined.problems == PROBLEMS
    for row in joined.rows:
        for measure in joined.measures:
            interval, value = joined.intervals[row.name][measure.key], measure.value(row.summary)
            assert value is not None and interval.low - 1e-9 <= value <= interval.high + 1e-9, (row.name, measure.key)
    assert {measure.key for measure in joined.measures} == {measure.key for measure in MEASURES} - {"diversity", "perplexity"}


def test_tests_are_paired_and_corrected_over_the_table(joined: Joined) -> None:
    assert joined.baseline.name == "vanilla" and set(joined.tests) == set(ROWS) - {"vanilla"}
    bold, safe = joined.tests["d2f[threshold=0.5]"], joined.tests["d2f[threshold=0.9]"]
    assert bold["accuracy"].difference.mean == pytest.approx(-10 / 24) and bold["accuracy"].p == pytest.approx(2 / 2**10)
    assert safe["accuracy"].difference == statistics.Difference(0, 0, 0) and safe["accuracy"].p == 1
    # more tokens a forward for every problem: the smallest p that the sampled test has; latency: 12 batches, all flips
    assert safe["tokens_per_forward"].p == 1 / (statistics.FLIPS + 1) and safe["latency"].p == 2 / 2**12
    assert safe["latency"].difference.mean == pytest.approx(-1.5)
    tests = [test for own in joined.tests.values() for test in own.values()]
    assert len(tests) == 12
    assert [test.adjusted for test in tests] == statistics.holm([test.p for test in tests])


def test_curves_fronts_and_speed_up(joined: Joined) -> None:
    (area,) = joined.areas
    assert area.curve.name == "d2f, threshold" and area.curve.settings == ("0.9", "0.5")
    assert area.best_accuracy == pytest.approx(100 * 22 / 24)
    parallel = joined.rows[2].summary.tokens_per_forward
    assert area.accuracy == pytest.approx(parallel * 100 * 20 / 24)  # the other point is far more than 5 points below
    assert joined.front("tokens_per_forward") == ["autoregressive", "d2f[threshold=0.9]", "d2f[threshold=0.5]"]
    assert joined.speed_up(joined.rows[2]) == pytest.approx(4.0)


def test_a_grid_makes_a_curve_for_each_value_of_the_other_argument() -> None:
    from dllm_toolkit.evaluation.curves import Point, curves_of

    (summary,) = ledger.summarise([record("vanilla", 0)])
    points = [
        Point(
            dataclasses.replace(summary, name=f"{threshold}/{block}"),
            {"model": "m", "decoder": {"_component_": "d2f", "threshold": threshold, "block_length": block}},
            "w",
        )
        for threshold in (0.9, 0.7, 0.5)
        for block in (8, 16)
    ]
    assert [(curve.name, curve.settings) for curve in curves_of(points)] == [
        ("d2f, threshold (block_length 8)", ("0.9", "0.7", "0.5")),
        ("d2f, threshold (block_length 16)", ("0.9", "0.7", "0.5")),
    ]
    # other weights are another model, whatever its name
    assert all(len(curve.settings) == 2 for curve in curves_of([*points[:3], *(dataclasses.replace(p, model="v") for p in points[3:])]))


def test_a_sweep_over_two_runs_is_one_curve_and_alike_names_get_their_run(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", ("d2f[threshold=0.9]",)), write(tmp_path / "b", ("d2f[threshold=0.9]", "d2f[threshold=0.5]"))
    found = join([one, two])
    assert [row.name for row in found.rows] == ["a/d2f[threshold=0.9]", "b/d2f[threshold=0.9]", "d2f[threshold=0.5]"]
    assert found.baseline.name == "a/d2f[threshold=0.9]" and [area.curve.settings for area in found.areas] == [("0.9", "0.5")]
    assert found.front("tokens_per_forward")[:2] == ["a/d2f[threshold=0.9]", "b/d2f[threshold=0.9]"]  # equals
    with pytest.raises(ReportError, match=r"several rows are called 'd2f\[threshold=0.9\]'.*b/d2f"):
        join([one, two], baseline="d2f[threshold=0.9]")
    with pytest.raises(ReportError, match="no row is called 'd3f'"):
        join([one, two], baseline="d3f")
    assert [row.name for row in join([one, two], wanted=["b/d2f*9]", "d2f*5]"]).rows] == ["b/d2f[threshold=0.9]", "d2f[threshold=0.5]"]
    with pytest.raises(ReportError, match=r"no row is called 'ar\*'"):
        join([one, two], wanted=["ar*"])


# --- refusing


COUNTING = tuple(f"{rule} and waiting" if rule.startswith("latency") else rule for rule in ledger.COUNTING)


@pytest.mark.parametrize(
    ("change", "field", "columns"),
    [
        ({"recipe": {"run": {**RUN, "max_new_tokens": 64}}}, "run.max_new_tokens: 80 in one; 64 in two", "every column"),
        ({"recipe": {"run": {**RUN, "batch_size": 8}}}, "run.batch_size: 2 in one; 8 in two", "tokens/s, latency (s)"),
        ({"recipe": {"run": {**RUN, "compile": True}}}, "run.compile: auto in one; true in two", "tokens/s, latency (s)"),
        ({"recipe": {"task": {**TASK, "style": "worded"}}}, "task.style: terse in one; worded in two", "every column"),
        (
            {"made_on": {"device": "other", "kind": "cuda", "dtype": "float32"}},
            "made_on.device: a machine in one; other in two",
            "tokens/s",
        ),
        (
            {"made_on": {"device": "a machine", "kind": "cpu", "dtype": "bfloat16", "threads": 1}},
            "made_on.dtype: float32 in one",
            "tokens/s",
        ),
        ({"made_of": {"grader": "g2", "problems": "p1"}}, "made_of.grader: g1 in one; g2 in two", "accuracy, steps right, exact"),
        ({"made_of": {"grader": "g1", "problems": "p2"}}, "made_of.problems: p1 in one; p2 in two", "every column"),
        ({"counting": COUNTING}, "counting of latency", "latency (s)"),
        ({"record_changes": {"prompt_hash": "ff"}}, "prompt_hash of p0: 00 in one; ff in two", "every column"),
        ({"record_changes": {"reference": "43"}}, "reference of p0: 42 in one; 43 in two", "every column"),
        (
            {"record_changes": {"prompt_tokens": 5}},
            "tokenizer (prompt of p0): 3 tokens in one; 5 tokens in two",
            "tokens/forward, tokens/s",
        ),
        ({"made_of": {}, "record_changes": {"correct": False}}, "verdict on one text for p0: right in one; wrong in two", "accuracy"),
        ({"count": 12}, "problems: 24 (12 of them in all) in one; 12 (12 of them in all) in two", "every column"),
    ],
)
def test_what_was_counted_differently_is_refused(tmp_path: Path, change: dict[str, Any], field: str, columns: str) -> None:
    one, two = write(tmp_path / "one", ("vanilla",)), write(tmp_path / "two", ("d2f[threshold=0.9]",), **change)
    with pytest.raises(ReportError) as caught:
        join([one, two])
    message = str(caught.value)
    line = next(line for line in message.splitlines() if f"  {field}" in line)
    assert f"Spoils {columns}" in line and "What to do: " in line
    droppable = columns != "every column"
    assert ("--drop-incomparable" in message) == droppable
    if droppable:
        found = join([one, two], drop=True)
        kept = {measure.title for measure in found.measures}
        assert not kept & set(columns.split(", ")) and kept and all(field.partition(":")[0] in why for why in found.dropped.values())
        assert all(key not in found.dropped for own in found.tests.values() for key in own)
        assert any("left out, counted differently" in remark for remark in joined_text.remarks(found))
        for form in (joined_text.markdown, joined_text.csv_text, joined_text.json_text, joined_page.page):
            assert form(found)
    else:
        with pytest.raises(ReportError):
            join([one, two], drop=True)


def test_the_error_says_how_to_make_a_run_as_the_first_was_made(tmp_path: Path) -> None:
    changed = {"run": {**RUN, "max_new_tokens": 64, "batch_size": 8}}
    one, two = write(tmp_path / "one", ("vanilla",)), write(tmp_path / "two", ("d2f[threshold=0.9]",), recipe=changed)
    (two / "recipe.yaml").touch()
    with pytest.raises(ReportError) as caught:
        join([one, two])
    again = f"dllm-toolkit compare {two}/recipe.yaml run.max_new_tokens=80 run.batch_size=2 output={two}-again"
    assert again in str(caught.value) and "--vary run.max_new_tokens --vary run.batch_size" in str(caught.value)


def test_defaults_seeds_output_and_names_of_the_same_problems_are_no_difference(tmp_path: Path) -> None:
    spelled = {
        "run": {**RUN, "warm_up": 1, "dtype": "float32", "seed": 9},
        "task": {**TASK, "split": "heldout", "size": 99},  # the problems are the same ones: see made_of
        "report": {"html": False},
    }
    one, two = write(tmp_path / "one", ("vanilla",)), write(tmp_path / "two", ("d2f[threshold=0.9]",), recipe=spelled)
    assert any("seeds differ" in note for note in join([one, two]).notes)


def test_what_a_study_varies_becomes_a_column(tmp_path: Path) -> None:
    wide = {"recipe": {"run": {**RUN, "batch_size": 8}}, "made_of": {"weights.student": "w2"}}
    one, two = write(tmp_path / "one", ("d2f[threshold=0.9]",)), write(tmp_path / "two", ("d2f[threshold=0.5]",), **wide)
    found = join([one, two], vary=["run.batch_size"])
    assert found.varied == {"run.batch_size": {"one": "2", "two": "8"}} and not found.areas  # two batch sizes are no one curve
    assert "| configuration | run.batch_size |" in joined_text.markdown(found)
    assert [line["run.batch_size"] for line in csv.DictReader(io.StringIO(joined_text.csv_text(found)))] == ["2", "8"]
    with pytest.raises(ReportError, match=r"--vary run.seed: that does not differ.*\['run.batch_size'\]"):
        join([one, two], vary=["run.seed"])
    three = write(tmp_path / "three", ("vanilla",), recipe={"task": {**TASK, "style": "worded"}})
    with pytest.raises(ReportError, match="--vary task.style: that says what was asked"):
        join([one, three], vary=["task.style"])


def test_shared_problems(tmp_path: Path) -> None:
    short = {"count": 12, "recipe": {"task": {**TASK, "size": 12}}, "made_of": {"problems": "p2", "grader": "g1"}}
    one, two = write(tmp_path / "one", ("vanilla", "autoregressive")), write(tmp_path / "two", ("d2f[threshold=0.9]",), **short)
    found = join([one, two], shared=True)
    assert found.problems == 12 and all(row.summary.problems == 12 for row in found.rows)
    assert found.rows[0].summary == ledger.summarise([record("vanilla", index) for index in range(12)])[0]
    assert "compared on the 12 problems that all rows hold, of up to 24" in found.notes


def test_an_unfinished_run_and_another_task(tmp_path: Path) -> None:
    one = write(tmp_path / "one", ("vanilla",))
    header, records = ledger.read(one / "ledger.jsonl")
    put(one, header, [*records, *(record("autoregressive", index) for index in (0, 1))])
    with pytest.raises(ReportError, match=r"problems: 24 \(2 of them in all\) in vanilla; 2 \(2 of them in all\) in autoregressive"):
        join([one])
    assert join([one], wanted=["vanilla"]).problems == 24
    other = {f"p{index}": f"q{index}" for index in range(24)}
    two = write(tmp_path / "two", ("d2f[threshold=0.9]",))
    text = (two / "ledger.jsonl").read_text()
    for before, after in other.items():
        text = text.replace(f'"problem": "{before}"', f'"problem": "{after}"')
    (two / "ledger.jsonl").write_text(text)
    with pytest.raises(ReportError, match=r"no problem in common: vanilla \(p0, \.\.\.\), d2f\[threshold=0.9\] \(q0"):
        join([one, two], wanted=["vanilla", "d2f*"])


def test_runs_that_cannot_be_read(tmp_path: Path) -> None:
    one = write(tmp_path / "runs" / "one", ("vanilla",), count=2)
    for path, words in (
        (tmp_path / "missing", "there is no run at"),
        (tmp_path / "runs", f"Write the runs inside it: {one}"),
        (tmp_path, "holds no ledger.jsonl"),
    ):
        with pytest.raises(ReportError, match=words):
            join([path])
    with pytest.raises(ReportError, match="named twice"):
        join([one, one / "ledger.jsonl"])
    empty = write(tmp_path / "empty", ("vanilla",), count=0)
    with pytest.raises(ReportError, match="holds no whole batch"):
        join([one, empty])


def test_other_batches_have_no_test_of_latency(tmp_path: Path) -> None:
    """As after a batch that was halved when memory ran out: its clock is not that of the same problems."""
    one, two = write(tmp_path / "one", ("vanilla",)), tmp_path / "two"
    alone = [record("d2f[threshold=0.9]", index, batch=index, batch_rows=1) for index in range(PROBLEMS)]
    put(two, ledger.read(one / "ledger.jsonl")[0], alone)
    found = join([one, two])
    assert set(found.tests["d2f[threshold=0.9]"]) == {"accuracy", "exact", "tokens_per_forward"}
    assert "no test of latency where the problems were not decoded in the same batches" in found.notes


def test_times_of_one_batch_have_no_interval(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", ("vanilla",)), tmp_path / "two"
    header = ledger.read(one / "ledger.jsonl")[0]
    together = {"batch": 0, "batch_rows": PROBLEMS, "batch_seconds": 3.0, "seconds": 3.0 / PROBLEMS}
    for folder, name in ((one, "vanilla"), (two, "autoregressive")):
        put(folder, header, [record(name, index, **together) for index in range(PROBLEMS)])
    found = join([one, two])
    assert "latency" not in found.tests["autoregressive"] and not {"latency", "tokens_per_second"} & set(found.intervals["vanilla"])
    assert any(note.startswith("times of one batch") for note in found.notes)
    assert "| 3.000 |" in joined_text.markdown(found)


def test_a_problem_without_an_answer_is_wrong_and_in_no_other_number(tmp_path: Path) -> None:
    """As the ledger records a problem that does not fit into memory."""
    records = [record("d2f[threshold=0.9]", index, batch=index, batch_rows=1) for index in range(PROBLEMS)]
    lost = {
        "correct": False,
        "exact": False,
        "text": "",
        "nfe": 0,
        "tokens": 0,
        "output": (),
        "born": (),
        "seconds": 0.0,
        "batch_seconds": 0.0,
    }
    one, two = write(tmp_path / "one", ("vanilla",)), tmp_path / "two"
    header = ledger.read(one / "ledger.jsonl")[0]
    put(two, header, [dataclasses.replace(records[0], **lost), *records[1:]])
    whole = tmp_path / "whole"
    put(whole, header, records)
    found, before = join([one, two]), join([one, whole])
    name = "d2f[threshold=0.9]"
    assert found.tests[name]["accuracy"].difference.mean == pytest.approx(before.tests[name]["accuracy"].difference.mean - 1 / PROBLEMS)
    for key in ("nfe", "tokens_per_forward", "latency", "tokens_per_second"):
        low, high = found.intervals[name][key].low, found.intervals[name][key].high
        assert before.intervals[name][key].low * 0.9 < low <= high < before.intervals[name][key].high * 1.1
    assert abs(found.tests[name]["tokens_per_forward"].difference.mean) > 1


def test_every_rule_of_counting_says_which_columns_it_defines() -> None:
    assert {rule.partition(":")[0] for rule in ledger.COUNTING} <= set(comparable.RULES)
    assert {measure.key for measure in MEASURES} == comparable.EVERYTHING


def test_a_graders_digest_sees_its_own_sources_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_toolkit.evaluation.tasks import GSM8K, HumanEval, StoryArithmetic

    one = provenance.grader_fingerprint(StoryArithmetic())
    assert provenance.grader_fingerprint(StoryArithmetic(size=3)) == one
    assert len({one, provenance.grader_fingerprint(GSM8K()), provenance.grader_fingerprint(HumanEval())}) == 3
    file = tmp_path / "digest_task.py"
    file.write_text("from dllm_toolkit.evaluation.tasks import StoryArithmetic, Task\nclass Mine(StoryArithmetic):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import digest_task  # type: ignore[import-not-found]

    mine = provenance.grader_fingerprint(digest_task.Mine())
    file.write_text(file.read_text() + "    # another rule\n")
    assert len({one, mine, provenance.grader_fingerprint(digest_task.Mine())}) == 3


# --- formats


def test_csv_and_json_hold_every_number(joined: Joined) -> None:
    lines = list(csv.DictReader(io.StringIO(joined_text.csv_text(joined))))
    content = json.loads(joined_text.json_text(joined))
    assert [line["name"] for line in lines] == [row["name"] for row in content["rows"]] == list(ROWS)
    for line, row, own in zip(lines, content["rows"], joined.rows, strict=True):
        assert float(line["accuracy"]) == row["accuracy"] == own.summary.accuracy
        assert float(line["latency_low"]) == row["latency_low"] == joined.intervals[own.name]["latency"].low
    assert float(lines[3]["accuracy_p"]) == content["rows"][3]["accuracy_p"] == joined.tests["d2f[threshold=0.5]"]["accuracy"].p
    assert lines[0]["accuracy_p"] == "" and content["rows"][0]["accuracy_p"] is None
    assert content["tests"] == {"correction": "Holm", "count": 12} and content["curves"][0]["aup"]["accuracy"] == joined.areas[0].accuracy
    assert content["runs"][0]["made_on"]["device"] == "a machine" and content["counting"] == list(ledger.COUNTING)


def test_markdown_terminal_and_page(joined: Joined) -> None:
    text, page, stream = joined_text.markdown(joined), joined_page.page(joined), io.StringIO()
    joined_text.print_terminal(joined, stream)
    for name in ROWS:
        assert f"| {name} | 24 |" in text
        assert name in page.replace("<wbr>", "")
    assert "| d2f[threshold=0.5] | **-41.7 points [-62.5, -20.8]** (p = 0.012)" in text
    assert "**Against vanilla**" in text and "alpha 3, points more than 5 below" in text
    assert "Holm's correction over the table, 12 tests" in stream.getvalue() and "83.3 %" in stream.getvalue()
    assert "<script" not in page and "src=" not in page and "@import" not in page and page.count("<svg") == 2


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_is_cut_in_a_narrow_terminal(joined: Joined, width: int) -> None:
    stream = io.StringIO()
    joined_text.print_terminal(joined, stream, width)
    assert max(map(len, stream.getvalue().splitlines())) <= width
    words = set(stream.getvalue().split())
    for row in joined.rows:
        for measure in joined.measures:
            value = measure.value(row.summary)
            assert value is not None and (measure.text(value).split()[0] in words or f"{measure.text(value)}*" in words)
        assert f"{joined.speed_up(row):.2f}" in words
    assert ("(2 of" in stream.getvalue()) == (width < 200)


def test_what_a_ledger_says_is_escaped(tmp_path: Path) -> None:
    one = write(tmp_path / "one", ("vanilla",), commit="<img src=x>")
    page = joined_page.page(join([one]))
    assert "<img" not in page and "&lt;img src=x&gt;" in page


def test_perplexity_and_diversity_where_the_ledger_holds_them(tmp_path: Path) -> None:
    extra = {"extra": {"judge_loss": 2.0, "judge_tokens": 4, "choice": 1, "choices": 3, "operation": "shuffle"}}
    found = join([write(tmp_path / "one", ("vanilla",), record_changes=extra)])
    titles = [measure.title for measure in found.measures]
    assert titles[-2:] == ["diversity", "perplexity"] and found.tests == {}
    interval = found.intervals["vanilla"]["perplexity"]
    assert interval.low == pytest.approx(interval.high) == pytest.approx(1.6487, abs=1e-4)
    assert "diversity" not in found.intervals["vanilla"] and "1.65" in joined_text.markdown(found)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["report", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, runs[0], "--baseline", "autoregressive", runs[1], "--format", "json")  # runs before and after options
    assert code == 0 and json.loads(out)["baseline"] == "autoregressive" and len(json.loads(out)["rows"]) == 4
    code, out, err = run(capsys, *runs, "--out", tmp_path / "deep" / "report.csv")
    assert code == 0 and out == "" and "Written to" in err
    assert (tmp_path / "deep" / "report.csv").read_text().startswith("name,run,configuration,problems,baseline,accuracy,")
    kept = (runs[0] / "ledger.jsonl").read_bytes()
    for wrong, words in (
        ([runs[0], "--out", runs[0] / "ledger.jsonl"], "is a ledger's name"),
        ([runs[0], "--out", tmp_path], "is a folder"),
        ([runs[0], "--tensorboard", runs[0]], "holds something else already"),
        ([runs[0], "--baseline", "nobody"], "no row is called 'nobody'"),
    ):
        code, out, err = run(capsys, *wrong)
        assert code == 2 and out == "" and words in err
    assert (runs[0] / "ledger.jsonl").read_bytes() == kept


def test_tensorboard_shows_a_sweep_in_one_view(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back by TensorBoard's own backend of the hparams view: one session a row, with every number and setting."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    from dllm_toolkit.evaluation.tensorboard import _columns

    folder = tmp_path / "board"
    for _ in range(2):  # the second time over the first
        assert run(capsys, *runs, "--format", "csv", "--tensorboard", folder)[0] == 0
    events = EventMultiplexer().AddRunsFromDirectory(str(folder))
    events.Reload()
    context, request = Context(TBContext(data_provider=MultiplexerDataProvider(events, str(folder)))), RequestContext()
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest()).run()
    kinds = {info.name: api_pb2.DataType.Name(info.type) for info in experiment.hparam_infos}
    assert set(kinds.values()) == {"DATA_TYPE_STRING"}  # a threshold that some rows have not is no number
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3])
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    assert [group.name for group in groups] == sorted(ROWS)
    for group in groups:
        values = {value.name.tag: value.value for value in group.metric_values}
        assert set(values) == {info.name.tag for info in experiment.metric_infos} and "comparison/tokens_per_forward" in values
        assert set(group.hparams) == set(kinds)  # parallel coordinates leave out a session that lacks a column
    shown = {key: value.string_value for key, value in groups[1].hparams.items()}
    assert shown == {"run": "two", "model": "student", "cache": "block_causal", "decoder": "d2f", "decoder.threshold": "0.5"}
    assert groups[3].hparams["decoder.threshold"].string_value == "-"
    numbers = {"one": {"threshold": 0.5, "early": True}, "two": {"threshold": 1, "early": False}}
    assert _columns(numbers) == numbers  # all numbers: an axis with a scale
