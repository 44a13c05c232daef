"""Runs joined into one table: what each configuration achieved with 95 % intervals, paired tests against a baseline, curves.

Numbers are those of the ledger (`ledger.summarise`); what is added here is how sure they are. Intervals come from resampling problems, or
whole batches for what is timed, since the problems of a batch share its clock. Tests are paired, on the same problems: exact McNemar for
grades, sign flips for tokens per forward (the mean over problems) and latency (batch by batch, where batches are the same); Holm's
correction over all tests of the table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllm_toolkit.evaluation import comparable, curves, ledger, statistics
from dllm_toolkit.evaluation.comparable import Disagreement
from dllm_toolkit.evaluation.curves import Area, Point
from dllm_toolkit.evaluation.ledger import Record, Summary
from dllm_toolkit.evaluation.runs import ReportError, Row, Source, find_row, read_runs, rows_of
from dllm_toolkit.evaluation.statistics import Difference, Interval


@dataclass(frozen=True)
class Measure:
    """A column. value: of a summary, None where a ledger does not hold it. interval: of records; more: whether more is better."""

    key: str
    title: str
    value: Callable[[Summary], float | None]
    interval: Callable[[Sequence[Record]], Interval | None]
    text: Callable[[float], str]
    more: bool = True
    percent: bool = False


@dataclass(frozen=True)
class Test:
    """A comparison with the baseline on the same problems. adjusted: p by Holm over the table."""

    difference: Difference
    p: float
    adjusted: float = 1.0


@dataclass(frozen=True)
class Joined:
    """A report. dropped: columns that were left out, and why. varied: of each field that a study varies the value of each run."""

    sources: Sequence[Source]
    rows: Sequence[Row]
    baseline: Row
    intervals: Mapping[str, Mapping[str, Interval]]  # row, measure
    tests: Mapping[str, Mapping[str, Test]]  # row, measure
    areas: Sequence[Area]
    dropped: Mapping[str, str] = field(default_factory=dict)
    varied: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def measures(self) -> list[Measure]:
        """Columns that are kept and that some row has."""
        kept = [measure for measure in MEASURES if measure.key not in self.dropped]
        return [measure for measure in kept if any(measure.value(row.summary) is not None for row in self.rows)]

    @property
    def problems(self) -> int:
        return self.baseline.summary.problems

    @property
    def has_curves(self) -> bool:
        """Whether accuracy and tokens per forward are both there to compare."""
        return not {"accuracy", "tokens_per_forward"} & set(self.dropped)

    def front(self, key: str) -> list[str]:
        """Names of the rows that no other beats in both accuracy and this measure; none if one of the two was left out."""
        if {"accuracy", key} & set(self.dropped):
            return []
        points = [(float(getattr(row.summary, key)), row.summary.accuracy) for row in self.rows]
        front = {points[index] for index in curves.pareto_front(points)}
        return [row.name for row, point in zip(self.rows, points, strict=True) if point in front]  # equals are on it together

    def speed_up(self, row: Row) -> float | None:
        """Ratio of tokens per second to the baseline's."""
        slow = self.baseline.summary.tokens_per_second
        return None if "tokens_per_second" in self.dropped or slow <= 0 else row.summary.tokens_per_second / slow


def join(
    paths: Sequence[Path],
    *,
    baseline: str | None = None,
    wanted: Sequence[str] = (),
    shared: bool = False,
    drop: bool = False,
    vary: Sequence[str] = (),
) -> Joined:
    """Read runs and compare them.

    wanted: rows, all if empty. shared: compare the problems that all rows hold, instead of refusing rows that hold others. drop: leave out
    columns that were counted differently, instead of refusing them. vary: fields that may differ and become columns. Raises ReportError.
    """
    sources = read_runs(paths)
    rows = rows_of(sources, wanted)
    sources = [source for source in sources if any(row.source is source for row in rows)]
    rows, others, notes = _same_problems(rows, shared)
    found = comparable.disagreements(sources, rows, shared=shared)
    if others:  # said once, with the number of problems
        found = [*others, *(one for one in found if one.field != "made_of.problems")]
    varied = _varied(sources, found, vary)
    found = [one for one in found if one.field not in varied]
    if found and not (drop and all(one.droppable for one in found)):
        raise comparable.refuse(sources, found, {measure.key: measure.title for measure in MEASURES})
    dropped: dict[str, str] = {}
    for one in found:
        for key in sorted(one.spoils):
            dropped[key] = f"{dropped[key]}; {one}" if key in dropped else str(one)
    if set(dropped) >= {measure.key for measure in MEASURES}:
        raise comparable.refuse(sources, [replace(one, spoils=comparable.EVERYTHING) for one in found], {})
    base = find_row(rows, baseline) if baseline is not None else _default_baseline(rows)
    pool = [replace(row.summary, name=row.name) for row in rows]
    rows = [replace(row, summary=summary) for row, summary in zip(rows, pool, strict=True)]
    base = next(row for row in rows if row.name == base.name)
    # What a study varies keeps curves apart, as the model does.
    apart = {row.name: [row.model, *(values[row.source.label] for values in varied.values())] for row in rows}
    points = [Point(row.summary, row.settings, "|".join(apart[row.name])) for row in rows]
    areas = [] if {"accuracy", "exact", "tokens_per_forward"} & set(dropped) else curves.areas(curves.curves_of(points), pool)
    kept = [measure for measure in MEASURES if measure.key not in dropped]
    intervals = {row.name: _intervals(row, kept) for row in rows}
    notes += comparable.remarks(sources, rows)
    tests = _tests(rows, base, {measure.key for measure in kept})
    notes += _clocks(rows, tests) if "latency" not in dropped else []
    return Joined(sources, rows, base, intervals, tests, areas, dropped, varied, notes)


