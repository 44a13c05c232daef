"""Draw docs/speed.png from what the benchmarks kept in benchmarks/results: how fast, how wide, how many rows, and what a step costs.

    python benchmarks/decode_speed.py --save             on a GPU;  with --weights fp8 or int8 beside it
    python benchmarks/engine_overhead.py --save
    python docs/speed.py                                 or: python docs/speed.py DIRECTORY PICTURE

A result that is not there leaves its part of the picture out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
INK, FAINT = "#1b1f24", "#6d7680"
# In order of darkness, so the picture survives a grey printer.
COLOURS = ("#0b4f7d", "#a9cbe2", "#f3c98b")
COSTS = {"plan": "#0b4f7d", "pack": "#a9cbe2", "decide": "#f3c98b", "rest": "#e3e8ec"}
Result = dict[str, Any]


def results(directory: Path, name: str) -> list[Result]:
    """What a benchmark kept: its plain run first, then its variants."""
    paths = [directory / f"{name}.json", *sorted(directory.glob(f"{name}-*.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def powers(axes: Axes, values: list[int]) -> None:
    """An axis of powers of two that names what was measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def generations(axes: Axes, found: list[Result]) -> None:
    """Bars: tokens a second of whole generations, by decoder and cache; a mark where the weights' time alone would put it."""
    names = [name for name, one in found[0]["decode"].items() if "failed" not in one]
    height = 0.8 / len(found)
    for number, result in enumerate(found):
        for place, name in enumerate(names):
            one = result["decode"].get(name, {})
            if "tokens_per_second" not in one:
                continue
            where = place - 0.4 + (number + 0.5) * height
            axes.barh(where, one["tokens_per_second"], height * 0.9, color=COLOURS[number], label=result["weights"] if place == 0 else None)
            inside = {"color": "white", "ha": "right"} if number == 0 else {"color": INK}  # a mark may stand right behind the bar
            axes.text(one["tokens_per_second"], where, f" {one['tokens_per_second']:.0f} ", va="center", fontsize=8, **inside)
            bound = one["tokens_per_forward"] * 1e3 / result["floor_ms"]
            axes.plot([bound, bound], [where - height * 0.45, where + height * 0.45], color=INK, lw=1.2)
    axes.plot([], [], color=INK, lw=1.2, label="weights read once a forward")
    axes.set_yticks(range(len(names)), [name.replace(", ", " + ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second, one row", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "Whole generations")


def forwards(axes: Axes, found: list[Result]) -> None:
    """Milliseconds of a forward by its lanes, its matrix products alone, and the weights' time through the memory."""
    seen: set[int] = set()
    for number, result in enumerate(found):
        whole: dict[int, float] = {}
        alone: dict[int, float] = {}
        for one in result["decode"].values():
            graphs = one.get("graphs_ms", {"forward": {}, "products": {}})
            for name, milliseconds in graphs["forward"].items():
                lanes = int(name.split(",")[0])
                whole[lanes] = min(milliseconds, whole.get(lanes, milliseconds))  # of several numbers of reads
                if name in graphs.get("products", {}):  # of exact weights only
                    alone[lanes] = min(graphs["products"][name], alone.get(lanes, graphs["products"][name]))
        lanes = sorted(whole)
        seen |= set(lanes)
        axes.plot(lanes, [whole[one] for one in lanes], "o-", color=COLOURS[number], ms=4, label=f"{result['weights']}, forward")
        if alone:
            label = f"{result['weights']}, products alone"
            axes.plot(sorted(alone), [alone[one] for one in sorted(alone)], "o:", color=COLOURS[number], ms=3, label=label)
        axes.axhline(result["floor_ms"], color=COLOURS[number], lw=0.8, ls=(0, (6, 4)))
    powers(axes, sorted(seen))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("lanes; dashed: the weights, read once", fontsize=9, color=INK)
    axes.set_ylabel("ms", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "One forward")


def batches(axes: Axes, found: list[Result]) -> None:
    """Tokens a second by number of rows, waiting for the slowest row and with finished rows refilled."""
    seen: set[int] = set()
    for number, result in enumerate(found):
        for refill in (False, True):
            points = sorted((one["rows"], one["tokens_per_second"]) for one in result["batch"] if one.get("refill") == refill)
            seen |= {rows for rows, _ in points}
            label = f"{result['weights']}, {'finished rows refilled' if refill else 'batches'}"
            axes.plot(*zip(*points, strict=True), "o-" if refill else "o:", color=COLOURS[number], ms=4, label=label)
    powers(axes, sorted(seen))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("rows, with requests of unequal length", fontsize=9, color=INK)
    axes.set_ylabel("tokens a second", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "D2F by number of rows")


def overhead(axes: Axes, found: list[Result]) -> None:
    """Stacked bars: microseconds of a step beside the forward, without compilation, one row, first cache of each decoder."""
    rows: dict[str, Result] = {}
    for row in found[0]["rows"]:
        if row["rows"] == min(found[0]["settings"]["rows"]) and "failed" not in row:
            rows.setdefault(row["decoder"], row)
    for place, row in enumerate(rows.values()):
        left = 0.0
        for name, colour in COSTS.items():
            axes.barh(place, row[name], 0.7, left=left, color=colour, label=name if place == 0 else None)
            left += row[name]
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    # A decoder that verifies drafts may take ten times as long; the others are what the axis is for.
    whole = [sum(row[name] for name in COSTS) for row in rows.values()]
    most = 4 * sorted(whole)[len(whole) // 2]
    if max(whole) > most:
        axes.set_xlim(0, most)
        for place, total in enumerate(whole):
            if total > most:
                axes.text(most, place, f"{total:,.0f}  ", va="center", ha="right", fontsize=8, color=INK)
    axes.set_xlabel("microseconds a step on a CPU, without compilation", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, f"Beside the forward ({found[0]['device']})")


def panels(directory: Path) -> list[Callable[[Axes], None]]:
    """The parts of the picture that there are numbers for."""
    found: list[Callable[[Axes], None]] = []
    speed = [one for one in results(directory, "decode_speed") if one["decode"]][: len(COLOURS)]
    if speed:
        found.append(lambda axes: generations(axes, speed))
    wide = [one for one in speed if any("graphs_ms" in single for single in one["decode"].values())]
    if wide:
        found.append(lambda axes: forwards(axes, wide))
    many = [one for one in speed if sum("tokens_per_second" in row for row in one["batch"]) > 2]
    if many:
        found.append(lambda axes: batches(axes, many))
    if cost := results(directory, "engine_overhead"):
        found.append(lambda axes: overhead(axes, cost))
    return found


def main(directory: Path = RESULTS, picture: Path = HERE / "speed.png") -> None:
    parts = panels(directory)
    if not parts:
        raise SystemExit(f"no results to draw in {directory}. Write: python benchmarks/decode_speed.py --save")
    lines = -(-len(parts) // 2)
    figure = Figure(figsize=(11, 3.7 * lines + 0.4), facecolor="white")
    FigureCanvasAgg(figure)
    for number, draw in enumerate(parts, 1):
        draw(figure.add_subplot(lines, min(2, len(parts)), number))
    speed = results(directory, "decode_speed")
    if speed:
        shape = speed[0]["shape"]
        said = f"{speed[0]['device']}, torch {speed[0]['versions']['torch']}: {shape['layers']} layers of width {shape['width']}, "
        said += f"prompt {shape['prompt']}, {shape['new_tokens']} new tokens, {shape['accept']} accepted a forward"
        figure.text(0.01, 0.005, said, fontsize=8, color=FAINT)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(picture, dpi=150, metadata={"Software": None})
    print(picture)


if __name__ == "__main__":
    main(*(Path(one) for one in sys.argv[1:3]))
