"""What every view of a trace shares, in a terminal, on a page and in a GIF: colours of confidence, the line of numbers, safe text."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dllm_toolkit.evaluation.trace import Cell, Frame, counted

LEVELS = (0.5, 0.7, 0.9, 0.99)
"""Bounds between the five shades of confidence."""

LEVEL_NAMES = ("below 0.5", "0.5 to 0.7", "0.7 to 0.9", "0.9 to 0.99", "0.99 and up")
SHADES = ("#d1440c", "#b87400", "#80868f", "#3d8fb8", "#1f74d1")
"""Orange is unsure, blue is sure: apart under the common colour blindnesses, and readable on white and on black."""

EDIT, REMASK = "#a8329a", "#d1440c"

BlockState = Literal["closed", "open", "waiting"]


def level(confidence: float) -> int:
    """Which of the five shades."""
    return bisect_right(LEVELS, confidence)


@dataclass(frozen=True)
class Numbers:
    """The line above a canvas. step counts from 1; decided: answer tokens so far, fill not counted; rate: tokens per forward so far."""

    step: int
    forwards: int
    decided: int
    length: int
    rate: float
    forced: int
    edits: int
    remasked: int  # in this step

    def words(self) -> list[str]:
        parts = [f"step {self.step}", f"{self.forwards} forward{'' if self.forwards == 1 else 's'}"]
        parts += [f"{self.decided} of {self.length} decided", f"{self.rate:.2f} tokens/forward"]
        parts += [f"{self.forced} forced"] if self.forced else []
        parts += [f"{self.edits} edited" + (f" ({self.remasked} masked again now)" if self.remasked else "")] if self.edits else []
        return parts


def numbers(cells: Sequence[Cell], frame: Frame, step: int, eos_ids: Sequence[int]) -> Numbers:
    """The numbers after frame `step`, whose canvas is `cells`."""
    return Numbers(
        step=step,
        forwards=frame.forwards,
        decided=sum(cell.token is not None and not cell.filled for cell in cells),
        length=len(cells),
        rate=counted(cells, eos_ids) / max(1, frame.forwards),
        forced=frame.forced,
        edits=frame.edits,
        remasked=frame.count("remask"),
    )


@dataclass(frozen=True)
class Block:
    """A block of the answer after a step. share: 0..1 of it that is decided, fill included; state: in the step's last forward."""

    first: int
    stop: int
    share: float
    state: BlockState


def blocks(cells: Sequence[Cell], frame: Frame) -> list[Block]:
    """The blocks, or none where blocks say nothing: the answer is one, or every token is one of its own (left to right)."""
    bounds = [*frame.blocks, len(cells)]
    spans = list(zip(bounds, bounds[1:], strict=False))
    if len(spans) < 2 or all(stop - first == 1 for first, stop in spans):
        return []
    found = []
    for first, stop in spans:
        share = sum(cells[position].token is not None for position in range(first, stop)) / (stop - first)
        state: BlockState = "waiting"
        if any(first < right and left < stop for left, right in frame.open):
            state = "open"
        elif any(left <= first and stop <= right for left, right in frame.closed):
            state = "closed"
        found.append(Block(first, stop, share, state))
    return found


def pieces_of(tokenizer: Any, anchor: int | None) -> Callable[[int], str]:
    """The text that a token adds to a text, by id. anchor: an ordinary token, behind which a token shows the space that it begins with.

    tokenizer: None for a model without one; its tokens show as ids.
    """
    known: dict[int, str] = {}

    def decoded(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(token: int) -> str:
        if token not in known:
            known[token] = f" {token}" if tokenizer is None else decoded([token])
            if tokenizer is not None and anchor is not None:
                alone, both = decoded([anchor]), decoded([anchor, token])
                if both.startswith(alone):
                    known[token] = both[len(alone) :]
        return known[token]

    return piece


def printable(text: str) -> str:
    """`text` with control characters as pictures of themselves: a token must not move the cursor or turn the direction of writing."""
    return "".join(_picture(character) for character in text)


def _picture(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 32 else "\u2421" if ord(character) == 127 else "\ufffd"
    return "\ufffd" if category in ("Cf", "Cs", "Zl", "Zp") else character
