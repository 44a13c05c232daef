"""Run a program that a model wrote, in a process that the kernel holds back.

    outcome = run("def double(x):\\n    return 2 * x", ["assert double(2) == 4"])
    outcome.status, outcome.passed        # "passed", (True,)

What the program cannot do, and what stops it, stands in sandbox_guard.py: no network, no processes, no writing outside a fresh folder that
is deleted afterwards, no more memory, time and file size than `Limits` says. Whatever it tries is a failed outcome, never an error here.
This guards against accidents and ordinary mischief. It is no fortress: a program may read what its user may read, and a hole in the
kernel is a hole here.

Needs Linux on x86_64 or aarch64 with seccomp, and neither root nor a container. Elsewhere `require()` raises; nothing is ever run unheld.
"""

import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from dllm_toolkit.errors import ToolkitError

Status = Literal["passed", "failed", "error", "time", "ended"]
_GUARD = Path(__file__).with_name("sandbox_guard.py")
_MOST = 1 << 16  # bytes of a verdict


class SandboxError(ToolkitError):
    """A machine that cannot hold a program, or limits that make no sense."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    seconds: of processor time, so that a busy machine changes no verdict; a sleeping program is stopped after three times as many by the
    clock. memory: MiB of address space. file_size: MiB of one file.
    """

    seconds: int = 10
    memory: int = 1024
    file_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("seconds", 1), ("memory", 64), ("file_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise SandboxError(f"{name} must be at least {least}, got {value}. No program starts with less. Write {name}: {least}.")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    status: `passed` all checks hold; `failed` some do not; `error` the program itself raised; `time` it was stopped by a clock;
    `ended` it left, crashed or was killed before its checks were done. passed: a verdict a check. message: the first error.
    """

    status: Status
    passed: tuple[bool, ...]
    message: str = ""

    @property
    def right(self) -> bool:
        return self.status == "passed"


def run(program: str, checks: Sequence[str] = (), limits: Limits | None = None, *, landlock: bool = True) -> Outcome:
    """Run `program`, then each of `checks` in its namespace; a check that raises nothing has passed.

    landlock: let the program write inside its folder where the kernel can keep it there; otherwise it may write nothing at all.
    Raises SandboxError only where a program cannot be held.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise SandboxError(
            f"programs can be held on Linux only, got {sys.platform}. Elsewhere they would run with all your rights. "
            "Grade on a Linux machine."
        )
    nothing = (False,) * len(checks)
    with tempfile.TemporaryDirectory(prefix="dllm-sandbox-", ignore_cleanup_errors=True) as folder:
        secret = secrets.token_hex(16)
        job = Path(folder, "job.json")
        content = {
            "program": program,
            "checks": list(checks),
            "secret": secret,
            "landlock": landlock,
            "seconds": limits.seconds,
            "memory": limits.memory,
            "file_size": limits.file_size,
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        output, code = _finish(job, folder, 3 * limits.seconds + 5)
    if len(output) >= _MOST:
        return Outcome("ended", nothing, "the program wrote into the verdict")
    if code is None:
        return Outcome("time", nothing, f"stopped after {3 * limits.seconds + 5} seconds by the clock")
    try:
        verdict = json.loads(output)
        if verdict.pop("secret") != secret:
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        return _ended(code, nothing, limits)
    if "unheld" in verdict:
        raise SandboxError(
            f"programs cannot be held on this machine: {verdict['unheld']}. They would run with all your rights, so nothing was run. "
            "Grade on a Linux machine with seccomp."
        )
    passed = tuple(map(bool, verdict["passed"]))
    status: Status = "error" if not verdict["started"] else "passed" if all(passed) else "failed"
    return Outcome(status, passed, verdict["message"])


@cache
def require() -> None:
    """Raises SandboxError unless this machine can hold programs. Tries it, once."""
    outcome = run("value = 6 * 7", ["assert value == 42"])
    if not outcome.right:
        raise SandboxError(
            f"the sandbox does not work here, got {outcome.status}: {outcome.message}. A program that is right must pass. "
            "Grade on another machine."
        )


def _finish(job: Path, folder: str, seconds: float) -> tuple[bytes, int | None]:
    """What the process wrote, and its exit code; None: the clock stopped it."""
    # PYTHONHASHSEED: the order of a set of words must not decide a verdict. One thread: threads need address space.
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", str(_GUARD), str(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    deadline, output = time.monotonic() + seconds, b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(output) < _MOST and (left := deadline - time.monotonic()) > 0:
                if selector.select(left):
                    piece = os.read(process.stdout.fileno(), _MOST)
                    if not piece:
                        break
                    output += piece
        try:
            return output, process.wait(max(0.1, deadline - time.monotonic()) if len(output) < _MOST else 0.1)
        except subprocess.TimeoutExpired:
            return output, None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ended(code: int, nothing: tuple[bool, ...], limits: Limits) -> Outcome:
    if code in (-24, -9):  # SIGXCPU; SIGKILL is its hard limit
        return Outcome("time", nothing, f"killed after {limits.seconds} seconds of processor time")
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return Outcome("ended", nothing, f"the program ended {how} before its checks were done")
