"""List operations: how much of a model's accuracy decoding in parallel takes away (after ParallelBench, arXiv 2510.04767)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dllm_toolkit import registry
from dllm_toolkit.data import list_operations as lists
from dllm_toolkit.data.list_operations import Operation
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size


@registry.register("task", "list_operations")
@dataclass(frozen=True)
class ListOperations(Task):
    """Short lists of names to copy, reverse, sort, change or shuffle, after ParallelBench (arXiv 2510.04767); lists and names are own ones.

    operation: one of them, or `all` in turn. size: how many problems. seed: which ones. shortest, longest: lengths of the lists, in turn.
    shots: worked examples of the same operation. chat: one user's turn in the chat template.

    Where several answers are right (shuffle, insert_anywhere, remove_any, replace_any), the summary has `diversity` beside accuracy: how
    evenly the right answers spread over all that there are.
    """

    operation: Operation | Literal["all"] = "all"
    size: int = 100
    seed: int = 0
    shortest: int = 3
    longest: int = 6
    shots: int = 1
    chat: bool = False

    def __post_init__(self) -> None:
        check_size(self.size)
        if not lists.SHORTEST <= self.shortest <= self.longest <= lists.LONGEST:
            raise TaskError(
                f"shortest and longest must be in order, between {lists.SHORTEST} and {lists.LONGEST}, got {self.shortest} and "
                f"{self.longest}. They are numbers of names. Write shortest: 3, longest: 6."
            )
        for name, high in (("shots", 8), ("seed", 2**31 - 1)):
            if not 0 <= getattr(self, name) <= high:
                raise TaskError(f"{name} must be between 0 and {high}, got {getattr(self, name)}. Write {name}: 1.")

    @cached_property
    def _drawn(self) -> dict[str, lists.ListProblem]:
        operations = lists.OPERATIONS if self.operation == "all" else (self.operation,)
        lengths = range(self.shortest, self.longest + 1)
        drawn = {}
        for index in range(self.size):
            operation = operations[index % len(operations)]
            length = lengths[index // len(operations) % len(lengths)]
            drawn[f"list-{operation}-{length}-{self.seed}-{index}"] = lists.list_problem(self.seed, index, operation, length)
        return drawn

    def problems(self) -> Sequence[Problem]:
        return tuple(
            Problem(id=name, prompt=self._prompt(one), reference=" " + _line(one.answer), meta={"operation": one.operation})
            for name, one in self._drawn.items()
        )

    def _prompt(self, problem: lists.ListProblem) -> str:
        # Seeds of problems are not negative, so no example is ever a problem.
        shown = [lists.list_problem(-1, index, problem.operation, 3 + index % 4) for index in range(self.shots)]
        worked = "".join(f"{_asked(one)} {_line(one.answer)}\n\n" for one in shown)
        if self.chat:
            asked = _asked(problem).removesuffix("\nResult:")
            return f"{worked}{asked}\nAnswer with the resulting list only, names separated by commas."
        return worked + _asked(problem)

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else ("List:",)

    def extraction(self) -> str:
        return (
            "the first line with a comma, else the first with anything, without what stands before a colon, brackets, quotes and a last "
            "stop; names are compared one by one. steps_right: share of the places that are as in the reference, 1 for any right answer"
        )

    def grade(self, problem: Problem, text: str) -> Grade:
        drawn = self._drawn[problem.id]
        items = lists.items_of(text)
        choice = lists.choice_of(drawn, items)
        same = sum(a == b for a, b in zip(items, drawn.answer, strict=False)) / max(len(items), len(drawn.answer))
        extra: dict[str, Any] = {"read": list(items)}
        if drawn.operation in lists.OPEN:
            extra |= {"operation": drawn.operation, "choice": choice, "choices": lists.choices(drawn)}
        return Grade(correct=choice is not None, steps_right=1.0 if choice is not None else same, exact=items == drawn.answer, extra=extra)


def _line(items: Iterable[str]) -> str:
    return ", ".join(items)


def _asked(problem: lists.ListProblem) -> str:
    return f"List: {_line(problem.items)}\n{problem.request}\nResult:"