def _clocks(rows: Sequence[Row], tests: Mapping[str, Mapping[str, Test]]) -> list[str]:
    """What to know about times."""
    fewest = min(len(_batches(row.records)) for row in rows)
    if fewest == 1:
        return ["times of one batch: no interval and no test says how they would vary; a smaller batch or more problems give some"]
    notes = [f"times of {fewest} batches: their intervals are rough"] if fewest < 8 else []
    if any("latency" not in own for own in tests.values()):
        notes.append("no test of latency where the problems were not decoded in the same batches")
    return notes


def _same_problems(rows: Sequence[Row], shared: bool) -> tuple[list[Row], list[Disagreement], list[str]]:
    """The rows cut to the problems that all of them hold; what keeps them from being compared, unless that is wanted; what to note."""
    sets = {row.name: frozenset(record.problem for record in row.records) for row in rows}
    common = frozenset.intersection(*sets.values())
    if not common:
        raise ReportError(
            "these rows have no problem in common: "
            + ", ".join(f"{row.name} ({row.records[0].problem}, ...)" for row in rows)
            + ". A report compares answers to the same problems. Write --rows with the rows of one task."
        )
    if all(own == common for own in sets.values()):
        return list(rows), [], []
    cut = []
    for row in rows:
        records = tuple(record for record in row.records if record.problem in common)
        cut.append(replace(row, records=records, summary=ledger.summarise(records)[0]))
    if shared:
        return cut, [], [f"compared on the {len(common)} problems that all rows hold, of up to {max(map(len, sets.values()))}"]
    held: dict[str, set[frozenset[str]]] = {}
    for row in rows:
        held.setdefault(row.source.label, set()).add(sets[row.name])
    values = {}
    for row in rows:  # a run is named once where all its rows hold the same
        own = sets[row.name]
        values[row.source.label if len(held[row.source.label]) == 1 else row.name] = f"{len(own)} ({len(common)} of them in all)"
    advice = "give the command of an unfinished run again, or add --shared-problems to compare those that all rows hold"
    return cut, [Disagreement("problems", values, comparable.EVERYTHING, advice)], []


