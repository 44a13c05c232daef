"""A joined report as one self-contained HTML page: tables, Pareto pictures, sweeps as lines, where the runs come from.

No script and nothing from the network, as on the page of a single run, whose looks it shares. Whatever came from a ledger is escaped.
"""

import json
from collections.abc import Sequence
from html import escape

from dllm_toolkit.evaluation.joined import Joined
from dllm_toolkit.evaluation.joined_text import Cell, Sheet, remarks, sheets
from dllm_toolkit.evaluation.page import STYLE, dot, pareto_picture
from dllm_toolkit.evaluation.pictures import plural

_MORE = """
td.words,th.words{text-align:left;white-space:normal;overflow-wrap:anywhere}
td small{display:block}td.best{font-weight:700}td.best small{font-weight:400}
th.words{white-space:nowrap}
.name{display:flex;align-items:flex-start;min-width:11.5em}.name .dot{flex:none}ul{color:var(--soft);max-width:100ch}
"""


def page(joined: Joined) -> str:
    """The page as text."""
    numbers = {row.name: index for index, row in enumerate(joined.rows)}
    parts = []
    for index, sheet in enumerate(sheets(joined)):
        parts.append(f"<h2>{escape(sheet.title)}</h2><div class='wide'>{_table(sheet, numbers)}</div><p>{escape(sheet.below)}</p>")
        if index == 0:
            parts.append(_pictures(joined))
    said = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(joined))
    counting = dict.fromkeys(rule for source in joined.sources for rule in source.header.counting)
    recipes = "".join(
        f'<details><summary>The resolved recipe of {escape(source.label)}</summary><pre class="card">'
        f"{escape(json.dumps(source.header.recipe, indent=2, ensure_ascii=False, default=str))}</pre></details>"
        for source in joined.sources
    )
    title = f"{plural(len(joined.rows), 'configuration')} of {plural(len(joined.sources), 'run')}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>dllm_toolkit report</title><style>{STYLE}{_MORE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="meta">Every row answered the same {plural(joined.problems, "problem")}. Differences are against {escape(joined.baseline.name)}.
</p>
{"".join(parts)}
{f"<h2>Notes</h2><ul>{said}</ul>" if said else ""}
<h2>How it was counted</h2><ul>{"".join(f"<li>{escape(rule)}</li>" for rule in counting)}</ul>
{recipes}
</body></html>
"""


def _table(sheet: Sheet, numbers: dict[str, int]) -> str:
    head = "".join(f"<th{_words(sheet, index)}>{escape(title)}</th>" for index, title in enumerate(sheet.head))
    rows = "".join(f"<tr>{''.join(_cell(sheet, index, cell, numbers) for index, cell in enumerate(row))}</tr>" for row in sheet.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(sheet: Sheet, index: int, cell: Cell, numbers: dict[str, int]) -> str:
    badge = dot(numbers[cell.text]) if index == 0 and sheet.head[0] == "configuration" and cell.text in numbers else ""
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    text = escape(cell.text)
    if badge:  # the name of a sweep's cell breaks between its settings
        text = f'<span class="name">{badge}<span>{text.replace("[", "<wbr>[").replace(",", ",<wbr>")}</span></span>'
    return f"<td{_words(sheet, index, cell.strong)}>{text}{small}</td>"


def _words(sheet: Sheet, index: int, strong: bool = False) -> str:
    names = [*(("words",) if index < sheet.left else ()), *(("best",) if strong else ())]
    return f' class="{" ".join(names)}"' if names else ""


def _pictures(joined: Joined) -> str:
    if "accuracy" in joined.dropped:
        return ""
    summaries = [row.summary for row in joined.rows]
    cards = []
    if "tokens_per_second" not in joined.dropped:
        rates = [summary.tokens_per_second for summary in summaries]
        cards.append(pareto_picture(summaries, rates, "tokens per second (log scale)", logarithmic=True))
    if "tokens_per_forward" not in joined.dropped:
        parallel = [summary.tokens_per_forward for summary in summaries]
        cards.append(pareto_picture(summaries, parallel, "tokens per forward", logarithmic=False, curves=_lines(joined)))
    if not cards:
        return ""
    said = " Solid lines join the settings of a sweep." if joined.areas and "tokens_per_forward" not in joined.dropped else ""
    return (
        "<h2>Accuracy against speed</h2><p>Up and to the right is better. Bars are 95 % intervals; the dashed line joins the rows that no "
        f"other beats in both. The small dots are the exact places; a number that would cover another is moved up or down.{said}</p>"
        '<div class="grid" style="grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr))">'
        + "".join(f'<div class="card">{card}</div>' for card in cards)
        + "</div>"
    )


def _lines(joined: Joined) -> list[Sequence[int]]:
    places = {row.name: index for index, row in enumerate(joined.rows)}
    lines = []
    for area in joined.areas:
        along = sorted(area.curve.summaries, key=lambda one: one.tokens_per_forward)
        lines.append([places[one.name] for one in along])
    return lines
