"""Sudoku 4x4: fill a grid with 1 to 4 so that no row, column or 2x2 box holds a digit twice.

There are only 288 filled grids, so puzzles of one grid would be nearly the same problem in train and in held-out. The split is therefore by
grid, up to the names of the digits: 12 classes of 24 grids, of which two are held out. Cells are emptied only while the solution stays
unique. Public test puzzles are never drawn; their grids cannot be avoided, for they use all twelve classes.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Literal

from dllm_toolkit.data.plan import Draw
from dllm_toolkit.data.public import is_public

Split = Literal["train", "heldout"]
HELDOUT_CLASSES = (3, 8)
"""Classes in the order of their normal forms."""
MOST_BLANKS = 11
"""With four or more digits given there is always a puzzle with one solution; it gets rare beyond 10 blanks."""
_HOUSES = (
    *(tuple(4 * row + column for column in range(4)) for row in range(4)),
    *(tuple(4 * row + column for row in range(4)) for column in range(4)),
    *(tuple(4 * (top + row) + left + column for row in (0, 1) for column in (0, 1)) for top in (0, 2) for left in (0, 2)),
)


@dataclass(frozen=True)
class Sudoku:
    """puzzle, solution: 16 digits row by row, 0 for an empty cell."""

    puzzle: str
    solution: str


def is_filled(grid: str) -> bool:
    """Whether 16 digits are a right filled grid."""
    return len(grid) == 16 and all({grid[cell] for cell in house} == set("1234") for house in _HOUSES)


@cache
def grids() -> tuple[str, ...]:
    """All 288 filled grids, sorted."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4 and all(x != y for x, y in zip(a, b, strict=True))]
    return tuple(grid for a in halves for b in halves if is_filled(grid := a + b))


def normal_form(grid: str) -> str:
    """The grid with its digits renamed in the order of their appearance."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(digit, str(len(names) + 1)) for digit in grid)


@cache
def _classes() -> tuple[str, ...]:
    return tuple(sorted({normal_form(grid) for grid in grids()}))


def split_of(solution: str) -> Split:
    """The split that puzzles of this filled grid belong to."""
    return "heldout" if _classes().index(normal_form(solution)) in HELDOUT_CLASSES else "train"


@cache
def _grids_of(split: Split) -> tuple[str, ...]:
    return tuple(grid for grid in grids() if split_of(grid) == split)


def solutions(puzzle: str) -> list[str]:
    """All filled grids that agree with the given cells."""
    return [grid for grid in grids() if all(given in ("0", digit) for given, digit in zip(puzzle, grid, strict=True))]


def key_of(puzzle: str) -> str:
    return f"sudoku/{puzzle}"


def sudoku(seed: int, index: int, split: Split, blanks: int = 8) -> Sudoku:
    """Puzzle number `index` of the endless sequence that `seed` makes for `split`, with `blanks` empty cells and one solution."""
    draw = Draw(int.from_bytes(blake2b(f"sudoku/{seed}/{index}/{split}/{blanks}".encode(), digest_size=8).digest(), "little"))
    while True:
        solution = draw.pick(_grids_of(split))
        puzzle = _emptied(solution, blanks, draw)
        if puzzle is not None and not is_public(key_of(puzzle)):
            return Sudoku(puzzle, solution)


def _emptied(solution: str, blanks: int, draw: Draw) -> str | None:
    """Empty cells in random order, skipping those that would make a second solution; None if there are too few."""
    cells, order = list(solution), list(range(16))
    while order and blanks:
        cell = order.pop(int(draw.uniform() * len(order)))
        kept, cells[cell] = cells[cell], "0"
        if len(solutions("".join(cells))) > 1:
            cells[cell] = kept
        else:
            blanks -= 1
    return "".join(cells) if blanks == 0 else None


_GRID = re.compile(r"(?<![0-9])(?:[1-4][\s|,;+_-]*){15}[1-4](?![0-9])")


def grid_of(text: str) -> str | None:
    """The last 16 digits of 1 to 4 in a row that a text holds, with nothing but blanks, line ends and frame signs between; None if none."""
    found = _GRID.findall(text)
    return re.sub(r"[^1-4]", "", found[-1]) if found else None
