"""Traces as an animated GIF: every decoder in a panel, all on one clock, which counts forwards.

A mask is as wide as the token that will stand there, so the text does not jump. The font is the one that comes with matplotlib; what it
has no glyph for (Chinese, Japanese, Korean) shows as boxes: the HTML page has the reader's fonts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_toolkit.evaluation.pictures import FAINT, INK, NOW, plural
from dllm_toolkit.evaluation.trace import Cell, DecodeTrace
from dllm_toolkit.evaluation.trace_look import EDIT, LEVEL_NAMES, REMASK, blocks, level, numbers, printable

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

MOST_FRAMES = 200
"""Pictures in one GIF; a longer decode is shown in strides."""

_SIZE, _LINE, _MARGIN = 15, 25, 16  # pixels
_COLUMNS = 62  # characters in a line of a panel
_PALE = ("#f8c3a3", "#f6dda6", "#e2e6ea", "#c4dff0", "#a5c9f3")
_OPEN, _WAITING, _RULE, _TAKEN = "#8b96a2", "#d8dde3", "#d8dde3", "#f3c1a8"


@dataclass(frozen=True)
class _Place:
    """Where a token stands in its panel: column, line and text of each of its parts, counted in characters."""

    parts: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class _Panel:
    one: DecodeTrace
    places: tuple[_Place, ...]
    lines: int


def write_gif(path: Path, traces: Sequence[DecodeTrace], *, per_second: float = 5.0) -> None:
    """Write the animation: a picture for each forward, the last one held for some seconds. per_second: forwards a second."""
    from PIL import Image

    panels = [_laid_out(one) for one in traces]
    longest = max((one.frames[-1].forwards if one.frames else 0) for one in traces)
    stride = -(-(longest + 1) // MOST_FRAMES)
    clock = [*range(0, longest, stride), longest]
    colours = _palette()
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    frames = [_picture(panels, forwards).quantize(palette=palette, dither=Image.Dither.NONE) for forwards in clock]
    durations = [max(20, round(1000 * stride / per_second))] * (len(frames) - 1) + [4000]
    # One palette for the file, and one index more that no picture uses: what has not changed is written as that, which packs well.
    frames[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=True,
        palette=bytes([*colours, 255, 0, 255]),
        transparency=len(colours) // 3,
    )


def _palette() -> list[int]:
    """One palette for all pictures, so that nothing flickers: every colour in use, and letters as they fade into what is behind them."""
    from PIL.ImageColor import getrgb

    white = (255, 255, 255)
    colours = [white, *(getrgb(one) for one in (*_PALE, NOW, EDIT, REMASK, INK, FAINT, _OPEN, _WAITING, _RULE, _TAKEN))]
    for behind in (white, *(getrgb(one) for one in _PALE)):
        for letters in (getrgb(INK), getrgb(FAINT)):
            colours += [tuple(round(a + part * (b - a)) for a, b in zip(behind, letters, strict=True)) for part in (0.2, 0.4, 0.6, 0.8)]
    return [channel for colour in colours for channel in colour[:3]]


def _laid_out(one: DecodeTrace) -> _Panel:
    """Lines of the answer as it ends, token by token."""
    column = line = 0
    places = []
    for cell in one.canvas(len(one.frames)):
        text = "·" if cell.filled else "   " if cell.token is None else one.piece(cell)
        parts = []
        for number, part in enumerate(text.split("\n")):
            if number:
                column, line = 0, line + 1
            part = printable(part)
            if column and column + len(part) > _COLUMNS:
                column, line, part = 0, line + 1, part.removeprefix(" ")
            while len(part) > _COLUMNS:
                parts.append((column, line, part[:_COLUMNS]))
                line, part = line + 1, part[_COLUMNS:]
            parts.append((column, line, part))
            column += len(part)
        places.append(_Place(tuple(parts)))
    return _Panel(one, tuple(places), line + 1)


def _fonts() -> tuple[FreeTypeFont, FreeTypeFont]:
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(ImageFont.truetype(folder / name, _SIZE) for name in ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"))  # type: ignore[return-value]


def _picture(panels: Sequence[_Panel], forwards: int):  # -> Image; PIL is imported late
    from PIL import Image, ImageDraw

    plain, bold = _fonts()
    letter = plain.getlength("m")
    width = round(_COLUMNS * letter) + 2 * _MARGIN
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.lines for panel in row) * _LINE + 84 for row in rows]
    legend = 34
    image = Image.new("RGB", (columns * width, sum(heights) + legend), "white")
    draw = ImageDraw.Draw(image)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for number, panel in enumerate(row):
            _draw_panel(draw, panel, forwards, number * width + _MARGIN, top, letter, plain, bold)
        top += height
        draw.line([(0, top), (image.width, top)], fill=_RULE)
    left = float(_MARGIN)
    for shade, name in zip(_PALE, LEVEL_NAMES, strict=True):
        draw.rectangle((left, top + 10, left + 18, top + 24), fill=shade)
        draw.text((left + 24, top + 8), name, font=plain, fill=FAINT)
        left += 24 + (len(name) + 2) * letter
        if left > image.width - 12 * letter:
            break
    return image


def _draw_panel(
    draw: ImageDraw, panel: _Panel, forwards: int, left: int, top: int, letter: float, plain: FreeTypeFont, bold: FreeTypeFont
) -> None:
    one = panel.one
    step = one.step_at(forwards)
    cells = one.canvas(step)
    frame = one.frames[min(max(step - 1, 0), len(one.frames) - 1)] if one.frames else None
    draw.text((left, top + 10), printable(one.name), font=bold, fill=INK)
    if frame is not None:
        told = numbers(cells, frame, step, one.eos_ids)
        spent = frame.forwards if step else 0
        rate = f"  {told.rate:.1f} tokens/forward" if step else ""
        draw.text((left, top + 30), f"{plural(spent, 'forward'):<13}{told.decided} decided{rate}", font=plain, fill=FAINT)
        _draw_strip(draw, cells, frame, left, top + 54, _COLUMNS * letter)
    for position, (cell, place) in enumerate(zip(cells, panel.places, strict=True)):
        opened = frame is not None and any(first <= position < stop for first, stop in frame.open)
        for column, line, text in place.parts:
            if text:
                _draw_token(draw, cell, text, left + column * letter, top + 68 + line * _LINE, letter, step, opened, plain, bold)


def _draw_strip(draw: ImageDraw, cells: Sequence[Cell], frame, left: float, top: float, width: float) -> None:
    strip = blocks(cells, frame)
    for number, block in enumerate(strip):
        start, stop = left + number * width / len(strip), left + (number + 1) * width / len(strip) - 4
        draw.rectangle((start, top, stop, top + 6), outline=NOW if block.state == "open" else _RULE)
        if block.share > 0:
            shade = {"open": NOW, "closed": _PALE[4], "waiting": _PALE[3]}[block.state]
            draw.rectangle((start, top, start + block.share * (stop - start), top + 6), fill=shade)


def _draw_token(
    draw: ImageDraw,
    cell: Cell,
    text: str,
    x: float,
    y: float,
    letter: float,
    step: int,
    opened: bool,
    plain: FreeTypeFont,
    bold: FreeTypeFont,
) -> None:
    box = (x + 1, y, x + len(text) * letter - 1, y + _SIZE + 5)
    now = cell.step == step and step > 0
    if cell.token is None:
        taken = now and cell.kind == "remask"
        draw.rectangle(box, fill=_TAKEN if taken else None, outline=REMASK if taken else _OPEN if opened else _WAITING)
        return
    if cell.confidence is not None and not cell.filled:
        draw.rectangle(box, fill=_PALE[level(cell.confidence)])
    if now and not cell.filled:
        draw.rectangle(box, outline=EDIT if cell.kind == "edit" else NOW, width=2 if cell.kind == "edit" else 1)
    draw.text((x, y + 1), text, font=bold if now and not cell.filled else plain, fill=FAINT if cell.filled else INK)