def _varied(sources: Sequence[Source], found: Sequence[Disagreement], vary: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Of each field of `vary` the value that each run has."""
    differing = {one.field: one for one in found}
    for name in vary:
        if name not in differing or not differing[name].variable:
            choice = [one.field for one in found if one.variable] or "none: nothing of the kind differs"
            why = "says what was asked or how it was judged" if name in differing else "does not differ"
            raise ReportError(f"--vary {name}: that {why}. A study varies how runs were made. Write one of {choice}.")
    return {name: differing[name].values for name in dict.fromkeys(vary)}


def _default_baseline(rows: Sequence[Row]) -> Row:
    """The row that a run itself names as its baseline, the vanilla one first; else the first row."""
    for slot in ("vanilla", "autoregressive"):
        for row in rows:
            if row.source.header.baselines.get(slot) == row.configuration:
                return row
    return rows[0]


# --- how sure


def _decoded(record: Record) -> int:
    return record.tokens - record.given


def _answered(records: Sequence[Record]) -> list[Record]:
    """Without those that no forward answered, because memory ran out: they count as wrong, and in no count and no time."""
    return [record for record in records if record.nfe > 0]


def _batches(records: Sequence[Record]) -> list[list[Record]]:
    found: dict[tuple[int, float], list[Record]] = {}
    for record in _answered(records):
        # A batch that was split when memory ran out keeps its number; its parts have clocks of their own.
        found.setdefault((record.batch, record.batch_seconds), []).append(record)
    return list(found.values())


def _share(name: str) -> Callable[[Sequence[Record]], Interval]:
    return lambda records: Interval(*statistics.accuracy_interval([getattr(record, name) for record in records]))


def _ratio(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    """None for a single observation: nothing says how it would have varied."""
    return statistics.ratio_interval(above, below) if len(below) > 1 and max(below) > 0 else None


def _parallelism(records: Sequence[Record]) -> Interval | None:
    answered = _answered(records)
    return _ratio([_decoded(record) for record in answered], [record.nfe for record in answered])


def _forwards(records: Sequence[Record]) -> Interval | None:
    answered = _answered(records)
    return _ratio([record.nfe for record in answered], [1] * len(answered))


def _rate(records: Sequence[Record]) -> Interval | None:
    batches = _batches(records)
    return _ratio([sum(map(_decoded, batch)) for batch in batches], [sum(record.seconds for record in batch) for batch in batches])


def _latency(records: Sequence[Record]) -> Interval | None:
    batches = _batches(records)
    return _ratio([sum(record.batch_seconds for record in batch) for batch in batches], [len(batch) for batch in batches])


def _perplexity(records: Sequence[Record]) -> Interval | None:
    losses = [record.extra.get("judge_loss", 0.0) for record in records]
    nats = _ratio(losses, [record.extra.get("judge_tokens", 0) for record in records])
    return None if nats is None else Interval(math.exp(min(700.0, nats.low)), math.exp(min(700.0, nats.high)))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


MEASURES: tuple[Measure, ...] = (
    Measure("accuracy", "accuracy", lambda s: s.accuracy, _share("correct"), percent, percent=True),
    Measure("steps_right", "steps right", lambda s: s.steps_right, _share("steps_right"), percent, percent=True),
    Measure("exact", "exact", lambda s: s.exact, _share("exact"), percent, percent=True),
    Measure("tokens_per_forward", "tokens/forward", lambda s: s.tokens_per_forward, _parallelism, lambda v: f"{v:.2f}"),
    Measure("nfe", "forwards", lambda s: s.nfe, _forwards, lambda v: f"{v:.1f}", more=False),
    Measure("tokens_per_second", "tokens/s", lambda s: s.tokens_per_second, _rate, lambda v: f"{v:,.1f}"),
    Measure("latency", "latency (s)", lambda s: s.latency, _latency, lambda v: f"{v:.3f}", more=False),
    Measure("diversity", "diversity", lambda s: s.diversity, lambda records: None, lambda v: f"{v:.3f}"),
    Measure("perplexity", "perplexity", lambda s: s.perplexity, _perplexity, lambda v: f"{v:.2f}", more=False),
)
"""The columns of a report, in order."""

TESTED = ("accuracy", "exact", "tokens_per_forward", "latency")
"""The columns that are tested against the baseline."""


def _intervals(row: Row, measures: Sequence[Measure]) -> dict[str, Interval]:
    present = {measure.key: measure.interval(row.records) for measure in measures if measure.value(row.summary) is not None}
    return {key: interval for key, interval in present.items() if interval is not None}


def _tests(rows: Sequence[Row], base: Row, kept: set[str]) -> dict[str, dict[str, Test]]:
    """Of each row but the baseline the tests of the kept columns, adjusted over all of them."""
    found = {row.name: {key: test for key, test in _against(row, base).items() if key in kept} for row in rows if row.name != base.name}
    places = [(name, key) for name, own in found.items() for key in own]
    adjusted = statistics.holm([found[name][key].p for name, key in places])
    for (name, key), value in zip(places, adjusted, strict=True):
        found[name][key] = replace(found[name][key], adjusted=value)
    return found


def _against(row: Row, base: Row) -> dict[str, Test]:
    theirs = {record.problem: record for record in base.records}
    pairs = [(record, theirs[record.problem]) for record in row.records]
    found = {}
    for key, name in (("accuracy", "correct"), ("exact", "exact")):
        one, other = ([bool(getattr(pair[side], name)) for pair in pairs] for side in (0, 1))
        found[key] = Test(statistics.paired(one, other), statistics.mcnemar(one, other))
    both = [pair for pair in pairs if pair[0].nfe > 0 and pair[1].nfe > 0]
    if both:
        one, other = ([_decoded(pair[side]) / pair[side].nfe for pair in both] for side in (0, 1))
        found["tokens_per_forward"] = _flipped(one, other)
    mine, others = _batches(row.records), _batches(base.records)
    by_problems = {frozenset(record.problem for record in batch): batch[0].batch_seconds for batch in others}
    keys = [frozenset(record.problem for record in batch) for batch in mine]
    if len(keys) > 1 and set(keys) == set(by_problems):  # the same problems together: else their clocks cannot be told apart
        one, other = [batch[0].batch_seconds for batch in mine], [by_problems[key] for key in keys]
        found["latency"] = _flipped(one, other, [len(key) for key in keys])
    return found


def _flipped(one: Sequence[float], other: Sequence[float], weights: Sequence[int] | None = None) -> Test:
    shares: Sequence[int] = weights or [1] * len(one)
    weighted = [(a - b) * weight for a, b, weight in zip(one, other, shares, strict=True)]
    return Test(statistics.paired(one, other, weights=weights), statistics.sign_flip(weighted))


def settings_columns(joined: Joined) -> dict[str, dict[str, Any]]:
    """Of each row what it is made of, flattened, with the fields that a study varies: the hyperparameters of a sweep."""
    from dllm_toolkit.evaluation.tensorboard import hyperparameters

    columns = {}
    for row in joined.rows:
        varied = {name: values[row.source.label] for name, values in joined.varied.items()}
        run = {"run": row.source.label} if len(joined.sources) > 1 else {}
        columns[row.name] = {**run, **varied, **hyperparameters(row.settings)}
    return columns
