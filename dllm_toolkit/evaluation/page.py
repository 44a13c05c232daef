"""One self-contained HTML page of a ledger: table, Pareto pictures, commit order, decoded answers side by side.

No script and nothing from the network: the page can be mailed and opened years later. Pictures are inline SVG in the page's own
colours, so it follows the reader's light or dark setting. Everything that came from a model or a recipe is escaped.
"""

import json
from collections.abc import Callable, Sequence
from html import escape
from math import log10

from dllm_toolkit.evaluation.ledger import Header, Record, Summary
from dllm_toolkit.evaluation.pictures import machine, pareto_front, plural, spread
from dllm_toolkit.evaluation.tensorboard import by_problem

_COLOURS = 7
_STEPS = 6  # shades of the decided tokens, early to late

STYLE = (
    """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d8dde3;--card:#f6f8fa;--decided:#cfe3f1;--now:#0b4f7d;--ok:#0a6b45;
--bad:#a33a00;--c0:#0072B2;--c1:#B84E00;--c2:#00795A;--c3:#A8497F;--c4:#1B7FB5;--c5:#8F6300;--c6:#5F5F5F;--n:#fff;
--s0:#fff2b3;--s1:#d8ecb0;--s2:#a9dcc0;--s3:#8fc4e0;--s4:#a9b4ea;--s5:#cfa9e0}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e6eaee;--soft:#9aa5b1;--line:#333a42;--card:#1c2127;--decided:#23455e;--now:#7cc7f5;
--ok:#5fd0a0;--bad:#ff9d66;--c0:#56B4E9;--c1:#F08A3C;--c2:#3CC79B;--c3:#E29BC4;--c4:#8FD0F5;--c5:#F0BE4A;--c6:#B5B5B5;--n:#14171b;
--s0:#5c5418;--s1:#41581f;--s2:#1f5a45;--s3:#1d4e70;--s4:#343f80;--s5:#5a3673}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1180px;padding:28px 20px 60px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}h1{font-size:1.5rem;margin:0 0 4px}h2{font-size:1.12rem;margin:34px 0 8px}
p,.meta{color:var(--soft);margin:4px 0 10px;max-width:80ch}.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th{font-weight:600;color:var(--soft)}
th:first-child,td:first-child{text-align:left}td.best{font-weight:700}small{color:var(--soft)}
.dot{display:inline-block;width:20px;height:20px;border-radius:50%;margin-right:8px;color:var(--n);text-align:center;font:700 11px/20px system-ui,sans-serif}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.card h3{font-size:.92rem;margin:0 0 8px}.card h3 small{display:block;font-weight:400;margin:3px 0 0 28px}.ok{color:var(--ok)}.bad{color:var(--bad)}.answer,pre{white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0}.answer span{border-radius:3px;padding:1px 0}
svg{width:100%;height:auto;display:block}svg path{shape-rendering:crispEdges}svg text{fill:var(--soft);font:12px system-ui,sans-serif}svg .n{fill:var(--n);font-weight:700;font-size:11px}
.key{display:inline-block;width:14px;height:14px;border-radius:3px;vertical-align:-2px}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft)}
"""
    + "".join(f".b{i}{{background:var(--c{i})}}.f{i}{{fill:var(--c{i});stroke:var(--c{i})}}" for i in range(_COLOURS))
    + "".join(f".s{i}{{background:var(--s{i})}}" for i in range(_STEPS))
)

Column = tuple[str, Callable[[Summary], float | None], Callable[[float], str], bool]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


