"""Sudoku 4x4: cells that depend on each other in both directions; d1 (arXiv 2504.12216) and Dream (2508.15487) report it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from dllm_toolkit import registry
from dllm_toolkit.data import sudoku as puzzles
from dllm_toolkit.evaluation.tasks import sources
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size

_REQUEST = (
    "Fill this 4x4 Sudoku: each row, column and 2x2 box holds the digits 1 to 4 once. The grid is 16 digits, row by row; 0 is an empty "
    "cell. Write the filled grid as 16 digits.\n{puzzle}"
)


@registry.register("task", "sudoku")
@dataclass(frozen=True)
class SudokuTask(Task):
    """Sudoku 4x4, own puzzles or the public test file (arXiv 2504.12216). Every filled grid that keeps the given cells is right.

    path: the published 4x4_test_sudoku.csv (Puzzle, Solution), null for own puzzles, which have one solution each. size: how many (all of a
    file if null, 256 own ones). seed, split, blanks: which own puzzles, with how many empty cells; `heldout` shares no grid with `train`
    up to the names of the digits, and neither holds a puzzle of the public file. shots: worked examples, at most three. chat: one user's
    turn in the chat template.
    """

    path: Path | None = None
    size: int | None = None
    seed: int = 0
    split: Literal["train", "heldout"] = "heldout"
    blanks: int = 8
    shots: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        check_size(self.size)
        for name, low, high in (("blanks", 1, puzzles.MOST_BLANKS), ("shots", 0, 3), ("seed", 0, 2**31 - 1)):
            if not low <= getattr(self, name) <= high:
                raise TaskError(f"{name} must be between {low} and {high}, got {getattr(self, name)}. Write {name}: {min(8, high)}.")

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        if self.path is not None:
            rows = sources.read(self.path, ("Puzzle", "Solution"))[: self.size]
            drawn = [(f"sudoku-public-{index}", *self._public(row, index)) for index, row in enumerate(rows)]
        else:
            own = [puzzles.sudoku(self.seed, index, self.split, self.blanks) for index in range(self.size or 256)]
            drawn = [(f"sudoku-{self.split}-{self.seed}-{index}", one.puzzle, one.solution) for index, one in enumerate(own)]
        shown = [puzzles.sudoku(0, index, "train", 8) for index in range(self.shots)]
        return tuple(
            Problem(id=name, prompt=self._prompt(puzzle, shown), reference=solution, meta={"puzzle": puzzle})
            for name, puzzle, solution in drawn
        )

    def _public(self, row: dict, index: int) -> tuple[str, str]:
        puzzle, solution = (str(row[key]).strip() for key in ("Puzzle", "Solution"))
        if not puzzles.is_filled(solution) or solution not in puzzles.solutions(puzzle) or len(puzzle) != 16:
            raise TaskError(
                f"path {str(self.path)!r}, row {index + 1} is no puzzle with its solution, got {puzzle!r} and {solution!r}. Both are 16 "
                "digits, 0 for an empty cell. Write the path of the published file."
            )
        return puzzle, solution

    def _prompt(self, puzzle: str, shown: Sequence[puzzles.Sudoku]) -> str:
        def asked(puzzle: str) -> str:
            request = _REQUEST.format(puzzle=puzzle)
            return request if self.chat else f"Puzzle: {request}\nSolution:"

        worked = "".join(f"{asked(one.puzzle)}{chr(10) if self.chat else ' '}{one.solution}\n\n" for one in shown)
        return worked + asked(puzzle)

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else ("Puzzle:",)

    def extraction(self) -> str:
        return (
            "the last 16 digits 1 to 4 in a row, blanks and frames between them allowed; right if no row, column or box holds a digit "
            "twice and the given cells are kept. steps_right: share of the empty cells that are as in the reference"
        )

    def grade(self, problem: Problem, text: str) -> Grade:
        puzzle, found = problem.meta["puzzle"], puzzles.grid_of(text)
        empty = [cell for cell in range(16) if puzzle[cell] == "0"]
        cells = 0 if found is None else sum(found[cell] == problem.reference[cell] for cell in empty)
        right = found is not None and found in puzzles.solutions(puzzle)
        return Grade(
            correct=right,
            steps_right=1.0 if right else cells / max(1, len(empty)),
            exact=found == problem.reference,
            extra={"read": found},
        )
