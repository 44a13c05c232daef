"""A decode in the terminal, one picture a step: live with colours, or plain text where the output is a file or a pipe.

    d2f  step 3  3 forwards  48 of 80 decided  16.00 tokens/forward
    blocks ##7..  open 3 of 5
     Nora has 3 times as many,[ which is 32 x] _ _ _ | _ _ _ _

In colour: a token's colour is the model's confidence; what was decided in this step stands on that colour; masks are dim; edits and
tokens that were taken back are marked. In plain text [brackets] hold this step's tokens, {braces} edits, <?> is what was masked again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING, Protocol

from dllm_toolkit.evaluation.trace import Cell, Frame
from dllm_toolkit.evaluation.trace_look import EDIT, LEVEL_NAMES, REMASK, SHADES, Block, blocks, level, numbers, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

PLAIN_WIDTH = 100
_BLACK = "#000000"  # the terminal's own black may be grey, and is where it is bold


class Pieces(Protocol):
    """The text that a token adds, by id."""

    def __call__(self, token: int, /) -> str: ...


@dataclass(frozen=True)
class Scene:
    """One step as it is shown. name: the configuration. cells: the canvas after the step, number `step` (from 1)."""

    name: str
    cells: tuple[Cell, ...]
    frame: Frame
    step: int
    eos_ids: tuple[int, ...]
    piece: Pieces


@dataclass(frozen=True)
class Glyphs:
    """How masks, blocks and line ends are drawn: as the output's encoding allows."""

    mask: str
    border: str
    newline: str
    shares: str  # an empty block to a full one
    waiting: str
    more: str

    @classmethod
    def of(cls, encoding: str | None) -> Glyphs:
        rich = cls(" ░", "│", "⏎", "▁▂▃▄▅▆▇█", "·", "⋯")
        try:
            "".join((rich.mask, rich.border, rich.newline, rich.shares, rich.waiting, rich.more)).encode(encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(" _", "|", "\\n", "123456789#", ".", "...")
        return rich


class Screen(Protocol):
    """Where scenes go. `show` returns when the scene is due to be replaced."""

    def show(self, scene: Scene) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def screen(stream: IO[str], speed: float) -> Iterator[Screen]:
    """A live picture if `stream` is a terminal, plain frames otherwise. speed: steps a second on a terminal; 0: as fast as they come."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Plain(stream)
        return
    live = _Live(console, 1 / speed if speed > 0 else 0.0)
    try:
        yield live
    finally:  # Ctrl-C too: the cursor comes back
        live.stop()


class _Plain:
    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.encoding = stream, getattr(stream, "encoding", None) or "utf-8"
        self.glyphs = Glyphs.of(self.encoding)

    def show(self, scene: Scene) -> None:
        shown = numbers(scene.cells, scene.frame, scene.step, scene.eos_ids)
        self.say("  ".join([scene.name, *shown.words()]))
        strip = blocks(scene.cells, scene.frame)
        if strip:
            self.say(f"blocks {_strip(strip, self.glyphs)}  {_open(strip)}")
        width = max(20, get_terminal_size((PLAIN_WIDTH, 24)).columns)
        for line in laid_out(scene, width, self.glyphs, marks=True):
            self.say("".join(text for text, _ in line).rstrip())
        self.say("")

    def say(self, text: str) -> None:
        print(text.encode(self.encoding, "replace").decode(self.encoding), file=self.stream, flush=True)


class _Live:
    """Each scene is drawn over the one before; the last one before `say` stays."""

    def __init__(self, console: Console, interval: float) -> None:
        self.console, self.interval, self.due = console, interval, 0.0
        self.glyphs = Glyphs.of(console.encoding)
        self.live: Live | None = None

    def show(self, scene: Scene) -> None:
        from rich.live import Live

        if self.live is None:
            self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            self.live.start()
        self.live.update(picture(scene, self.console.width, self.console.height, self.glyphs), refresh=True)
        # The picture first, then the pause: the last step is seen as long as any other. What a forward took is part of the pause.
        self.due = max(self.due + self.interval, time.monotonic() + self.interval / 4)
        time.sleep(self.due - time.monotonic())

    def say(self, text: str) -> None:
        from rich.text import Text

        self.stop()
        self.console.print(Text(text.encode(self.console.encoding, "replace").decode(self.console.encoding)))

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live, self.due = None, 0.0


def picture(scene: Scene, width: int, height: int, glyphs: Glyphs) -> Text:
    """A scene as styled text for a terminal of that size; of an answer that is too long, the lines around this step's tokens."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop", end="")
    shown = numbers(scene.cells, scene.frame, scene.step, scene.eos_ids)
    for line in _folded([(scene.name, "bold"), *((word, "") for word in shown.words())], width):
        text.append_text(line).append("\n")
    strip = blocks(scene.cells, scene.frame)
    if strip and len(strip) + len("blocks ") <= width:
        text.append("blocks ", "dim")
        for block in strip:
            text.append(_share(block, glyphs), {"open": f"bold {SHADES[1]}", "closed": SHADES[4], "waiting": "dim"}[block.state])
        beside = f"  {_open(strip)}"
        text.append(beside if text.plain.rfind("\n") + 1 + width > len(text.plain) + len(beside) else "", "dim").append("\n")
    lines = laid_out(scene, width, glyphs, marks=False)
    legend = _legend(width)
    room = max(3, height - text.plain.count("\n") - legend.plain.count("\n") - 2)
    for line in _window(lines, room, glyphs):
        for piece, style in line:
            text.append(piece, style)
        text.append("\n")
    return text.append_text(legend)


def laid_out(scene: Scene, width: int, glyphs: Glyphs, *, marks: bool) -> list[list[tuple[str, str]]]:
    """The canvas as lines of (text, style). marks: in plain text, where styles are not seen."""
    borders = {block.first for block in blocks(scene.cells, scene.frame)} - {0}
    page = _Page(width)
    filled = 0
    for position, cell in enumerate(scene.cells):
        if cell.filled:  # usually all that is left
            filled += 1
            continue
        if position in borders:
            page.add(f" {glyphs.border}", "dim")
        opened = any(first <= position < stop for first, stop in scene.frame.open)
        around = _marks(scene, position) if marks else ("", "")
        again = cell.token in scene.eos_ids and position > 0 and scene.cells[position - 1].token == cell.token
        for text, style, breaks in _drawn(scene, cell, glyphs, around, opened, again):
            page.add(text, style)
            if breaks:
                page.end_line()
    if filled:
        page.add(f" {glyphs.more} {filled} x end of text", "dim")
    return page.lines


class _Page:
    """Lines that are filled token by token; a token stays whole if it fits."""

    def __init__(self, width: int) -> None:
        self.width, self.used = max(4, width), 0
        self.lines: list[list[tuple[str, str]]] = [[]]

    def add(self, text: str, style: str) -> None:
        from rich.cells import cell_len, chop_cells

        if self.used and self.used + cell_len(text) > self.width:
            self.end_line()
            text = text.removeprefix(" ")
        for part in chop_cells(text, self.width) if cell_len(text) > self.width else [text]:
            if self.used and self.used + cell_len(part) > self.width:
                self.end_line()
            self.lines[-1].append((part, style))
            self.used += cell_len(part)

    def end_line(self) -> None:
        self.lines.append([])
        self.used = 0


def _marks(scene: Scene, position: int) -> tuple[str, str]:
    """The signs before and behind a token of this step in plain text; neighbours share theirs."""

    def kind(place: int) -> str:
        if not 0 <= place < len(scene.cells):
            return ""
        cell = scene.cells[place]
        if cell.step != scene.step or cell.kind not in ("commit", "confirm", "edit", "remask"):
            return ""
        return "{}" if cell.kind == "edit" else "<>" if cell.kind == "remask" else "[]"

    own = kind(position)
    if not own:
        return "", ""
    return own[0] if kind(position - 1) != own else "", own[1] if kind(position + 1) != own else ""


def _drawn(scene: Scene, cell: Cell, glyphs: Glyphs, marks: tuple[str, str], opened: bool, again: bool) -> Iterator[tuple[str, str, bool]]:
    """(text, style, ends the line) of what one position shows. again: it is an end-of-text behind another one."""
    now, (left, right) = cell.step == scene.step, marks
    if cell.token is None:
        taken = now and cell.kind == "remask"
        text = f"{left}?{right}" if taken and any(marks) else " ?" if taken else glyphs.mask
        yield text, f"bold {REMASK}" if taken else "" if opened else "dim", False
        return
    parts = [glyphs.waiting] if again else scene.piece(cell.token).split("\n")
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        text = (left if number == 0 else "") + printable(part) + (right if last else glyphs.newline)
        if text:
            yield text, _style(cell, now), not last


def _style(cell: Cell, now: bool) -> str:
    shade = "" if cell.confidence is None else SHADES[level(cell.confidence)]
    if now and cell.kind == "edit":
        return f"bold underline white on {EDIT}"
    if now and cell.kind == "commit":
        return f"bold {_BLACK} on {shade}" if shade else "bold reverse"
    mark = "underline" if cell.kind in ("edit", "confirm") else ""
    return f"{mark} {shade}".strip() if cell.step else "italic"


def _window(lines: list[list[tuple[str, str]]], room: int, glyphs: Glyphs) -> list[list[tuple[str, str]]]:
    """At most `room` lines: those around the first with something new."""
    if len(lines) <= room:
        return lines
    new = next((number for number, line in enumerate(lines) if any(" on " in style or "reverse" in style for _, style in line)), 0)
    room = max(1, room - 2)
    first = min(max(0, new - room // 2), len(lines) - room)
    above, below = first, len(lines) - first - room
    shown = lines[first : first + room]
    if above:
        shown = [[(f"{glyphs.more} {above} more above", "dim")], *shown]
    return [*shown, [(f"{glyphs.more} {below} more below", "dim")]] if below else shown


def _strip(strip: Sequence[Block], glyphs: Glyphs) -> str:
    return "".join(_share(block, glyphs) for block in strip)


def _share(block: Block, glyphs: Glyphs) -> str:
    """One character: how much of a block is decided."""
    if block.state == "waiting" and block.share == 0:
        return glyphs.waiting
    return glyphs.shares[int(block.share * (len(glyphs.shares) - 1))]


def _open(strip: Sequence[Block]) -> str:
    numbered = [str(number) for number, block in enumerate(strip, start=1) if block.state == "open"]
    return f"open {', '.join(numbered)} of {len(strip)}" if numbered else f"none open of {len(strip)}"


def _legend(width: int) -> Text:
    from rich.text import Text

    words = [("confidence", "dim"), *((name, shade) for name, shade in zip(LEVEL_NAMES, SHADES, strict=True))]
    words += [("decided now", f"{_BLACK} on {SHADES[3]}"), ("edited", f"underline white on {EDIT}"), ("? masked again", REMASK)]
    return Text("\n").join(_folded(words, width))


def _folded(words: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """Styled words, two spaces apart, in as many lines as they need."""
    from rich.text import Text

    lines = [Text()]
    for word, style in words:
        if lines[-1] and len(lines[-1]) + 2 + len(word) > width:
            lines.append(Text())
        lines[-1].append("  " if lines[-1] else "").append(word, style)
    return lines
