"""A joined report as text: for the terminal, as Markdown, CSV and JSON.

Terminal, Markdown and the page show the same sheets. CSV and JSON hold every number in full: CSV a line a configuration, JSON also where
the runs come from, the curves with their points, and what was left out.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dllm_toolkit.evaluation.curves import ALPHA, DROP
from dllm_toolkit.evaluation.joined import MEASURES, TESTED, Joined, Measure, Test, percent
from dllm_toolkit.evaluation.pictures import machine, plural
from dllm_toolkit.evaluation.runs import Row
from dllm_toolkit.evaluation.statistics import RESAMPLES

LEVEL = 0.05
FRONTS = ("tokens_per_forward", "tokens_per_second")


@dataclass(frozen=True)
class Cell:
    """A value, what stands beside it in small, and whether it stands out."""

    text: str
    small: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table with a title; `below` explains it. The first `left` columns are words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    below: str = ""
    left: int = 1


def sheets(joined: Joined) -> list[Sheet]:
    """The tables of a report: results, tests, curves, runs; empty ones are left out."""
    made = [_results(joined), _tests(joined), _curves(joined), _runs(joined)]
    return [sheet for sheet in made if sheet.rows]


def remarks(joined: Joined) -> list[str]:
    """What was left out, and what a reader must know."""
    titles = {measure.key: measure.title for measure in MEASURES}
    reasons: dict[str, list[str]] = {}
    for key, reason in joined.dropped.items():
        reasons.setdefault(reason, []).append(titles[key])
    return [*(f"left out, counted differently: {', '.join(names)} ({why})" for why, names in reasons.items()), *joined.notes]


def _results(joined: Joined) -> Sheet:
    measures, fronts = joined.measures, {key: joined.front(key) for key in FRONTS}
    speed_up = "tokens_per_second" not in joined.dropped and len(joined.rows) > 1
    rows = []
    for row in joined.rows:
        cells = [Cell(row.name), *(Cell(values[row.source.label]) for values in joined.varied.values()), Cell(str(row.summary.problems))]
        cells += [_value(joined, row, measure, row.name in fronts.get(measure.key, ())) for measure in measures]
        if speed_up:
            times = joined.speed_up(row)
            cells.append(Cell("-" if times is None else f"{times:.2f}"))
        rows.append(tuple(cells))
    head = ("configuration", *joined.varied, "problems", *(measure.title for measure in measures), *(("speed-up",) if speed_up else ()))
    below = f"Small: 95 % intervals, percentile bootstrap over the problems, {RESAMPLES} resamples; bold: best."
    if any(fronts.values()):
        below += " *: no other row is better in both accuracy and this."
    if speed_up:
        below += f" Speed-up: tokens per second over those of {joined.baseline.name}."
    return Sheet(_title(joined), head, tuple(rows), below, 1 + len(joined.varied))


def _title(joined: Joined) -> str:
    machines = dict.fromkeys(machine(source.header) for source in joined.sources)
    return f"{plural(len(joined.rows), 'configuration')}, {plural(joined.problems, 'problem')}, {'; '.join(machines)}"


def _value(joined: Joined, row: Row, measure: Measure, front: bool) -> Cell:
    value = measure.value(row.summary)
    if value is None:
        return Cell("-")
    present = [other for one in joined.rows if (other := measure.value(one.summary)) is not None]
    best = len(set(present)) > 1 and value == (max if measure.more else min)(present)
    interval = joined.intervals[row.name].get(measure.key)
    small = "" if interval is None else f"{_short(measure, interval.low)}–{_short(measure, interval.high)}"
    return Cell(measure.text(value) + ("*" if front else ""), small, best)


def _short(measure: Measure, value: float) -> str:
    return f"{100 * value:.1f}" if measure.percent else measure.text(value)


def _tests(joined: Joined) -> Sheet:
    keys = [key for key in TESTED if any(key in own for own in joined.tests.values())]
    measures = {measure.key: measure for measure in MEASURES}
    rows = [
        (Cell(name), *(_test(measures[key], own[key]) if key in own else Cell("-") for key in keys)) for name, own in joined.tests.items()
    ]
    flips = [
        words for key, words in (("tokens_per_forward", "tokens per forward (mean over problems)"), ("latency", "latency")) if key in keys
    ]
    below = "Differences on the same problems, 95 % bootstrap intervals in brackets. p: exact McNemar for accuracy and exact"
    below += f", sign flips for {' and '.join(flips)}" if flips else ""
    below += f"; Holm's correction over the table, {plural(sum(map(len, joined.tests.values())), 'test')}; bold: p at most {LEVEL}."
    if "latency" in keys:
        below += " Rows were timed one after the other: a test of latency cannot see a machine whose speed drifts."
    return Sheet(f"Against {joined.baseline.name}", ("configuration", *(measures[key].title for key in keys)), tuple(rows), below)


def _test(measure: Measure, test: Test) -> Cell:
    scale, digits = (100, 1) if measure.percent else (1, 3 if measure.key == "latency" else 2)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (test.difference.mean, test.difference.low, test.difference.high))
    unit = " points" if measure.percent else ""
    return Cell(f"{mean}{unit} [{low}, {high}]", probability(test.adjusted), test.adjusted <= LEVEL)


def probability(p: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"


def _curves(joined: Joined) -> Sheet:
    rows = []
    for area in joined.areas:
        placed = sorted(zip(area.curve.settings, area.curve.summaries, strict=True), key=lambda item: item[1].tokens_per_forward)
        points = "; ".join(f"{setting}: {one.tokens_per_forward:.2f}, {percent(one.accuracy)}" for setting, one in placed)
        rows.append((Cell(area.curve.name), Cell(points), Cell(f"{area.accuracy:.1f}"), Cell(f"{area.exact:.1f}")))
    best = joined.areas[0] if joined.areas else None
    below = (
        "A point is tokens per forward and accuracy. AUP, area under parallelism (d3LLM, arXiv 2601.07568): "
        f"alpha {ALPHA:g}, points more than {DROP:g} below a curve's first one left out, y_max the best of these rows: "
        f"{best.best_accuracy:.1f} % accuracy, {best.best_exact:.1f} % exact. With other rows beside them the areas are others."
        if best
        else ""
    )
    return Sheet("Curves", ("curve", "points", "AUP, accuracy", "AUP, exact"), tuple(rows), below, 2)


def _runs(joined: Joined) -> Sheet:
    rows = []
    for source in joined.sources:
        header = source.header
        words = (str(source.path), header.recipe_hash, header.commit or "-", header.date or "-", machine(header), str(header.batch_size))
        rows.append(tuple(Cell(word) for word in (source.label, *words)))
    head = ("run", "ledger", "recipe", "commit", "date", "machine", "batch")
    return Sheet("Runs", head, tuple(rows), left=len(head))


def print_terminal(joined: Joined, stream: Any, width: int | None = None) -> None:
    """Tables for a terminal; names are folded where there is no room, and columns that do not fit come in a table below.

    width: in characters; None: the terminal's, and 140 where `stream` is none.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, width=width)
    if not console.is_terminal and width is None:
        console = Console(file=stream, width=140)
    boundless = console.options.update(max_width=100_000)  # a width that limits nothing, to ask how much a table needs
    for sheet in sheets(joined):
        parts: list[list[int]] = [[]]
        for index in range(sheet.left, len(sheet.head)):
            if parts[-1] and console.measure(_table(sheet, [*parts[-1], index]), options=boundless).minimum > console.width:
                parts.append([])
            parts[-1].append(index)
        for number, columns in enumerate(parts, 1):
            console.print(_table(sheet, columns, "" if len(parts) == 1 else f" ({number} of {len(parts)})"))
        if sheet.below:
            console.print(Text(sheet.below, style="dim"))
        console.print()
    for remark in remarks(joined):
        console.print(Text(f"note: {remark}"))


