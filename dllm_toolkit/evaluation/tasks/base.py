"""What a task is: problems with prompts, and a grader of answers.

A task fixes its problems (the same ones for every configuration and every run) and everything that turns a model's text into a verdict:
few-shot examples, chat template or none, stop strings, extraction. `describe()` says all of it, and `dllm-toolkit show` prints it.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.errors import ToolkitError


class TaskError(ToolkitError):
    """A task whose problems cannot be had, asked or graded as its recipe says."""


@dataclass(frozen=True)
class Gap:
    """A part of an answer that is to be decoded: as many tokens as `reference` has in the model's own vocabulary."""

    reference: str


@dataclass(frozen=True)
class Problem:
    """One question. `id` is unique within the task; `reference` is a right answer; `meta` is the grader's own.

    prefill: how the answer begins, given to the model; it is part of the prompt and not of the answer. skeleton: the answer as pinned text
    with gaps to decode in between (infilling); None: everything is to be decoded.
    """

    id: str
    prompt: str
    reference: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    skeleton: tuple[str | Gap, ...] | None = None


@dataclass(frozen=True)
class Grade:
    """The verdict on one answer.

    correct: the final answer is right. steps_right: share (0..1) of the parts that are right (worked steps, cells, tests); where an answer
    has no parts, 1 or 0 like `correct`. exact: the answer is the reference, word for word. `extra`: whatever else a task wants in the
    ledger, plain data.
    """

    correct: bool
    steps_right: float
    exact: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


class Task(abc.ABC):
    """Problems and how their answers are graded."""

    chat: bool = False
    """Whether a prompt is one user's turn in the tokenizer's chat template, or running text."""

    @abc.abstractmethod
    def problems(self) -> Sequence[Problem]:
        """The problems, in a fixed order. Raises ToolkitError where they cannot be had."""

    @abc.abstractmethod
    def grade(self, problem: Problem, text: str) -> Grade:
        """Judge an answer: the text up to, and without, the end of text, after `cut`. Never raises for a wrong or broken answer."""

    def ready(self) -> None:  # noqa: B027 - most tasks need nothing
        """Raises ToolkitError if answers cannot be graded here (a package is missing, code may not be run); asked before anything runs."""

    def stops(self) -> tuple[str, ...]:
        """Strings at which an answer ends, wherever they first appear."""
        return ()

    def extraction(self) -> str:
        """What of an answer is graded, and how, in words."""
        return "the whole text"

    def notes(self) -> tuple[str, ...]:
        """What whoever reports this task's numbers must know."""
        return ()

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((place for stop in self.stops() if (place := text.find(stop)) >= 0), default=len(text))]

    def render(self, problem: Problem, tokenizer: Any) -> str:
        """The text that is encoded: the prompt, as one user's turn if `chat`, then the beginning of the answer."""
        if not self.chat:
            return problem.prompt + problem.prefill
        if not getattr(tokenizer, "chat_template", None):
            raise TaskError(
                "chat is true, but the model's tokenizer has no chat template. A base model takes the prompt as running text. "
                "Write task.chat=false."
            )
        turns = [{"role": "user", "content": problem.prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + problem.prefill

    def describe(self) -> str:
        """The first prompt, the stop strings, the extraction, and the notes; says why where there is no prompt to show."""
        try:
            problems = self.problems()
            first = problems[0]
            shown = [f"{len(problems)} problems; the prompt of {first.id}:", indent(first.prompt, "  | ", lambda line: True)]
            if first.prefill:
                shown += ["the answer begins with:", indent(first.prefill, "  | ", lambda line: True)]
            if first.skeleton is not None:
                parts = ["[...]" if isinstance(part, Gap) else part for part in first.skeleton]
                shown += ["the answer is filled into:", indent("".join(parts), "  | ", lambda line: True)]
            shown.append(f"a right answer: {first.reference!r}")
        except ToolkitError as error:
            shown = [f"no prompt to show: {error}"]
        form = "one user's turn in the tokenizer's chat template" if self.chat else "running text, no chat template"
        stops = ", ".join(map(repr, self.stops())) or "none; an answer ends at the end of text"
        shown += [f"form: {form}", f"stop strings: {stops}", f"graded: {self.extraction()}"]
        return "\n".join([*shown, *(f"note: {note}" for note in self.notes())])


registry.declare("task", Task)


def graded(correct: bool, exact: bool = False, **extra: Any) -> Grade:
    """The grade of an answer without parts."""
    return Grade(correct=correct, steps_right=float(correct), exact=exact, extra=extra)


def check_size(size: int | None) -> None:
    """Raises TaskError for a number of problems below 1; None stands for all there are."""
    if size is not None and size < 1:
        raise TaskError(f"size must be at least 1, got {size}. A comparison needs problems. Write size: 32, or null for all.")
