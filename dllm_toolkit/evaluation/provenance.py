"""Where numbers come from: fingerprints of code and weights, versions, device. Goes into the header of every ledger.

A ledger may be continued only by the same code on the same weights: a researcher who edits a rule and runs the comparison again
must not be shown yesterday's numbers. Digests are short, since they guard against accidents, not attacks.
"""

import ast
import dataclasses
import datetime
import hashlib
import importlib.metadata
import inspect
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

_ROOT = Path(__file__).parent.parent
_DECIDING = (
    "types.py",
    "state.py",
    "engine.py",
    "decode.py",
    "ops",
    "cache",
    "decoders",
    "drivers",
    "models",
    "data",
    "evaluation/tasks",
    "evaluation/sandbox.py",
    "evaluation/sandbox_guard.py",
    "evaluation/measure.py",
    "evaluation/room.py",
)
"""Parts of the package that can change an answer or its speed; a new colour in a report is none of them."""


def code_fingerprint(components: Iterable[object]) -> str:
    """Digest of the deciding sources of the package and of the source files of the given components' own classes."""
    components = list(components)
    files: set[Path] = set()
    for name in _DECIDING:
        path = _ROOT / name
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    for component in components:
        for kind in _classes(component):
            source = inspect.getsourcefile(kind) if kind.__module__ not in ("builtins", "__main__") else None
            if source is not None and Path(source).is_file():
                files.add(Path(source))
    digest = hashlib.sha256()
    for component in components:
        # What was built, too: a preset in a researcher's file may choose other numbers under the same recipe.
        if not isinstance(component, nn.Module):
            digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(component)).encode())
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def grader_fingerprint(task: object) -> str:
    """Digest of what judges an answer: the task's own sources, what of `evaluation` and `data` they import, and its judging packages.

    Another task that changed, or code that decodes, is not part of it: two runs with the same digest were graded alike.
    """
    digest, seen = hashlib.sha256(), set()
    waiting = [kind.__module__ for kind in type(task).__mro__ if kind.__module__ not in ("builtins", "abc")]
    sources: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in seen or file is None or not Path(file).is_file():
            continue
        seen.add(name)
        sources[name] = Path(file).read_text(encoding="utf-8")
        if name == "dllm_toolkit.evaluation.sandbox":  # runs as a program of its own
            sources[f"{name}_guard"] = Path(file).with_name("sandbox_guard.py").read_text(encoding="utf-8")
        waiting += [found for found in _imported(sources[name]) if found.startswith(("dllm_toolkit.evaluation.", "dllm_toolkit.data."))]
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name].encode() + b"\0")
    for package in ("math_verify", "sympy"):
        if any(package in source for source in sources.values()):
            digest.update(f"{package} {_version(package.replace('_', '-'))}".encode())
    return digest.hexdigest()[:16]


def _imported(source: str) -> Iterator[str]:
    """Modules that a source imports names from; of a package's collected names the modules that define them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            module = sys.modules.get(node.module)
            package = hasattr(module, "__path__")
            if not package:
                yield node.module
            for alias in node.names if package else ():
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in sys.modules else str(getattr(getattr(module, alias.name, None), "__module__", ""))


def _classes(component: object) -> Iterator[type]:
    """Classes of a component and of everything in its fields, the package's own ones left out."""
    kind = component if isinstance(component, type) else type(component)
    if not kind.__module__.startswith(("dllm_toolkit.", "torch.")):
        yield kind
    if dataclasses.is_dataclass(component) and not isinstance(component, type):
        for item in dataclasses.fields(component):
            yield from _classes(getattr(component, item.name))
    elif isinstance(component, list | tuple | set | frozenset):
        for item in component:
            yield from _classes(item)
    elif isinstance(component, dict):
        for item in component.values():
            yield from _classes(item)


def weights_fingerprint(model: object, samples: int = 64) -> str:
    """Digest of names, shapes and up to `samples` evenly spread values of every parameter: cheap, and any training step shows."""
    digest = hashlib.sha256()
    if isinstance(model, nn.Module):
        for name, value in sorted(model.state_dict().items()):
            flat = value.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // samples)][:samples].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(value.shape)} {picked.tolist()}".encode())
    digest.update(repr(getattr(model, "spec", None)).encode())
    return digest.hexdigest()[:16]


def problems_fingerprint(problems: Iterable[Any]) -> str:
    """Digest of what is asked: a data file that changed under its path makes another comparison."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.id, problem.prompt, problem.prefill, problem.skeleton, problem.reference)).encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Python, this package and the libraries that can change a number; what is not installed is left out."""
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    for name in ("dllm-toolkit", "torch", "triton", "transformers", "tokenizers", "numpy", "peft", "math-verify", "reasoning-gym"):
        version = _version(name)
        if version is not None:
            found[name] = version
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's own name, for people and for telling machines apart."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the package's sources with `+` for uncommitted changes; None outside a git checkout of this package."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository: that repository's commit says nothing about this code.
    if git("ls-files", "--error-unmatch", "types.py") is None:
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    return None if commit is None else commit + ("+" if git("status", "--porcelain", "--", ".") else "")


def now() -> str:
    """The present time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
