"""MATH-500: competition problems whose answers are formulas (Hendrycks et al., arXiv 2103.03874; the 500 of arXiv 2305.20050; MIT).

Whether two formulas mean the same is decided by the package math-verify. It is optional: pip install 'dllm-toolkit[eval]'.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.evaluation.tasks import sources, word_problems
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size, graded

_INSTRUCTION = "Reason step by step, and put the final answer into \\boxed{}."


@registry.register("task", "math500")
@dataclass(frozen=True)
class MATH500(Task):
    """MATH-500, graded by math-verify (arXiv 2103.03874, 2305.20050).

    path: the published test.jsonl (problem, solution, answer), null for the hub. examples: a file with `problem` and `solution`, such as
    MATH's training set, for `shots` worked examples picked by `example_seed`. size: the first so many problems, null for all. chat: one
    user's turn in the chat template.
    """

    path: Path | None = None
    examples: Path | None = None
    shots: int = 0
    size: int | None = None
    chat: bool = False
    example_seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size)
        word_problems.check_shots(self.shots)
        if self.shots and self.examples is None:
            raise TaskError(
                f"examples is null and shots is {self.shots}. Worked examples of MATH come from a file of yours, with `problem` and "
                "`solution`, because the 500 are all test problems. Write task.examples=FILE, or shots: 0."
            )

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        rows = sources.load(self.path, "HuggingFaceH4/MATH-500", "test", ("problem", "answer"))
        shown: list[Any] = []
        if self.shots and self.examples is not None:
            rows_shown = sources.read(self.examples, ("problem", "solution"), "examples")
            shown = word_problems.draw(rows_shown, self.shots, self.example_seed, "problem")
        return tuple(
            Problem(
                id=f"math500-{row.get('unique_id') or index}",
                prompt=self._prompt(row["problem"], shown),
                reference=row.get("solution") or f"\\boxed{{{row['answer']}}}",
                meta={"answer": row["answer"], "subject": row.get("subject", ""), "level": row.get("level", "")},
            )
            for index, row in enumerate(rows[: self.size])
        )

    def _prompt(self, problem: str, shown: Sequence[dict[str, Any]]) -> str:
        worked = "".join(f"Problem: {row['problem']}\nSolution: {row['solution']}\n\n" for row in shown)
        if self.chat:
            return f"{worked}{'Problem: ' if shown else ''}{problem}\n\n{_INSTRUCTION}"
        return f"{worked}Problem: {problem}{'' if shown else chr(10) + _INSTRUCTION}\nSolution:"

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def ready(self) -> None:
        _math_verify()

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else ("Problem:",)

    def extraction(self) -> str:
        return "the last \\boxed{} (boxes side by side: one set), else the last formula or number, as math-verify reads it, by value"

    def grade(self, problem: Problem, text: str) -> Grade:
        answer = problem.meta["answer"]
        boxed = last_boxed(text)
        same = boxed is not None and _squeezed(boxed) == _squeezed(answer)
        return graded(same or verified(answer, text), read=boxed)


def verified(answer: str, text: str) -> bool:
    """math-verify's verdict on a text, with its default extraction. Raises TaskError if it is not installed."""
    math_verify = _math_verify()
    try:
        gold = math_verify.parse(f"\\boxed{{{answer}}}")
        return bool(gold) and bool(math_verify.verify(gold, math_verify.parse(text)))
    except Exception:  # a formula that breaks the parser in a new way is a wrong answer, not the end of the run
        return False


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} that is closed; None if there is none."""
    for start in reversed([place for place in range(len(text)) if text.startswith("\\boxed{", place)]):
        depth = 0
        for place in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : place]
    return None


def _squeezed(formula: str) -> str:
    return "".join(formula.split()).removesuffix(".")


def _math_verify() -> Any:
    try:
        math_verify = importlib.import_module("math_verify")
    except ImportError as error:
        raise TaskError(
            "math500 needs the package math-verify, which is not installed. It says whether two formulas mean the same. "
            "Write: pip install 'dllm-toolkit[eval]'."
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports every answer that it cannot parse
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    return math_verify
