"""Recorded decodes of the official implementations, replayed: is a number from this package a number about the method?

A case (the format is described in the README beside the vectors) holds a prompt, the official arguments, and what the official code did
with them: token ids, number of forwards, the forward after which each position was decided, and the query tokens of each forward.

    plan      the case's source, function and arguments, in this package's words        golden_plan
    replay    the decode, opened up step by step; compare it with the recording         golden_replay
    errors    recorded logits against ours                                               golden_logits

    dllm-toolkit golden DIR          or      run_directory(DIR)
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.testing import golden_logits
from dllm_toolkit.testing.golden_plan import Case, Declined, NotBuilt, checkpoint, leaves_masks, plan
from dllm_toolkit.testing.golden_replay import WHAT, compare, replay

FIELDS = {"name", "source", "function", "checkpoint", "args", "prompt_ids", "generated_ids", "nfe", "commit_forward", "query_lens"}
SHIPPED = Path(__file__).resolve().parents[2] / "tests" / "golden" / "vectors"


class GoldenError(ToolkitError):
    """A directory or a file that holds no recorded cases in this format."""


@dataclass
class FileReport:
    """One file of a directory. exact: how many cases agree in each of WHAT. differing, declined: name and reason.

    cut: cases whose official loop leaves masks; there our text ends, and what its last forward decided behind is not compared.
    """

    name: str
    cases: int
    exact: dict[str, int] = field(default_factory=dict)
    differing: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    not_built: int = 0
    logit_error: float | None = None

    @property
    def passed(self) -> int:
        return self.cases - len(self.differing) - len(self.declined) - self.not_built


def load_cases(path: Path) -> list[Case]:
    """The cases of one file. Raises GoldenError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["cases"]
        for case in found:
            if missing := FIELDS - set(case):
                raise KeyError(", ".join(sorted(missing)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GoldenError(
            f"{path} holds no recorded cases, got {type(error).__name__}: {error}. Each case says where it is from and what was decoded. "
            "Point at a directory in the format of tests/golden/vectors/README.md."
        ) from error
    return found


def run_case(case: Case, directory: Path = SHIPPED) -> dict[str, str]:
    """What differs between a recorded case and our decode of it. Raises NotBuilt or Declined."""
    try:
        planned = plan(case, directory)
    except KeyError as missing:
        raise GoldenError(
            f"case {case['name']} lacks the argument {missing}, got {sorted(case['args'])}. Its source needs it. Record it under `args`."
        ) from missing
    return compare(case, replay(case, planned), planned)


def run_file(path: Path, directory: Path) -> FileReport:
    """Replay every case of one file of `directory`."""
    report = FileReport(path.stem, 0, dict.fromkeys(WHAT, 0))
    for case in load_cases(path):
        report.cases += 1
        try:
            wrong = run_case(case, directory)
        except NotBuilt:
            report.not_built += 1
            continue
        except Declined as reason:
            report.declined[case["name"]] = str(reason)
            continue
        if leaves_masks(case):
            report.cut.append(case["name"])
        for what in WHAT:
            report.exact[what] += what not in wrong
        if wrong:
            report.differing[case["name"]] = "; ".join(f"{what}: {text}" for what, text in wrong.items())
    return report


def run_logits(path: Path, directory: Path) -> FileReport:
    """Compare every entry of one file of recorded logits."""
    report = FileReport(path.stem, 0, logit_error=0.0)
    for entry, error, tolerance in golden_logits.errors(path, lambda name, adapter: checkpoint(directory, name, adapter)):
        report.cases += 1
        report.logit_error = max(report.logit_error or 0.0, error)
        if not error < tolerance:
            report.differing[entry] = f"logits differ by {error:.2g}, tolerance {tolerance:.2g}"
    return report


def run_directory(directory: Path) -> list[FileReport]:
    """Replay every file of a directory in this format: cases/*.json and logits/*.json. Raises GoldenError."""
    files = sorted((directory / "cases").glob("*.json"))
    if not files:
        raise GoldenError(
            f"no recorded cases in {directory}, got no {directory / 'cases'}/*.json. A directory in this format holds cases/, logits/ and "
            "the checkpoints that they name. Write: dllm-toolkit golden tests/golden/vectors."
        )
    reports = [run_file(path, directory) for path in files]
    return reports + [run_logits(path, directory) for path in sorted((directory / "logits").glob("*.json"))]


def main(directory: Path | None = None) -> int:
    """Print a row a file and one JSON line; 1 if any case differs, otherwise 0. Raises GoldenError."""
    if directory is None:
        directory = SHIPPED
        if not directory.is_dir():
            raise GoldenError(
                f"the recorded vectors are not installed, got no directory at {directory}. They live in the repository's tests, not in the "
                "package. Write: dllm-toolkit golden DIR."
            )
    began = time.perf_counter()
    reports = run_directory(directory)
    print(_table(reports))
    differing = {f"{report.name}/{name}": text for report in reports for name, text in report.differing.items()}
    print(
        json.dumps(
            {
                "directory": str(directory),
                "cases": sum(report.cases for report in reports),
                "passed": sum(report.passed for report in reports),
                "declined": {f"{report.name}/{name}": text for report in reports for name, text in report.declined.items()},
                "not_built": sum(report.not_built for report in reports),
                "cut_at_leftover_masks": [f"{report.name}/{name}" for report in reports for name in report.cut],
                "differing": differing,
                "largest_logit_error": max((report.logit_error or 0.0 for report in reports), default=0.0),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )
    return 1 if differing else 0


def _table(reports: Sequence[FileReport]) -> str:
    head = ("file", "cases", *WHAT, "declined", "not built", "logit error")
    lines: list[tuple[str, ...]] = [head]
    for report in reports:
        lines.append(
            (
                report.name,
                str(report.cases),
                *(str(report.exact[what]) if what in report.exact else "-" for what in WHAT),
                str(len(report.declined)),
                str(report.not_built),
                "-" if report.logit_error is None else f"{report.logit_error:.1e}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        f"{line[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    text += [f"differs   {report.name}/{name}: {why}" for report in reports for name, why in report.differing.items()]
    text += [f"declined  {report.name}/{name}: {why}" for report in reports for name, why in report.declined.items()]
    return "\n".join(text)