def _table(sheet: Sheet, columns: Sequence[int], note: str = "") -> Any:
    """Its words and some of its columns of numbers, which are never cut or wrapped."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=escape(sheet.title + note), title_justify="left", title_style="bold", show_edge=False)
    shown = [*range(sheet.left), *columns]
    for index in shown:
        title = sheet.head[index]
        if index < sheet.left:
            longest = max(len(title), *(len(row[index].text) for row in sheet.rows))
            table.add_column(escape(title), overflow="fold", min_width=min(longest, 24 if index == 0 else len(title)))
        else:
            broken = title.replace("/f", "/\nf").replace(" ", "\n", 1)
            lines = [line for row in sheet.rows for line in _stacked(row[index]).splitlines()]
            table.add_column(escape(broken), justify="right", no_wrap=True, min_width=max(map(len, [*lines, *broken.splitlines()])))
    for row in sheet.rows:
        table.add_row(*(Text(_stacked(row[index]), style="bold" if row[index].strong else "") for index in shown))
    return table


def _stacked(cell: Cell) -> str:
    return f"{cell.text}\n{cell.small}" if cell.small else cell.text


def markdown(joined: Joined) -> str:
    """Tables for a README or a paper's appendix."""
    parts = []
    for sheet in sheets(joined):
        rule = ["---" if index < sheet.left else "---:" for index in range(len(sheet.head))]
        lines = [sheet.head, rule, *(tuple(_marked(cell) for cell in row) for row in sheet.rows)]
        body = "\n".join(f"| {' | '.join(word.replace('|', '&#124;') for word in line)} |" for line in lines)
        parts += [f"**{sheet.title}**", body, *([sheet.below.replace("*:", "\\*:")] if sheet.below else [])]
    parts += ["\n".join(f"- {remark}" for remark in remarks(joined))] if remarks(joined) else []
    counting = dict.fromkeys(rule for source in joined.sources for rule in source.header.counting)
    parts.append("How it was counted: " + "; ".join(counting) + ".")
    return "\n\n".join(parts) + "\n"


