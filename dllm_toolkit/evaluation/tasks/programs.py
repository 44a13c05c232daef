"""What the tasks of writing programs share: finding the program in an answer, and running it, if the recipe allows."""

import re
from collections.abc import Sequence

from dllm_toolkit.evaluation import sandbox
from dllm_toolkit.evaluation.tasks.base import Grade, TaskError

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE)


def fenced(text: str, entry_point: str | None = None) -> str | None:
    """The first code block that defines `entry_point`, else the first one; None without a block. A block may lack its closing fence."""
    blocks = _FENCE.findall(text)
    if entry_point is not None:
        blocks = [block for block in blocks if defines(block, entry_point)] or blocks
    return blocks[0] if blocks else None


def defines(program: str, entry_point: str) -> bool:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=", program, re.MULTILINE) is not None


def require_execution(execute: bool, name: str) -> None:
    """Raises ToolkitError unless the recipe allows programs to run and this machine can hold them."""
    if not execute:
        raise TaskError(
            f"{name} is graded by running what the model wrote, got execute: false. Programs run in a sandbox, without network and with "
            "limits, but only if you say so. Write task.execute=true."
        )
    sandbox.require()


def grade_program(program: str, checks: Sequence[str], limits: sandbox.Limits, *, exact: bool) -> Grade:
    """Run a program and its checks; `steps_right` is the share of checks that hold."""
    outcome = sandbox.run(program, checks, limits)
    return Grade(
        correct=outcome.right,
        steps_right=sum(outcome.passed) / max(1, len(outcome.passed)),
        exact=exact,
        extra={"status": outcome.status, "message": outcome.message},
    )