COLUMNS: tuple[Column, ...] = (
    ("accuracy", lambda s: s.accuracy, _percent, True),
    ("steps right", lambda s: s.steps_right, _percent, True),
    ("exact", lambda s: s.exact, _percent, True),
    ("tokens/s", lambda s: s.tokens_per_second, lambda v: f"{v:,.1f}", True),
    ("tokens/forward", lambda s: s.tokens_per_forward, lambda v: f"{v:.2f}", True),
    ("forwards", lambda s: s.nfe, lambda v: f"{v:.1f}", False),
    ("latency, s", lambda s: s.latency, lambda v: f"{v:.3f}", False),
    ("× vanilla", lambda s: s.speedup_vs_vanilla, _times, True),
    ("× AR", lambda s: s.speedup_vs_ar, _times, True),
)
"""Title, value, text, and whether more is better: what the terminal's and the page's tables show."""


def page(header: Header, records: Sequence[Record], summaries: Sequence[Summary], *, problems: int = 3) -> str:
    """The page as text; `problems` answers are shown side by side, those on which configurations disagree first."""
    numbers = {summary.name: index for index, summary in enumerate(summaries)}
    shown = sorted(by_problem(records), key=lambda group: len({record.correct for record in group}) == 1)[:problems]
    recipe = escape(json.dumps(header.recipe, indent=2, ensure_ascii=False, default=str))
    made = ", ".join(f"{key} {value}" for key, value in header.versions.items())
    problems_each = plural(max((s.problems for s in summaries), default=0), "problem")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>dllm_toolkit comparison</title><style>{STYLE}</style></head><body>