def _marked(cell: Cell) -> str:
    text = cell.text.replace("*", "\\*")
    text = f"**{text}**" if cell.strong else text
    return f"{text} ({cell.small})" if cell.small else text


def csv_text(joined: Joined) -> str:
    """A line a configuration; numbers in full, shares in 0..1, times in seconds."""
    lines = [_line(joined, row) for row in joined.rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _line(joined: Joined, row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"name": row.name, "run": row.source.label, "configuration": row.configuration}
    line |= {name: values[row.source.label] for name, values in joined.varied.items()}
    line |= {"problems": row.summary.problems, "baseline": joined.baseline.name}
    for measure in joined.measures:
        interval = joined.intervals[row.name].get(measure.key)
        line[measure.key] = measure.value(row.summary)
        line |= {f"{measure.key}_{end}": None if interval is None else getattr(interval, end) for end in ("low", "high")}
    for key in FRONTS:
        if key not in joined.dropped:
            line[f"on_front_{key}"] = row.name in joined.front(key)
    if "tokens_per_second" not in joined.dropped:
        line["speed_up"] = joined.speed_up(row)
    for key in (key for key in TESTED if key not in joined.dropped):
        test = joined.tests.get(row.name, {}).get(key)
        line[f"{key}_difference"] = None if test is None else test.difference.mean
        line |= {f"{key}_difference_{end}": None if test is None else getattr(test.difference, end) for end in ("low", "high")}
        line |= {f"{key}_p": None if test is None else test.p, f"{key}_p_holm": None if test is None else test.adjusted}
    return line


def json_text(joined: Joined) -> str:
    """Everything, for programs."""
    content = {
        "baseline": joined.baseline.name,
        "problems": joined.problems,
        "rows": [{**_line(joined, row), "settings": dict(row.settings)} for row in joined.rows],
        "tests": {"correction": "Holm", "count": sum(map(len, joined.tests.values()))},
        "intervals": {"level": 0.95, "method": "percentile bootstrap", "resamples": RESAMPLES},
        "fronts": {key: joined.front(key) for key in FRONTS if key not in joined.dropped},
        "curves": [
            {
                "name": area.curve.name,
                "points": [
                    {"setting": setting, "name": one.name, "tokens_per_forward": one.tokens_per_forward, "accuracy": one.accuracy}
                    for setting, one in zip(area.curve.settings, area.curve.summaries, strict=True)
                ],
                "aup": {"accuracy": area.accuracy, "exact": area.exact, "alpha": ALPHA, "drop": DROP},
                "best": {"accuracy": area.best_accuracy, "exact": area.best_exact},
            }
            for area in joined.areas
        ],
        "left_out": dict(joined.dropped),
        "varied": {name: dict(values) for name, values in joined.varied.items()},
        "notes": list(joined.notes),
        "runs": [
            {
                "label": source.label,
                "ledger": str(source.path),
                "recipe": source.header.recipe_hash,
                "made_of": dict(source.header.made_of),
                "made_on": dict(source.header.made_on),
                "versions": dict(source.header.versions),
                "commit": source.header.commit,
                "date": source.header.date,
                "batch_size": source.header.batch_size,
            }
            for source in joined.sources
        ],
        "counting": list(dict.fromkeys(rule for source in joined.sources for rule in source.header.counting)),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
