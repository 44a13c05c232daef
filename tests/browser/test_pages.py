"""The HTML pages in a real browser: they are drawn, the slider moves the frames, and the console has nothing to complain about.

Skipped where there is no Chromium or Chrome on PATH (Debian: apt install chromium). To look at the pictures that are taken here:

    pytest tests/browser --basetemp=/tmp/pages
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllm_toolkit.evaluation.ledger import Header, Record, summarise
from dllm_toolkit.evaluation.page import page
from dllm_toolkit.evaluation.trace import Change, DecodeTrace, Frame
from dllm_toolkit.evaluation.trace_html import trace_page

sys.path.insert(0, str(Path(__file__).parent))
from chromium import NAMES, Browser, browser, executable  # noqa: E402 - pytest's import mode knows no packages of tests

pytestmark = pytest.mark.skipif(executable() is None, reason=f"needs a browser on PATH: one of {', '.join(NAMES)}")


def made_up(name: str, per_step: int) -> DecodeTrace:
    """An answer of eight tokens in blocks of four, `per_step` tokens a step and two forwards each; one token is changed, one taken back."""
    pieces = {number: f" word{number}" for number in range(8)} | {8: "</script><b>&amp;\n", 9: "\u202e<img src=x onerror=alert(1)>"}
    frames = []
    for start in range(0, 8, per_step):
        block = start // 4 * 4
        changes = [Change(place, "commit", place, len(frames), 0.3 + place / 12) for place in range(start, min(start + per_step, 8))]
        if start == per_step:
            changes += [Change(0, "edit", 9, 1, 0.95), Change(1, "remask", 28, -1)]
        if start == 2 * per_step:
            changes.append(Change(1, "commit", 8, 2, 0.5))
        closed = ((0, block),) if block else ()
        frames.append(Frame(2 * len(frames) + 2, 8, 0, 2, tuple(changes), (0, 4), ((block, block + 4),), closed, 8))
    return DecodeTrace(name, tuple(frames), 8, pieces, prompt="<script>bad()</script>", correct=True)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "trace.html"
    path.write_text(trace_page([made_up("slow", 1), made_up("<i>fast</i>", 2)]), encoding="utf-8")
    return path


# Of each panel the tokens that are decided, as text.
DECIDED = "[...document.querySelectorAll('.tokens')].map(p => [...p.querySelectorAll('.t:not(.mask)')].map(t => t.textContent))"
NUMBERS = "[...document.querySelectorAll('.numbers')].map(p => p.textContent)"
WORDS = [f" word{number}" for number in range(8)]
CHANGED = "\ufffd<img src=x onerror=alert(1)>"


def test_the_slider_moves_the_frames(tab: Browser, trace_file: Path, tmp_path: Path) -> None:
    tab.open(f"{trace_file.as_uri()}#step=1")
    assert tab.evaluate(DECIDED) == [WORDS[:1], WORDS[:2]]
    assert tab.evaluate(NUMBERS)[1].startswith("step 1 of 4 · 2 forwards · 2 of 8 decided · 1.00 tokens/forward")

    # the arrow keys in the page, then in the slider, then the ends
    tab.press("ArrowRight")
    assert tab.evaluate(DECIDED) == [[CHANGED], [CHANGED, *WORDS[2:4]]]
    assert tab.evaluate("location.hash").startswith("#step=2&")
    tab.evaluate("document.getElementById('step').focus()")
    tab.press("ArrowRight")
    assert tab.evaluate("document.getElementById('step').value") == "3"
    assert tab.evaluate(DECIDED)[1][:3] == [CHANGED, "</script><b>&amp;\u23ce\n", WORDS[2]]
    tab.evaluate("document.activeElement.blur()")
    tab.press("End")
    assert [len(panel) for panel in tab.evaluate(DECIDED)] == [8, 8] and tab.evaluate(NUMBERS)[0].startswith("step 8 of 8 · 16 forwards")
    tab.press("Home")
    assert tab.evaluate(DECIDED) == [[], []]

    # dragging it: what a browser does, an input event with the new value
    tab.evaluate("{const s = document.getElementById('step'); s.value = 1; s.dispatchEvent(new Event('input'))}")
    assert tab.evaluate(DECIDED) == [WORDS[:1], WORDS[:2]]

    # the address names a step, and the clock may count forwards: two a step
    tab.evaluate("location.hash = '#step=5&clock=forward&colour=step'")
    tab.wait(lambda: tab.evaluate(NUMBERS)[0].startswith("step 2"))
    assert tab.evaluate("document.getElementById('shown').textContent") == "forward 5 of 16"
    assert tab.evaluate("document.querySelectorAll('.t.s1').length") == 3  # step 2 of 4, in the second panel

    # play runs to the end and stops there
    tab.evaluate("{const s = document.getElementById('speed'); s.value = '30'; document.getElementById('play').click()}")
    tab.wait(lambda: tab.evaluate("document.getElementById('shown').textContent") == "forward 16 of 16")
    assert "Play" in tab.evaluate("document.getElementById('play').textContent")
    assert tab.problems == []


def test_what_the_pointer_and_a_screen_reader_find(tab: Browser, trace_file: Path) -> None:
    tab.open(f"{trace_file.as_uri()}#step=4")
    place = "document.querySelector('#panel1 [data-position]').getBoundingClientRect()"
    tab.mouse("mouseMoved", *tab.evaluate(f"(({{x, y, width}}) => [x + width / 2, y + 8])({place})"))
    tip = tab.evaluate("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert "changed in step 2" in tip and "confidence 0.9500" in tip and 'step 1: " word0"' in tip and "position 0" in tip
    tab.evaluate("document.querySelector('#panel1 details.list').open = true")
    tab.wait(lambda: tab.evaluate("document.querySelectorAll('#panel1 tbody tr').length") == 8)
    assert tab.evaluate("document.querySelector('#panel1 tbody tr').innerText.split('\\t').slice(2)") == ["2", "0.9500", "edit"]
    assert "step 4 of 8" in tab.evaluate("document.getElementById('status').textContent")
    # nothing of the model became an element, and no script but the page's own ran
    assert tab.evaluate("document.querySelectorAll('img, b, i i, script').length") == 2
    assert tab.problems == []


def ledger_page() -> str:
    records = [
        Record(
            configuration=name,
            problem="one",
            prompt="<script>bad()</script>",
            reference="r",
            prompt_hash="h",
            prompt_tokens=3,
            output=tuple(range(8)),
            pieces=tuple(f" <b>{place}" for place in range(8)),
            text="t",
            correct=name == "slow",
            steps_right=1.0,
            exact=False,
            nfe=8 // per_step,
            tokens=8,
            canvas_tokens=8,
            lanes=64,
            steps=8 // per_step,
            commits=8,
            forced=0,
            edits=0,
            born=tuple(place // per_step for place in range(8)),
            seconds=0.1 / per_step,
            batch=0,
            batch_rows=1,
            batch_seconds=0.1 / per_step,
            seed=0,
        )
        for name, per_step in (("slow", 1), ("fast", 2))
    ]
    header = Header("hash", {"a": "</pre>"}, made_on={"device": "a CPU", "dtype": "float32"}, configurations=("slow", "fast"))
    return page(header, records, summarise(records, vanilla="slow"))


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, True)])
def test_pages_are_drawn_within_their_window(tab: Browser, trace_file: Path, tmp_path: Path, width: int, dark: bool) -> None:
    report = tmp_path / "report.html"
    report.write_text(ledger_page(), encoding="utf-8")
    for path in (report, trace_file):
        tab.open(path.as_uri(), width=width, dark=dark)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.querySelectorAll('svg')].every(one => one.getBoundingClientRect().height > 50)")
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        tab.picture(tmp_path / f"{path.stem}.png")
        assert (tmp_path / f"{path.stem}.png").stat().st_size > 5000
        assert tab.problems == []
