"""MBPP: short Python functions described in a sentence, with three tests each (Austin et al., arXiv 2108.07732; CC BY 4.0)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.evaluation import sandbox
from dllm_toolkit.evaluation.tasks import programs, sources
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size

_COLUMNS = ("task_id", "text", "code", "test_list")
_HUB = "google-research-datasets/mbpp"
TEST_IDS = range(11, 511)
"""The 500 test problems among the 974; 1 to 10 are for prompts, the rest for tuning."""
SHOT_IDS = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10)
"""The prompting problems in the order in which they are used; the paper's three first."""


@registry.register("task", "mbpp")
@dataclass(frozen=True)
class MBPP(Task):
    """MBPP's 500 test problems (arXiv 2108.07732), one answer a problem. Nothing runs unless execute is true.

    path: the published mbpp.jsonl with all 974 problems, null for the hub. execute: allow the answers to run, in the sandbox. shots: worked
    examples, at most ten, the paper's three by default. chat: false, the paper's [BEGIN] ... [DONE] form; true, the model is asked for a
    code block. seconds, memory: limits of a program, processor seconds and MiB. size: the first so many problems, null for all.
    """

    path: Path | None = None
    execute: bool = False
    shots: int = 3
    chat: bool = False
    size: int | None = None
    seconds: int = 10
    memory: int = 1024

    def __post_init__(self) -> None:
        check_size(self.size)
        self._limits  # noqa: B018  wrong limits are found here
        if not 0 <= self.shots <= len(SHOT_IDS):
            raise TaskError(f"shots must be between 0 and {len(SHOT_IDS)}, got {self.shots}. MBPP sets ten problems apart. Write shots: 3.")

    @property
    def _limits(self) -> sandbox.Limits:
        return sandbox.Limits(seconds=self.seconds, memory=self.memory)

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        if self.path is None:
            rows = [row for split in ("prompt", "test") for row in sources.hub(_HUB, split, _COLUMNS, config="full")]
        else:
            rows = sources.read(self.path, _COLUMNS)
        by_id = {int(row["task_id"]): row for row in rows}
        shown = [by_id[number] for number in SHOT_IDS[: self.shots] if number in by_id]
        if len(shown) < self.shots:
            raise TaskError(f"shots={self.shots}, but the file lacks problems of the prompting split (ids 1 to 10). Write task.shots=0.")
        tested = [by_id[number] for number in TEST_IDS if number in by_id]
        if not tested:
            raise TaskError(f"path {str(self.path)!r} has none of the test problems (ids 11 to 510). Write the path of the published file.")
        return tuple(
            Problem(
                id=f"mbpp-{row['task_id']}",
                prompt=self._prompt(row, shown),
                reference=f"```python\n{row['code']}\n```" if self.chat else row["code"],
                meta={"setup": row.get("test_setup_code") or "", "tests": tuple(row["test_list"])},
            )
            for row in tested[: self.size]
        )

    def _prompt(self, row: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
        if self.chat:
            worked = "".join(f"{_request(other)}\n\n```python\n{_clean(other['code'])}\n```\n\n" for other in shown)
            return f"{worked}{_request(row)}\n\nAnswer with one Python code block."
        worked = "".join(f"{_request(other)}\n[BEGIN]\n{_clean(other['code'])}\n[DONE]\n\n" for other in shown)
        return f"{worked}{_request(row)}\n[BEGIN]\n"

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def ready(self) -> None:
        programs.require_execution(self.execute, "mbpp")

    def stops(self) -> tuple[str, ...]:
        return () if self.chat else ("[DONE]",)

    def extraction(self) -> str:
        return (
            "the first code block if there is one, else the whole text; run, then the problem's set-up code, then each of its tests, in "
            f"the sandbox ({self.seconds} s, {self.memory} MiB)"
        )

    def grade(self, problem: Problem, text: str) -> Grade:
        self.ready()
        code = programs.fenced(text)
        program = f"{text if code is None else code}\n{problem.meta['setup']}\n"  # two set-ups use a class of the answer
        return programs.grade_program(program, problem.meta["tests"], self._limits, exact=text.strip() == problem.reference.strip())


def _clean(code: str) -> str:
    """The file's line ends are mixed, and its indents are tabs now and then; only the former is changed."""
    return code.replace("\r\n", "\n").strip()


def _request(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:\n\n{tests}"
