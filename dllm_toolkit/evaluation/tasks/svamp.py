"""SVAMP: one-step word problems that differ in small ways from each other (Patel et al., arXiv 2103.07191; MIT)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.evaluation.tasks import sources, word_problems
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, check_size
from dllm_toolkit.evaluation.tasks.numbers import RULES, Extract, grade_number


@registry.register("task", "svamp")
@dataclass(frozen=True)
class SVAMP(Task):
    """SVAMP, all 1,000 problems of the challenge set (arXiv 2103.07191).

    path: the published SVAMP.json, null for the hub (which splits the set into 700 and 300; both are read). shots, examples: worked
    examples in GSM8K's form, see gsm8k; SVAMP has no solutions of its own. size, chat, extract, example_seed: as for gsm8k.
    """

    path: Path | None = None
    examples: Path | None = None
    shots: int = 0
    size: int | None = None
    chat: bool = False
    extract: Extract = "answer"
    example_seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size)
        word_problems.check_shots(self.shots)

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        rows = sources.load(self.path, "ChilleD/SVAMP", "train+test", ("ID", "Body", "Question", "Answer"))
        shown = word_problems.examples(self.examples, self.shots, self.example_seed)
        return tuple(
            Problem(
                id=f"svamp-{row['ID']}",
                prompt=word_problems.prompt(_question(row), shown, self.chat),
                reference=f"{float(row['Answer']):.12g}",
                meta={"type": row.get("Type", ""), "equation": row.get("Equation", "")},
            )
            for row in rows[: self.size]
        )

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else word_problems.STOPS

    def extraction(self) -> str:
        return RULES[self.extract]

    def grade(self, problem: Problem, text: str) -> Grade:
        return grade_number(text, problem.reference, self.extract)


def _question(row: Mapping[str, Any]) -> str:
    """Body and question as running text; most bodies of the file lack their full stop."""
    body = str(row["Body"]).strip()
    return f"{body}{'' if body.endswith(('.', '!', '?', ',', ':', ';')) else '.'} {str(row['Question']).strip()}"
