"""The problems of another task, each asked several times: what a decoder that samples answers differently."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError

MARK = "#"


@registry.register("task", "repeated")
@dataclass(frozen=True)
class Repeated(Task):
    """Every problem of `task`, `times` times in a row; each has a seed of its own, as every row of a comparison.

    Problem p is p#1, p#2, ... in the ledger. Intervals and tests treat them as problems of their own, so they are too narrow by what
    answers to one problem have in common.
    """

    task: Task
    times: int = 4

    def __post_init__(self) -> None:
        if self.times < 2:
            raise TaskError(f"times must be at least 2, got {self.times}. It counts the answers to each problem. Write times: 4.")

    @property
    def chat(self) -> bool:  # type: ignore[override]  # the other task's
        return self.task.chat

    def problems(self) -> Sequence[Problem]:
        return [replace(one, id=f"{one.id}{MARK}{number}") for one in self.task.problems() for number in range(1, self.times + 1)]

    def grade(self, problem: Problem, text: str) -> Grade:
        return self.task.grade(_asked(problem), text)

    def ready(self) -> None:
        self.task.ready()

    def stops(self) -> tuple[str, ...]:
        return self.task.stops()

    def extraction(self) -> str:
        return self.task.extraction()

    def notes(self) -> tuple[str, ...]:
        return (*self.task.notes(), f"each problem is answered {self.times} times, with different seeds")

    def cut(self, text: str) -> str:
        return self.task.cut(text)

    def render(self, problem: Problem, tokenizer: Any) -> str:
        return self.task.render(_asked(problem), tokenizer)


def original(identifier: str) -> str:
    """The problem that an id of the ledger repeats."""
    return identifier.rpartition(MARK)[0]


def _asked(problem: Problem) -> Problem:
    return replace(problem, id=original(problem.id))
