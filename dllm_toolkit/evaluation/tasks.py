"""Tasks: problems with prompts, and a grader of answers.

A task fixes its problems (the same ones for every configuration and every run) and judges an answer's text. It knows nothing of
models and tokens.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from dllm_toolkit import registry
from dllm_toolkit.data import stories
from dllm_toolkit.errors import ToolkitError


@dataclass(frozen=True)
class Problem:
    """One question. `id` is unique within the task; `reference` is a right answer; `meta` is the grader's own."""

    id: str
    prompt: str
    reference: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """The verdict on one answer.

    correct: the final answer is right. steps_right: share (0..1) of the worked steps that are right. exact: the whole solution is
    the reference's. `extra`: whatever else a task wants in the ledger, plain data.
    """

    correct: bool
    steps_right: float
    exact: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


class Task(abc.ABC):
    """Problems and how their answers are graded."""

    @abc.abstractmethod
    def problems(self) -> Sequence[Problem]:
        """The problems, in a fixed order."""

    @abc.abstractmethod
    def grade(self, problem: Problem, text: str) -> Grade:
        """Judge an answer: the text up to, and without, the end of text. Never raises for a wrong or broken answer."""


registry.declare("task", Task)


@registry.register("task", "stories")
@dataclass(frozen=True)
class StoryArithmetic(Task):
    """Story arithmetic: word problems of dependent steps, one token a digit (see data/stories.py).

    style: `terse`, 2 to 5 steps and wording that follows the question's; `worded`, 3 to 7 steps, each told in one of ten ways, all of them
    right (a solution is exact if it has the right steps in any wording). size: how many problems. seed: which ones; the same seed gives
    the same problems on every machine. split: `heldout` shares no story with `train`, by construction.
    """

    size: int = 32
    seed: int = 0
    split: Literal["train", "heldout"] = "heldout"
    style: Literal["terse", "worded"] = "terse"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ToolkitError(f"size must be at least 1, got {self.size}. A comparison needs problems. Write size: 32.")
        if self.seed < 0:
            raise ToolkitError(f"seed must not be negative, got {self.seed}. It picks the problems. Write seed: 0.")

    @cached_property
    def _stories(self) -> dict[str, stories.Story]:
        name = self.split if self.style == "terse" else f"{self.style}-{self.split}"
        return {f"{name}-{self.seed}-{index}": stories.story(self.seed, index, self.split, self.style) for index in range(self.size)}

    def problems(self) -> Sequence[Problem]:
        return tuple(
            Problem(
                id=name,
                prompt=stories.format_prompt(story),
                reference=story.solution,
                meta={"steps": story.steps},
            )
            for name, story in self._stories.items()
        )

    def grade(self, problem: Problem, text: str) -> Grade:
        story = self._stories[problem.id]
        # Steps of the reference, not whatever the text calculates: leaving a step out must not look better than getting it wrong.
        right, steps = stories.grade_steps(text, story)
        holding, written = stories.grade_equations(text)
        return Grade(
            correct=stories.grade_answer(text, story),
            steps_right=right / steps,
            exact=stories.grade_exact(text, story),
            extra={"steps": steps, "equations_right": holding, "equations_written": written},
        )
