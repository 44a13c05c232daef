"""Story arithmetic as a task: the word problems that the shipped models were trained for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dllm_toolkit import registry
from dllm_toolkit.data import stories
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task


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

    def extraction(self) -> str:
        return (
            "the number behind the last `The answer is`; steps_right: share of the reference's equations that the text has, in order; "
            "exact: the reference solution (worded: the same steps in other wordings)"
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
