"""GSM-Symbolic: word problems from templates whose names and numbers are drawn anew (Mirzadeh et al., arXiv 2410.05229).

The templates are the package reasoning-gym's (Apache-2.0), a re-implementation of the paper's. Not all of them are right: of the 85 that it
uses, 71 gave correct equations and final numbers wherever that was checked, and only those are used here.

The templates were written from 100 problems of GSM8K's test set. So a model that was trained on these problems has seen the test set in
disguise: do not report its score on GSM8K's test problems.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from dllm_toolkit import registry
from dllm_toolkit.evaluation.tasks import sources, word_problems
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size
from dllm_toolkit.evaluation.tasks.numbers import RULES, Extract, grade_number

TEMPLATES = (
    0, 1, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 23, 26, 28, 29, 30, 31, 33, 34, 36, 38, 39, 41, 42, 43, 44, 45, 46,
    47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 62, 64, 66, 67, 68, 69, 70, 71, 73, 78, 80, 81, 82, 83, 85, 88, 91, 92, 93, 94, 95,
    96, 99,
)  # fmt: skip
"""The templates of reasoning-gym whose solutions were right in every check."""
NOTE = "the templates come from GSM8K's test problems: never report this beside the GSM8K test score of a model trained on it"
_SUFFIX = " Give the result as your final answer. Do not include units."
_HELDOUT_OF = 8
_CHUNK = 512


def split_of(question: str) -> Literal["train", "heldout"]:
    """The split that a problem belongs to: a hash of its words and numbers decides."""
    return "heldout" if blake2b(question.encode(), digest_size=4).digest()[0] % _HELDOUT_OF == 0 else "train"


def generate(seed: int, split: str) -> Iterator[tuple[str, str, int]]:
    """Endless question, solution and template of a split, each question once. Raises TaskError without reasoning-gym."""
    try:
        reasoning_gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise TaskError(
            "gsm_symbolic needs the package reasoning-gym, which is not installed. It holds the templates. "
            "Write: pip install 'dllm-toolkit[eval]', or task.path=FILE for problems that were drawn before."
        ) from error
    seen: set[str] = set()
    for chunk in range(1 << 30):
        drawn = reasoning_gym.create_dataset("gsm_symbolic", size=_CHUNK, seed=(seed << 32) + chunk * _CHUNK)
        for index, template in enumerate(drawn.task_indices):
            if template not in TEMPLATES:
                continue
            item = drawn[index]
            question = item["question"].removesuffix(_SUFFIX)
            if question not in seen and split_of(question) == split:
                seen.add(question)
                yield question, item["metadata"]["answer_cot"], template


@registry.register("task", "gsm_symbolic")
@dataclass(frozen=True)
class GSMSymbolic(Task):
    """GSM-Symbolic from reasoning-gym's templates, 71 of them (arXiv 2410.05229). Never beside GSM8K's test score of a model trained on it.

    path: problems drawn before (JSON lines with question and answer), null to draw them. size: how many. seed: which ones. split: `heldout`
    shares no problem with `train`, by a hash of the question; the templates are the same. shots, examples, chat, extract, example_seed: as
    for gsm8k.
    """

    path: Path | None = None
    examples: Path | None = None
    size: int = 500
    seed: int = 0
    split: Literal["train", "heldout"] = "heldout"
    shots: int = 0
    chat: bool = False
    extract: Extract = "answer"
    example_seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size)
        word_problems.check_shots(self.shots)
        if not 0 <= self.seed < 1 << 31:
            raise TaskError(f"seed must be between 0 and {(1 << 31) - 1}, got {self.seed}. It picks the problems. Write seed: 0.")

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        if self.path is not None:
            rows = sources.read(self.path, ("question", "answer"))[: self.size]
            drawn = [(row["question"], row["answer"], row.get("template")) for row in rows]
        else:
            endless = generate(self.seed, self.split)
            drawn = [next(endless) for _ in range(self.size)]
        shown = word_problems.examples(self.examples, self.shots, self.example_seed)
        name = f"{self.split}-{self.seed}" if self.path is None else "file"
        return tuple(
            Problem(
                id=f"gsm-symbolic-{name}-{index}",
                prompt=word_problems.prompt(question, shown, self.chat),
                reference=answer,
                meta={"final": word_problems.final_of(answer, f"problem {index}"), "template": template},
            )
            for index, (question, answer, template) in enumerate(drawn)
        )

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else word_problems.STOPS

    def extraction(self) -> str:
        return RULES[self.extract]

    def notes(self) -> tuple[str, ...]:
        return (NOTE,)

    def grade(self, problem: Problem, text: str) -> Grade:
        return grade_number(text, problem.meta["final"], self.extract)
