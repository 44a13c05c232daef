"""Traces as one self-contained HTML page: a step slider, tokens coloured by confidence or by step, several decoders side by side.

Nothing comes from the network, and a content policy in the page forbids it: the page can be mailed and opened years later. Whatever came
from a model or a recipe is escaped where it is HTML, and stands in JSON without `<` where the script reads it; the script writes text
only. The policy names the script's digest, so that no other script could run even so. `#step=7&clock=forward&colour=step` behind the
page's address opens it there.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files

from dllm_toolkit.evaluation.order import global_order, local_order
from dllm_toolkit.evaluation.pictures import plural
from dllm_toolkit.evaluation.trace import KINDS, DecodeTrace, counted, to_plain
from dllm_toolkit.evaluation.trace_look import LEVEL_NAMES, LEVELS, level, printable

_STEPS = 6  # shades of early to late, as in the style sheet and the script


def trace_page(traces: Sequence[DecodeTrace]) -> str:
    """The page as text. All traces are of one problem."""
    script, style = (files("dllm_toolkit.evaluation").joinpath(f"trace_page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    first = traces[0]
    shown = " ".join(dict.fromkeys(one.name for one in traces))
    title = f"How {plural(len(traces), 'decoder')} wrote an answer" if len(traces) > 1 else f"How {first.name} wrote an answer"
    longest = max(len(one.frames) for one in traces)
    reference = f'<details><summary>a right answer</summary><pre class="card">{escape(printable_lines(first.reference))}</pre></details>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(printable(f"dllm_toolkit trace: {shown}"))}</title><style>{style}</style></head><body data-colour="confidence">
<h1>{escape(printable(title))}</h1>
<p class="meta">{escape(printable(first.problem))}</p>
<pre class="card">{escape(printable_lines(first.prompt.strip()))}</pre>
{reference if first.reference else ""}
<div class="bar">
<button id="play" type="button">▶ Play</button>
<button id="back" type="button" aria-label="one back">‹</button><button id="on" type="button" aria-label="one on">›</button>
<input id="step" type="range" min="0" max="{longest}" value="{longest}" aria-label="step">
<output id="shown" for="step"></output>
<label>clock <select id="clock"><option value="step">steps</option><option value="forward">forwards</option></select></label>
<label>speed <select id="speed"><option value="1">1/s</option><option value="2">2/s</option><option value="5" selected>5/s</option>
<option value="10">10/s</option><option value="30">30/s</option></select></label>
<label>colour <select id="colour"><option value="confidence">confidence</option><option value="step">step</option></select></label>
</div>
{_legend()}
<p id="status" class="hidden" aria-live="polite"></p>
<noscript><p>The steps need JavaScript, which is switched off here. The answers and the pictures of their order are below.</p></noscript>
<main class="grid">{"".join(_panel(one, index) for index, one in enumerate(traces))}</main>
<div class="wide" style="margin-top:18px">{_table(traces)}</div>
<p class="meta">Keys: left and right, Home and End, space. Confidence is the model's own probability of the token, before temperature or
whatever else the decoder makes of it. Tokens count up to and including the first end of text. Order, local: share of tokens decided right
after their left neighbour; global: share that took the leftmost place still open (DiffuCoder, arXiv 2506.20639).</p>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{_data(traces)}</script>
<script>{script}</script>
</body></html>
"""


def printable_lines(text: str) -> str:
    """`printable`, with line breaks and tabs as they are."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def _data(traces: Sequence[DecodeTrace]) -> str:
    plain = [to_plain(one) for one in traces]
    for one in plain:
        one["name"] = printable(one["name"])
        one["pieces"] = {token: printable_lines(piece) for token, piece in one["pieces"].items()}
        for unread in ("prompt", "reference", "text"):
            del one[unread]
    content = json.dumps({"traces": plain, "kinds": KINDS, "levels": LEVELS}, ensure_ascii=False, separators=(",", ":"))
    # The parser of HTML looks for </script and <!-- even in here; the escape is the same character to JSON.
    return content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _legend() -> str:
    by_confidence = "".join(f'<li class="by-confidence"><i class="k{i}"></i>{name}</li>' for i, name in enumerate(LEVEL_NAMES))
    shades = "".join(f'<i class="s{i}" style="margin:0;border-radius:0"></i>' for i in range(_STEPS))
    return f"""<ul class="legend" aria-label="colours">{by_confidence}<li class="by-step">first step {shades} last step</li>
<li><i class="t mask open"></i>masked, open</li><li><i class="t mask"></i>masked</li><li><i class="t new"></i>decided in this step</li>
<li><i class="t edit new"></i>changed</li><li><i class="t remask new"></i>masked again</li></ul>"""


def _panel(one: DecodeTrace, index: int) -> str:
    verdict = "" if one.correct is None else ' <span class="ok">✓ right</span>' if one.correct else ' <span class="bad">✗ wrong</span>'
    name = escape(printable(one.name))
    about = ", ".join(part for part in (one.about, f"model {one.model}" if one.model else "") if part)
    return f"""<section class="card" id="panel{index}" aria-labelledby="name{index}">
