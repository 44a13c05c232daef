"""What a trace looks like in a terminal, on a page and in a GIF: nothing of a model gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dllm_toolkit.evaluation.trace import Change, DecodeTrace, Frame
from dllm_toolkit.evaluation.trace_gif import write_gif
from dllm_toolkit.evaluation.trace_html import trace_page
from dllm_toolkit.evaluation.trace_look import blocks, level, numbers, pieces_of, printable
from dllm_toolkit.evaluation.trace_terminal import Glyphs, Scene, picture, screen

WILD = {10: " </script><script>alert(1)</script>", 11: "\x1b[2J", 12: "a\nb", 13: " \u202eevil", 14: " 中文", 9: "<eos>"}


def frame(forwards: int, *changes: Change, opened: tuple[int, int], closed: tuple[tuple[int, int], ...] = (), edits: int = 0) -> Frame:
    return Frame(forwards, 8 * forwards, 0, edits, changes, (0, 4), (opened,), closed, 8, "done" if forwards == 5 else "")


TRACE = DecodeTrace(
    name="wild <b>name</b>",
    length=8,
    frames=(
        frame(1, Change(0, "commit", 10, 0, 0.4), Change(1, "commit", 11, 0, 0.95), opened=(0, 4)),
        frame(2, Change(2, "commit", 12, 1, 0.8), Change(3, "commit", 13, 1, 1.0), Change(1, "remask", 28, -1), opened=(0, 4), edits=1),
        frame(4, Change(0, "edit", 14, 2, 0.6), Change(1, "commit", 11, 2, 0.99), opened=(0, 4), edits=2),
        frame(5, Change(4, "commit", 9, 3, 0.9), *(Change(p, "fill", 9, -1) for p in (5, 6, 7)), opened=(4, 8), closed=((0, 4),), edits=2),
    ),
    pieces=WILD,
    eos_ids=(9,),
    prompt="a prompt </pre><script>",
    reference="& right",
    text="x",
    correct=True,
)


def scene(step: int) -> Scene:
    return Scene(TRACE.name, TRACE.canvas(step), TRACE.frames[step - 1], step, TRACE.eos_ids, WILD.__getitem__)


def plain(step: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with screen(stream, 5.0) as stage:
        stage.show(scene(step))
    stream.seek(0)
    return stream.read()


def test_numbers_and_blocks() -> None:
    cells = TRACE.canvas(4)
    assert numbers(cells, TRACE.frames[3], 4, (9,)).words() == [
        "step 4",
        "5 forwards",
        "5 of 8 decided",
        "1.00 tokens/forward",
        "2 edited",
    ]
    assert [(block.share, block.state) for block in blocks(TRACE.canvas(3), TRACE.frames[2])] == [(1.0, "open"), (0.0, "waiting")]
    assert [(block.share, block.state) for block in blocks(cells, TRACE.frames[3])] == [(1.0, "closed"), (1.0, "open")]
    assert [level(one) for one in (0.0, 0.5, 0.69, 0.7, 0.9, 0.99, 1.0)] == [0, 1, 1, 2, 3, 4, 4]


def test_plain_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert plain(2).splitlines() == [
        "wild <b>name</b>  step 2  2 forwards  3 of 8 decided  1.50 tokens/forward  1 edited (1 masked again now)",
        "blocks ▆·  open 1 of 2",
        " </script><script>alert(1)</script><?>[a⏎",
        "b \ufffdevil] │ ░ ░ ░ ░",
        "",
    ]
    assert "{ 中文}[␛[2J]a⏎" in plain(3)
    assert "[<eos>] ⋯ 3 x end of text" in plain(4)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_token_cannot_control_the_terminal(encoding: str) -> None:
    text = "".join(plain(step, encoding) for step in (1, 2, 3, 4))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    text.encode(encoding)
    for raw in ("\x1b[2J\x07", "\u202e\u200b", "\x7f\x9b", "\u2028"):
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u202e]", printable(raw))
    assert printable("wörld 中文") == "wörld 中文"


@pytest.mark.parametrize(("width", "height"), [(100, 24), (24, 24), (12, 10), (3, 3)])
def test_the_picture_fits_the_terminal(width: int, height: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system="truecolor")
    for step in (1, 2, 3, 4):
        text = picture(scene(step), width, height, Glyphs.of("utf-8"))
        console.print(text)
        # words of the header and the legend are not cut in two; lines of the answer are
        longest = max(console.measure(line).maximum for line in text.split("\n"))
        assert longest <= max(width, len("1.00 tokens/forward"), 30)
    assert "\x1b[2J" not in stream.getvalue() and "\x1b[" in stream.getvalue()
    assert Glyphs.of("ascii").mask == " _" and Glyphs.of(None).mask == " _" and Glyphs.of("no such thing").border == "|"


def test_the_page_is_safe_and_whole() -> None:
    text = trace_page([TRACE, TRACE])
    assert "alert(1)</script" not in text and "<b>name" not in text and "</pre><script" not in text
    assert not re.search(r"https?://|@import|url\(|src=|<link", text)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    assert len(scripts) == 2 and "<" not in scripts[0]
    data = json.loads(scripts[0])
    assert len(data["traces"]) == 2 and data["traces"][0]["pieces"]["10"] == WILD[10] and "\x1b" not in data["traces"][0]["pieces"]["11"]
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text)
    assert "<td>right</td><td>5</td><td>5</td><td>1.00</td>" in text
    assert "How wild &lt;b&gt;name&lt;/b&gt; wrote" in trace_page([TRACE])


def test_a_trace_without_steps_has_a_page(tmp_path: Path) -> None:
    empty = DecodeTrace("none", (), 3, {})
    assert "No step was taken" in trace_page([empty])
    write_gif(tmp_path / "none.gif", [empty])


def test_gif(tmp_path: Path) -> None:
    from PIL import Image

    write_gif(tmp_path / "trace.gif", [TRACE, TRACE, TRACE], per_second=4)
    with Image.open(tmp_path / "trace.gif") as image:
        durations, total = [], getattr(image, "n_frames", 1)
        for number in range(total):
            image.seek(number)
            durations.append(image.info["duration"])
    # forwards 0 .. 5; the third forward finished no step, so its picture is that of the second
    assert sum(durations) == 5 * 250 + 4000 and total in (5, 6)


def test_pieces_join_to_the_text() -> None:
    class Words:
        def decode(self, ids: list[int], **_: bool) -> str:
            return " ".join(f"w{one}" for one in ids)

    piece = pieces_of(Words(), 1)
    assert piece(2) == " w2" and pieces_of(Words(), None)(2) == "w2" and pieces_of(None, 1)(2) == " 2"