<h1>Comparison of {plural(len(summaries), "decoding configuration")}</h1>
<p class="meta">{problems_each} each, batch {header.batch_size}, {escape(machine(header))}. {escape(made)}.
Recipe {escape(header.recipe_hash)}, {escape(header.date)}{escape(f", commit {header.commit}" if header.commit else "")}.</p>
<div class="wide">{_table(summaries)}</div>
<h2>Accuracy against speed</h2><p>Up and to the right is better. Bars are 95 % intervals; the dashed line joins the configurations that no other beats in both.
The small dots are the exact places; a number that would cover another is moved up or down.</p>
<div class="grid" style="grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))">
<div class="card">{pareto_picture(summaries, [s.tokens_per_second for s in summaries], "tokens per second (log scale)", logarithmic=True)}</div>
<div class="card">{pareto_picture(summaries, [s.tokens_per_forward for s in summaries], "tokens per forward", logarithmic=False)}</div></div>
<h2>In which order were the tokens decided?</h2>
<p>Across: position in the answer. Down: step. <i class="key" style="background:var(--now)"></i> decided in this step;
<i class="key" style="background:var(--decided)"></i> decided before; empty: still masked. Each picture has its own scale of steps.</p>
<div class="grid">{"".join(_order_card(record, numbers) for record in (shown[0] if shown else []))}</div>
<h2>Answers side by side</h2><p>Colours run from the first tokens decided
({"".join(f'<span class="s{i}">&nbsp;&nbsp;&nbsp;</span>' for i in range(_STEPS))}) to the last, each answer on its own scale.</p>
{"".join(_problem(group, numbers) for group in shown)}
<h2>How it was counted</h2><ul>{"".join(f"<li>{escape(rule)}</li>" for rule in (*header.counting, *header.notes))}</ul>
<details><summary>The resolved recipe</summary><pre class="card">{recipe}</pre></details>
</body></html>
"""


def _table(summaries: Sequence[Summary]) -> str:
    best = {}
    for title, value, _, more in COLUMNS:
        present = [v for s in summaries if (v := value(s)) is not None]
        # Where all are equal there is no best.
        best[title] = (max if more else min)(present) if len(set(present)) > 1 else None
    rows = []
    for index, summary in enumerate(summaries):
        cells = [f"<td>{dot(index)}{escape(summary.name)}</td>"]
        for title, value, text, _ in COLUMNS:
            v = value(summary)
            note = f" <small>{100 * summary.accuracy_low:.0f}–{100 * summary.accuracy_high:.0f}</small>" if title == "accuracy" else ""
            mark = ' class="best"' if v is not None and v == best[title] else ""
            cells.append(f"<td{mark}>{'–' if v is None else text(v)}{note}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(title)}</th>" for title in ("configuration", *(column[0] for column in COLUMNS)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def dot(index: int) -> str:
    """The number of a row in its colour."""
    return f'<span class="dot b{index % _COLOURS}">{index + 1}</span>'


def pareto_picture(
    summaries: Sequence[Summary], x: Sequence[float], label: str, *, logarithmic: bool, curves: Sequence[Sequence[int]] = ()
) -> str:
    """Accuracy against `x` as inline SVG. curves: indices of the summaries that a line joins, from left to right."""
    width, height, left, right, top, bottom = 520, 320, 48, 22, 20, 46
    if not summaries or (logarithmic and min(x) <= 0):
        return f"<p>No {escape(label)} to draw.</p>"
    scaled = [log10(v) for v in x] if logarithmic else list(x)
    low_x, high_x = (min(scaled), max(scaled)) if logarithmic else (0.0, max(scaled))
    margin = 0.08 * ((high_x - low_x) or 1.0)
    low_x, high_x = low_x - margin if logarithmic else low_x, high_x + margin
    low_y, high_y = max(0.0, min(s.accuracy_low for s in summaries) - 0.03), 1.02

    def place(u: float, v: float) -> tuple[float, float]:
        across = left + (u - low_x) / (high_x - low_x) * (width - left - right)
        return across, height - bottom - (v - low_y) / (high_y - low_y) * (height - top - bottom)

    parts = []
    for tick in _ticks(100 * low_y, 100):
        _, y = place(low_x, tick / 100)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g} %</text>')
    marks = _log_ticks(low_x, high_x) if logarithmic else _ticks(low_x, high_x)
    for tick in marks:
        across, _ = place(log10(tick) if logarithmic else tick, low_y)
        parts.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{top}" y2="{height - bottom}" stroke="var(--line)"/>')
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:,g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{escape(label)}</text>')
    front = [place(scaled[i], summaries[i].accuracy) for i in pareto_front([(x[i], s.accuracy) for i, s in enumerate(summaries)])]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--soft)" stroke-dasharray="5 4"/>')
    for curve in curves:
        joints = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(scaled[i], summaries[i].accuracy) for i in curve))
        parts.append(f'<polyline points="{joints}" fill="none" stroke="var(--c{curve[0] % _COLOURS})" stroke-width="1.5" opacity=".7"/>')
    lines, dots, parts = parts, [], []  # drawn in this order: no dot hides a number
    places = [place(scaled[index], summary.accuracy) for index, summary in enumerate(summaries)]
    badges = spread([(a, -b) for a, b in places], 22, bottom - height + 11, -6)  # heights, which grow upwards
    for index, summary in enumerate(summaries):
        across, y = places[index]
        badge = -badges[index]
        _, upper = place(0, summary.accuracy_high)
        _, lower = place(0, summary.accuracy_low)
        title = escape(f"{summary.name}: {_percent(summary.accuracy)}, {x[index]:,.2f} {label}")
        dots.append(
            f'<g class="f{index % _COLOURS}"><title>{title}</title><line x1="{across:.1f}" x2="{across:.1f}" y1="{upper:.1f}" y2="{lower:.1f}" '
            f'stroke-width="2" opacity=".55"/><circle cx="{across:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
        parts.append(
            f'<g class="f{index % _COLOURS}"><title>{title}</title><circle cx="{across:.1f}" cy="{badge:.1f}" r="10"/></g>'
            f'<text class="n" x="{across:.1f}" y="{badge + 4:.1f}" text-anchor="middle">{index + 1}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="accuracy against {escape(label)}">{"".join(lines + dots + parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or 1.0
    step = next(
        (unit * 10**power for power in range(-3, 7) for unit in (1, 2, 5) if span / (unit * 10**power) <= 6),
        span,
    )
    return [step * index for index in range(int(-(-low // step)), int(high // step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    for units in ((1, 2, 5), (1, 3), (1,)):
        ticks = [unit * 10.0**power for power in range(int(low) - 1, int(high) + 2) for unit in units]
        ticks = [tick for tick in ticks if low <= log10(tick) <= high]
        if len(ticks) <= 7:
            break
    return ticks


def _runs(born: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first position, length, step) of neighbours that were decided in one step; what was never decided is left out."""
    runs: list[tuple[int, int, int]] = []
    for index, step in enumerate(born):
        if runs and runs[-1][2] == step:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, step)
        else:
            runs.append((index, 1, step))
    return [run for run in runs if run[2] >= 0]


