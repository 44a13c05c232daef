"""Pictures of a ledger, drawn with matplotlib for TensorBoard and for the README: the Pareto figure and the commit order.

Colours are Okabe and Ito's, which stay apart under the common colour blindnesses; every configuration also has a number, so no
picture depends on colour alone. Figures are built without pyplot: no global state, no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.curves import Curve, pareto_front
from dllm_toolkit.evaluation.ledger import Header, Record, Summary
from dllm_toolkit.evaluation.order import order_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5F5F5F")
LIGHT = frozenset({"#56B4E9", "#E69F00"})  # too light for white print
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DECIDED, NOW, FINISHED, INK, FAINT = "#b9d6ea", "#0b4f7d", "#eef3f7", "#1b1f24", "#6d7680"


def plural(count: int, word: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def machine(header: Header) -> str:
    """What a ledger was measured on, for a line of text."""
    made_on = header.made_on
    threads = made_on.get("threads")
    parts = [made_on.get("device"), plural(threads, "thread") if isinstance(threads, int) else None, made_on.get("dtype")]
    return ", ".join(str(part) for part in parts if part is not None)


def pareto_figure(summaries: Sequence[Summary], *, legend: bool = True) -> Figure:
    """Accuracy against tokens per second (log) and against tokens per forward, with 95 % intervals; up and right is better.

    legend: names for the numbers; without it they stand in a table elsewhere.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = _figure(10.5, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    _pareto_axes(left, summaries, [s.tokens_per_second for s in summaries], "tokens per second (log scale)")
    _pareto_axes(right, summaries, [s.tokens_per_forward for s in summaries], "tokens per forward")
    if all(s.tokens_per_second > 0 for s in summaries):
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        left.xaxis.set_minor_locator(NullLocator())
    else:
        left.set_xlim(left=0)
    right.set_xlim(left=0)
    left.set_ylim(top=102)
    left.set_yticks([tick for tick in left.get_yticks() if left.get_ylim()[0] <= tick <= 100])
    left.set_ylabel("accuracy, %")
    if legend:
        handles = [_handle(index) for index in range(len(summaries))]
        names = [f"{index + 1}  {summary.name}" for index, summary in enumerate(summaries)]
        figure.legend(handles, names, loc="lower center", ncols=min(4, max(1, len(names))), frameon=False, fontsize=9, labelspacing=0.9)
    figure.tight_layout(rect=(0, 0.06 + 0.05 * ((len(summaries) - 1) // 4) if legend else 0, 1, 1))
    _badges(left, summaries, [s.tokens_per_second for s in summaries])
    _badges(right, summaries, [s.tokens_per_forward for s in summaries])
    return figure


def _pareto_axes(axes: Axes, summaries: Sequence[Summary], x: Sequence[float], label: str) -> None:
    front = pareto_front([(x[i], s.accuracy) for i, s in enumerate(summaries)])
    axes.plot(
        [x[i] for i in front],
        [100 * summaries[i].accuracy for i in front],
        color=FAINT,
        lw=1,
        ls="--",
        zorder=1,
    )
    for index, summary in enumerate(summaries):
        colour, y = PALETTE[index % len(PALETTE)], 100 * summary.accuracy
        axes.plot(
            [x[index]] * 2,
            [100 * summary.accuracy_low, 100 * summary.accuracy_high],
            color=colour,
            lw=1.6,
            alpha=0.6,
        )
        axes.scatter([x[index]], [y], s=42, color=colour, zorder=3)
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    _tidy(axes)


def sweep_figure(curves: Sequence[Curve], summaries: Sequence[Summary]) -> Figure:
    """Accuracy (left) and exact solutions (right) against tokens per forward, a line a curve; dashed: the front of all `summaries`."""
    figure = _figure(11, 5.2)
    panels = figure.subplots(1, 2, sharex=True)
    inside = {summary.name for curve in curves for summary in curve.summaries}
    for axes, what, label in zip(panels, ("accuracy", "exact"), ("accuracy, %", "exact solutions, %"), strict=True):
        points = [(summary.tokens_per_forward, 100 * getattr(summary, what)) for summary in summaries]
        front = [points[index] for index in pareto_front(points)]
        axes.plot([x for x, _ in front], [y for _, y in front], color=FAINT, lw=1, ls="--", zorder=1)
        for number, curve in enumerate(curves):
            placed = sorted((summary.tokens_per_forward, 100 * getattr(summary, what)) for summary in curve.summaries)
            axes.plot(
                [x for x, _ in placed],
                [y for _, y in placed],
                color=PALETTE[number % len(PALETTE)],
                marker=_MARKERS[number % len(_MARKERS)],
                ms=5.5,
                lw=1.4,
                label=curve.name,
            )
        alone = [(summary.name, point) for summary, point in zip(summaries, points, strict=True) if summary.name not in inside]
        for number, (name, (x, y)) in enumerate(alone):
            axes.scatter([x], [y], s=34, color=INK, marker="x", zorder=3)
            axes.annotate(name, (x, y), xytext=(4, 6 - 17 * (number % 2)), textcoords="offset points", fontsize=8, color=INK)
        low = min(y for _, y in points)
        axes.set_ylim(low - max(2.0, 0.08 * (100 - low)), 100 + max(0.5, 0.06 * (100 - low)))
        axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick < 100.001])
        axes.set_xlabel("tokens per forward")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        _tidy(axes)
    handles, names = panels[0].get_legend_handles_labels()
    columns = min(4, max(1, len(names)))
    if names:
        figure.legend(handles, names, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05 * -(-len(names) // columns) + 0.02, 1, 1))
    return figure


def _badges(axes: Axes, summaries: Sequence[Summary], x: Sequence[float]) -> None:
    """The number of each configuration on its point, or beside it where numbers would cover each other. Limits must be final."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    unit = figure.dpi / 72  # pixels a point
    places = axes.transData.transform([(x[i], 100 * s.accuracy) for i, s in enumerate(summaries)]) / unit
    edges = axes.get_window_extent()
    for index, high in enumerate(spread([(a, b) for a, b in places], 18, edges.y0 / unit + 9, edges.y1 / unit + 9)):
        colour = PALETTE[index % len(PALETTE)]
        axes.annotate(
            str(index + 1),
            (x[index], 100 * summaries[index].accuracy),
            xytext=(0, high - places[index][1]),
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK if colour in LIGHT else "white",
            fontsize=8,
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.4", "facecolor": colour, "edgecolor": "white", "linewidth": 0.8},
            zorder=4,
        )


def spread(places: Sequence[tuple[float, float]], gap: float, low: float, high: float) -> list[float]:
    """Heights for round labels of diameter `gap` at `places`, so that none covers another: the own height if it is free, else the
    nearest free one within low..high."""
    placed: list[tuple[float, float]] = []
    for across, own in places:
        tries = [own + sign * gap * move / 2 for move in range(2 * len(places) + 1) for sign in (1, -1)]
        free = (
            y
            for y in tries
            if (low <= y <= high or y == own) and all((across - a) ** 2 + (y - b) ** 2 >= (gap - 1e-6) ** 2 for a, b in placed)
        )
        placed.append((across, next(free, own)))
    return [y for _, y in placed]


def _handle(index: int) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", markersize=11, linestyle="", color=PALETTE[index % len(PALETTE)])


def order_figure(records: Sequence[Record]) -> Figure:
    """Commit order of one problem, a panel a configuration: across is the position in the answer, down is the step.

    White: still masked; dark: decided in this step; light: decided before; pale grey: the whole answer was done.
    """
    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure = _figure(3.3 * columns, 2.4 * rows + 0.3)
    for index, record in enumerate(records):
        axes = figure.add_subplot(rows, columns, index + 1)
        draw_order(axes, record)
        counts = f"{plural(record.tokens, 'token')}, {plural(record.nfe, 'forward')}"
        axes.set_title(f"{record.configuration}\n{counts}", fontsize=10, loc="left")
        axes.set_xlabel("position in the answer", fontsize=9)
        if index % columns == 0:
            axes.set_ylabel("step", fontsize=9)
    figure.tight_layout()
    return figure


def draw_order(axes: Axes, record: Record, steps: int | None = None) -> None:
    """The position x step heat map of one record on `axes`; `steps` rows high (None: as many as the record took)."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    born = np.asarray(record.born[: record.tokens])  # [T]
    height = steps or max(1, int(born.max(initial=0)) + 1)
    step = np.arange(height)[:, None]
    cells = np.where(born < 0, 0, np.where(step == born, 2, np.where(step > born, 1, 0)))  # [height, T]
    cells = np.where(step > born.max(initial=0), 3, cells)
    axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(["#ffffff", DECIDED, NOW, FINISHED]),
        vmin=0,
        vmax=3,
        origin="upper",
        extent=(-0.5, max(1, len(born)) - 0.5, height + 0.5, 0.5),  # steps count from 1, as in the text beside it
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.tick_params(colors=INK, labelsize=8, length=3)


def order_map_figure(records: Sequence[Record]) -> Figure:
    """When each token was decided, over the problems of one configuration: across is the position, down the problem, colour the step.

    White: nothing counts there, the answer had ended. Local and global AR-ness (order.py, k = 1) stand above it.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    counted = [record.born[: record.tokens] for record in records]
    width = max((len(born) for born in counted), default=1) or 1
    steps = np.full((max(1, len(counted)), width), np.nan)  # [problems, positions]
    for row, born in enumerate(counted):
        steps[row, : len(born)] = [step + 1 if step >= 0 else np.nan for step in born]
    figure = _figure(5.4, min(4.6, 2.3 + 0.1 * len(counted)))  # small: TensorBoard scales a picture down to a card
    axes = figure.add_subplot()
    colours = colormaps["viridis_r"].with_extremes(bad="white")
    highest = 1.0 if np.isnan(steps).all() else max(2.0, float(np.nanmax(steps)))
    image = axes.imshow(steps, aspect="auto", interpolation="nearest", cmap=colours, vmin=1, vmax=highest)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("decided in step", fontsize=9)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    local, whole = order_curves(counted, 1)
    name = records[0].configuration if records else ""
    numbers = f": local AR-ness {local[0]:.2f}, global {whole[0]:.2f}" if local else ""
    axes.set_title(f"{name}{numbers}", fontsize=10.5, loc="left", color=INK)
    axes.set_xlabel("position in the answer", fontsize=9)
    axes.set_ylabel("problem", fontsize=9)
    for each in (axes.xaxis, axes.yaxis):
        each.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for one in (axes, bar.ax):
        one.tick_params(colors=INK, labelsize=8, length=3)
    figure.tight_layout()
    return figure


def readme_figure(
    header: Header,
    records: Sequence[Record],
    summaries: Sequence[Summary],
    path: Path,
    *,
    bars: Sequence[str] = ("vanilla", "semi_ar", "fast_dllm", "autoregressive", "d2f"),
    order: Sequence[str] = ("autoregressive", "d2f"),
    labels: dict[str, str] | None = None,
) -> None:
    """The picture at the top of the README, to `path` (.png or .svg).

    Left: tokens per second of the `bars` configurations with accuracy and tokens per forward. Right: in which order the `order`
    configurations decided the same answer, on one scale of steps. `labels` renames configurations for readers.
    """
    known = {s.name: s for s in summaries}
    missing = [name for name in (*bars, *order) if name not in known]
    if missing:
        raise ToolkitError(f"the picture needs configurations the ledger has, got {missing}. Write some of {sorted(known)}.")
    rename = labels or {}
    figure = _figure(11.5, 4.4)
    grid = figure.add_gridspec(len(order), 2, width_ratios=(1.1, 1), hspace=0.75, wspace=0.16)
    _bars(figure.add_subplot(grid[:, 0]), [known[name] for name in bars], rename)
    shown = _typical(records, order)
    steps = max(max(record.born[: record.tokens]) for record in shown) + 1
    for row, record in enumerate(shown):
        axes = figure.add_subplot(grid[row, 1])
        draw_order(axes, record, steps)
        finish = max(record.born[: record.tokens]) + 1
        if finish < 0.75 * steps:
            middle = ((record.tokens - 1) / 2, (finish + steps + 1) / 2)
            axes.annotate("finished", middle, ha="center", va="center", fontsize=9.5, color=FAINT)
        name = rename.get(record.configuration, record.configuration)
        axes.set_title(f"{name}: {record.tokens} tokens in {record.nfe} forwards", fontsize=10.5, loc="left", color=INK)
        axes.set_ylabel("step", fontsize=9.5)
        if row == len(order) - 1:
            axes.set_xlabel("position in the answer\n(dark: decided in this step, light: before it)", fontsize=9.5)
    figure.text(
        0.995,
        0.012,
        f"{plural(len(records) // max(1, len(summaries)), 'problem')}, batch {header.batch_size}, {machine(header)}",
        ha="right",
        fontsize=8,
        color=FAINT,
    )
    figure.subplots_adjust(left=0.145, right=0.985, top=0.9, bottom=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=170)


def _bars(axes: Axes, rows: Sequence[Summary], rename: dict[str, str]) -> None:
    rates = [row.tokens_per_second for row in rows]
    best = max(rates)
    axes.barh(range(len(rows)), rates, color=[NOW if rate == best else "#9fb8c9" for rate in rates], height=0.62)
    for index, row in enumerate(rows):
        inside = rates[index] > 0.55 * best  # a label fits on one side of 0.4 to 0.6 of the longest bar
        axes.annotate(
            f"{rates[index]:,.0f} tokens/s\n{100 * row.accuracy:.0f} % right, {row.tokens_per_forward:.1f} tokens/forward",
            (rates[index], index),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
            color="white" if inside and rates[index] == best else INK,
        )
    axes.set_yticks(range(len(rows)), [rename.get(row.name, row.name) for row in rows], fontsize=10.5)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second", fontsize=9.5)
    axes.set_title("Speed and accuracy", fontsize=10.5, loc="left", color=INK)
    _tidy(axes)
    axes.grid(False, axis="y")


def _typical(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """The records of `names` on one problem: the one of median length, right for all of them if there is such a one."""
    by_problem: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.configuration in names:
            by_problem.setdefault(record.problem, {})[record.configuration] = record
    whole = [rows for rows in by_problem.values() if len(rows) == len(set(names))]
    right = [rows for rows in whole if all(record.correct for record in rows.values())] or whole
    right.sort(key=lambda rows: rows[names[-1]].tokens)
    chosen = right[len(right) // 2]
    return [chosen[name] for name in names]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.grid(True, color="#e7eaee", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3)
