"""Countdown: reach a target from a few numbers. A test of planning that needs no knowledge; d1 (arXiv 2504.12216) reports it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from dllm_toolkit import registry
from dllm_toolkit.data import countdown as puzzles
from dllm_toolkit.evaluation.tasks import sources
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size, graded

_REQUEST = (
    "Use the numbers {numbers} with + - * / and brackets to make {target}. Use each number exactly once. "
    "Write the expression on the last line."
)
_EXAMPLES = (
    ((6, 2, 7), 19, "6 * 2 + 7"),
    ((30, 8, 50), 28, "50 - 30 + 8"),
    ((12, 3, 9), 13, "12 / 3 + 9"),
    ((45, 5, 11), 20, "45 / 5 + 11"),
)


@registry.register("task", "countdown")
@dataclass(frozen=True)
class CountdownTask(Task):
    """Countdown with three or more numbers, own problems or the public test file (arXiv 2504.12216).

    path: the published countdown_cd3_test.jsonl (input, output), null for own problems. size: how many (all of a file if null, 256 own
    ones). seed, split, count: which own problems, with how many numbers; `heldout` shares none with `train`, and neither shares one with
    the public file. shots: worked examples, at most four. chat: one user's turn in the chat template.
    """

    path: Path | None = None
    size: int | None = None
    seed: int = 0
    split: Literal["train", "heldout"] = "heldout"
    count: int = 3
    shots: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        check_size(self.size)
        for name, low, high in (("count", 2, 5), ("shots", 0, len(_EXAMPLES)), ("seed", 0, 2**31 - 1)):
            if not low <= getattr(self, name) <= high:
                raise TaskError(
                    f"{name} must be between {low} and {high}, got {getattr(self, name)}. Write {name}: {max(low, min(3, high))}."
                )

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        if self.path is not None:
            rows = sources.read(self.path, ("input", "output"))[: self.size]
            drawn = [self._public(row, index) for index, row in enumerate(rows)]
        else:
            drawn = []
            for index in range(self.size or 256):
                own = puzzles.countdown(self.seed, index, self.split, self.count)
                drawn.append((f"countdown-{self.split}-{self.seed}-{index}", own.numbers, own.target, own.solution))
        return tuple(
            Problem(
                id=name,
                prompt=self._prompt(numbers, target),
                reference=solution,
                meta={"numbers": numbers, "target": target},
            )
            for name, numbers, target, solution in drawn
        )

    def _public(self, row: dict, index: int) -> tuple[str, tuple[int, ...], int, str]:
        try:
            numbers, target = tuple(int(number) for number in str(row["input"]).split(",")), int(row["output"])
        except ValueError as error:
            raise TaskError(
                f"path {str(self.path)!r}, row {index + 1}: input is whole numbers with commas and output a whole number, got "
                f"{row['input']!r} and {row['output']!r}. Write the path of the published file."
            ) from error
        return f"countdown-public-{index}", numbers, target, puzzles.solve(numbers, target) or ""

    def _prompt(self, numbers: Sequence[int], target: int) -> str:
        def asked(numbers: Sequence[int], target: int) -> str:
            request = _REQUEST.format(numbers=", ".join(map(str, numbers)), target=target)
            return request if self.chat else f"Problem: {request}\nAnswer:"

        worked = "".join(f"{asked(*example[:2])}{chr(10) if self.chat else ' '}{example[2]}\n\n" for example in _EXAMPLES[: self.shots])
        return worked + asked(numbers, target)

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else ("Problem:",)

    def extraction(self) -> str:
        return (
            "the last expression of the last line that has one (inside the last <answer></answer> if there is one); right if it has the "
            "target's value and uses every number exactly once"
        )

    def grade(self, problem: Problem, text: str) -> Grade:
        found = puzzles.expression_of(text)
        right = puzzles.solves(found, problem.meta["numbers"], problem.meta["target"])
        return graded(right, exact=right and text.strip() == problem.reference.strip(), read=found)
