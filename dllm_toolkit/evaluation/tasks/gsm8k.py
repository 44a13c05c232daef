"""GSM8K: grade-school word problems with worked solutions (Cobbe et al., arXiv 2110.14168; MIT)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dllm_toolkit import registry
from dllm_toolkit.evaluation.tasks import sources, word_problems
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, check_size
from dllm_toolkit.evaluation.tasks.numbers import RULES, Extract, grade_number


@registry.register("task", "gsm8k")
@dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K, chain of thought, with 0 to 32 worked examples (arXiv 2110.14168).

    path: the published test.jsonl, null for the hub. examples: the published train.jsonl that worked examples are drawn from; likewise.
    shots: how many; the same ones stand before every problem, picked by `example_seed`. size: the first so many problems, null for all.
    chat: one user's turn in the chat template. extract: how the final number is found and compared, see numbers.py; `strict` and
    `flexible` are the evaluation harness's two scores. calculator: keep the <<48/2=24>> notes of the examples.
    """

    path: Path | None = None
    examples: Path | None = None
    shots: int = 8
    size: int | None = None
    chat: bool = False
    extract: Extract = "answer"
    example_seed: int = 0
    calculator: bool = False

    def __post_init__(self) -> None:
        check_size(self.size)
        word_problems.check_shots(self.shots)

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        rows = sources.load(self.path, word_problems.GSM8K, "test", ("question", "answer"), config="main")
        shown = word_problems.examples(self.examples, self.shots, self.example_seed, self.calculator)
        return tuple(
            Problem(
                id=f"gsm8k-{index}",
                prompt=word_problems.prompt(row["question"], shown, self.chat),
                reference=word_problems.without_calculator(row["answer"]),
                meta={"final": word_problems.final_of(row["answer"], f"row {index + 1}")},
            )
            for index, row in enumerate(rows[: self.size])
        )

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else word_problems.STOPS

    def extraction(self) -> str:
        return RULES[self.extract]

    def grade(self, problem: Problem, text: str) -> Grade:
        return grade_number(text, problem.meta["final"], self.extract)
