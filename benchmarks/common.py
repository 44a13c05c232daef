"""What every benchmark says of the machine and of itself, and where its numbers are kept.

    parser = argparse.ArgumentParser(...)
    save_option(parser)                                      --save, --save DIRECTORY
    options = parser.parse_args(arguments)
    ...
    return finish("decode_speed", result, options, device)   one line of JSON on stdout; with --save also results/decode_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def save_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save", nargs="?", const=str(RESULTS), default=None, metavar="DIRECTORY", help="keep the result in benchmarks/results, or there"
    )


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(device: torch.device | str) -> dict[str, str]:
    """Python, the libraries that a number depends on, and the GPU's driver side where there is one."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def commit() -> str | None:
    """The commit of this tree, with "+" behind it if tracked files differ; None outside of a repository."""
    try:
        done = [
            subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[0] + ("+" if done[1] else "")


def finish(
    name: str, result: dict[str, Any], options: argparse.Namespace, device: torch.device | str, variant: str | None = None
) -> dict[str, Any]:
    """Print a result as one line of JSON, with where it is from; keep it if `--save` was given.

    variant: part of the file's name, for settings whose results stand beside each other (weights in 8 bits). A file is replaced whole: it
    holds the last run.
    """
    whole = _described(name, result, options, device)
    if options.save is not None:
        path = Path(options.save) / f"{name}{f'-{variant}' if variant else ''}.json"
        os.replace(_written(path.with_suffix(".partial"), whole), path)
        print(f"kept in {path}", file=sys.stderr)
    print(json.dumps(whole), flush=True)
    return whole


def keep_so_far(
    name: str, result: dict[str, Any], options: argparse.Namespace, device: torch.device | str, variant: str | None = None
) -> None:
    """With `--save`, what there is after a section, in a file NAME.partial beside the last result: a run may be ended from outside."""
    if options.save is not None:
        _written(Path(options.save) / f"{name}{f'-{variant}' if variant else ''}.partial", _described(name, result, options, device))


def _described(name: str, result: dict[str, Any], options: argparse.Namespace, device: torch.device | str) -> dict[str, Any]:
    settings = {key: value for key, value in vars(options).items() if key != "save"}
    about = {
        "benchmark": name,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(device),
        "commit": commit(),
        "settings": settings,
    }
    return {**about, **{key: value for key, value in result.items() if key not in about}}


def _written(path: Path, whole: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)  # a run that dies here leaves what there was
    return path