<h2 id="name{index}">{name}{verdict}</h2><p class="about">{escape(printable(about))}</p>
<p class="numbers"></p><div class="strip" aria-hidden="true"></div>
<div class="tokens" role="group" aria-label="answer of {name}" dir="ltr"></div>
<noscript><pre>{escape(printable_lines(one.text))}</pre></noscript>
<div class="heat">{_heat(one)}</div>
<details class="list"><summary>every token as a table</summary><div class="scroll"><table><thead><tr><th scope="col">position</th>
<th scope="col">token</th><th scope="col">step</th><th scope="col">confidence</th><th scope="col">last change</th></tr></thead><tbody></tbody></table>
</div></details></section>"""


def _heat(one: DecodeTrace) -> str:
    """The order picture: across the positions, down the steps; the shade of a token in the step that decided it is its confidence."""
    steps = len(one.frames)
    if steps == 0:
        return "<p>No step was taken.</p>"
    width, height, left, top, bottom = 460.0, 140.0, 34.0, 2.0, 18.0
    cell, high = (width - left) / one.length, (height - top - bottom) / steps

    def box(position: float, step: float, across: float, down: float) -> str:
        x, y = left + position * cell, top + step * high
        return f"M{x:.2f} {y:.2f}h{across * cell:.2f}v{down * high:.2f}h{-across * cell:.2f}z"

    now: dict[str, list[str]] = {}
    for step, frame in enumerate(one.frames):
        for change in frame.changes:
            if change.kind in ("edit", "commit", "confirm"):
                name = "edit" if change.kind == "edit" else "none" if change.confidence is None else f"k{level(change.confidence)}"
                # A step of many is thinner than a line; it is drawn as one.
                now.setdefault(name, []).append(box(change.position, step, 1, max(1.0, 1.2 / high)))
    before = [box(first, start, length, stop - start) for first, length, start, stop in _decided(one)]
    paths = [f'<path class="decided" d="{"".join(before)}"/>', *(f'<path class="{name}" d="{"".join(d)}"/>' for name, d in now.items())]
    label = escape(printable(f"order of {one.name}: across the position in the answer, down the step"))
    foot = height - 4
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">'
        f'<rect class="back" x="{left}" y="{top}" width="{width - left}" height="{height - top - bottom}"/>{"".join(paths)}'
        f'<line class="cursor" x1="{left}" x2="{width}" y1="{top}" y2="{top}" data-top="{top}" data-high="{high:.4f}"/>'
        f'<text x="{left - 5}" y="12" text-anchor="end">1</text><text x="{left - 5}" y="{height - bottom}" text-anchor="end">{steps}</text>'
        f'<text x="{left}" y="{foot}">position 0</text><text x="{width}" y="{foot}" text-anchor="end">{one.length - 1}</text></svg>'
    )


def _decided(one: DecodeTrace) -> list[tuple[int, int, int, int]]:
    """(first position, length, first step, one past the last step) of neighbours that were decided over the same steps; fill left out."""
    spans: list[tuple[int, int, int]] = []  # position, from, to
    since: dict[int, int] = {}
    for step, frame in enumerate(one.frames):
        for change in frame.changes:
            if change.kind in ("remask", "fill"):
                if change.position in since:
                    spans.append((change.position, since.pop(change.position), step))
            else:
                since.setdefault(change.position, step)
    spans += [(position, start, len(one.frames)) for position, start in since.items()]
    runs: list[tuple[int, int, int, int]] = []
    for position, start, stop in sorted(spans, key=lambda span: (span[1], span[2], span[0])):
        if runs and runs[-1][2:] == (start, stop) and runs[-1][0] + runs[-1][1] == position:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, start, stop)
        else:
            runs.append((position, 1, start, stop))
    return runs


def _table(traces: Sequence[DecodeTrace]) -> str:
    titles = (
        "decoder",
        "answer",
        "tokens",
        "forwards",
        "tokens/forward",
        "steps",
        "query tokens",
        "forced",
        "edits",
        "order, local",
        "global",
    )
    rows = []
    for one in traces:
        cells = one.canvas(len(one.frames))
        tokens, last = counted(cells, one.eos_ids), one.frames[-1] if one.frames else None
        end = next((place + 1 for place, cell in enumerate(cells) if cell.token is not None and cell.token in one.eos_ids), len(cells))
        born = [-1 if cell.filled or cell.token is None else cell.step - 1 for cell in cells[:end]]
        judged = "" if one.correct is None else "right" if one.correct else "wrong"
        forwards = last.forwards if last else 0
        numbers = [judged, tokens, forwards, f"{tokens / max(1, forwards):.2f}", len(one.frames), last.lanes if last else 0]
        numbers += [last.forced if last else 0, last.edits if last else 0]
        numbers += [f"{local_order(born):.2f}", f"{global_order(born):.2f}"]
        rows.append(f"<tr><td>{escape(printable(one.name))}</td>{''.join(f'<td>{value}</td>' for value in numbers)}</tr>")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