def _order_card(record: Record, numbers: dict[str, int]) -> str:
    born = record.born[: record.tokens]
    steps, count = max(born, default=0) + 1, max(1, len(born))
    width, height, left, bottom = 330.0, 150.0, 30.0, 18.0
    cell, high = (width - left) / count, (height - bottom) / steps
    parts = [f'<rect x="{left}" y="0" width="{width - left}" height="{height - bottom}" fill="var(--page)"/>']
    # One path a shade: separate rectangles would show seams.
    decided, now = [], []
    for first, length, step in _runs(born):
        start, stop = f"{left + first * cell:.2f}", f"{left + (first + length) * cell:.2f}"
        decided.append(f"M{start} {step * high:.2f}H{stop}V{height - bottom}H{start}z")
        now.append(f"M{start} {step * high:.2f}H{stop}v{max(high, 1.5):.2f}H{start}z")
    parts.append(f'<path d="{"".join(decided)}" fill="var(--decided)"/><path d="{"".join(now)}" fill="var(--now)"/>')
    parts.append(
        f'<text x="{left - 5}" y="11" text-anchor="end">1</text><text x="{left - 5}" y="{height - bottom:.0f}" text-anchor="end">{steps}</text>'
    )
    parts.append(
        f'<text x="{left}" y="{height - 3:.0f}">0</text><text x="{width}" y="{height - 3:.0f}" text-anchor="end">{count - 1}</text>'
    )
    label = escape(f"commit order of {record.configuration}")
    return (
        f'<div class="card"><h3>{dot(numbers[record.configuration])}{escape(record.configuration)} <small>'
        f"{plural(record.tokens, 'token')}, {plural(record.nfe, 'forward')}, {plural(record.steps, 'step')}</small></h3>"
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg></div>'
    )


def _problem(group: Sequence[Record], numbers: dict[str, int]) -> str:
    cards = "".join(_answer(record, numbers) for record in group)
    first = group[0]
    return (
        f'<h3>{escape(first.problem)}</h3><pre class="card">{escape(first.prompt.strip())}</pre>'
        f'<details><summary>reference</summary><pre class="card">{escape(first.reference)}</pre></details>'
        f'<div class="grid" style="margin-top:12px">{cards}</div>'
    )


def _answer(record: Record, numbers: dict[str, int]) -> str:
    last = max((step for step in record.born[: record.tokens]), default=0)
    spans = []
    for piece, step in zip(record.pieces, record.born, strict=False):
        shade = min(_STEPS - 1, max(0, step) * _STEPS // (last + 1))
        title = "fill" if step < 0 else f"step {step + 1}"
        spans.append(f'<span class="s{shade}" title="{title}">{escape(piece)}</span>')
    verdict = '<span class="ok">✓ right</span>' if record.correct else '<span class="bad">✗ wrong</span>'
    return (
        f'<div class="card"><h3>{dot(numbers[record.configuration])}{escape(record.configuration)} {verdict} <small>'
        f"{plural(record.tokens, 'token')}, {plural(record.nfe, 'forward')}, {1000 * record.seconds:.0f} ms</small></h3>"
        f'<div class="answer">{"".join(spans)}</div></div>'
    )
