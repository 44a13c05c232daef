"""`dllm-toolkit report`: one report of several runs, on stdout or in a file, and TensorBoard files if they are asked for."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dllm_toolkit.evaluation import joined_page, joined_text, ledger
from dllm_toolkit.evaluation.joined import Joined, join
from dllm_toolkit.evaluation.runs import LEDGER, ReportError

FORMATS = ("terminal", "markdown", "csv", "json", "html")
SUFFIXES: Mapping[str, str] = {".md": "markdown", ".csv": "csv", ".json": "json", ".html": "html", ".htm": "html", ".txt": "terminal"}


@dataclass(frozen=True)
class ReportRequest:
    """What to report, and where to; see `dllm-toolkit report --help`.

    form: one of `FORMATS`; None: by the suffix of `out`, else terminal.
    """

    runs: Sequence[Path]
    form: str | None = None
    out: Path | None = None
    baseline: str | None = None
    rows: Sequence[str] = ()
    shared_problems: bool = False
    drop_incomparable: bool = False
    vary: Sequence[str] = ()
    tensorboard: Path | None = None


def run_report(request: ReportRequest, stream: IO[str] | None = None) -> Joined:
    """Join the runs and write the report; `stream` stands in for stdout. Raises ToolkitError, and then nothing was written."""
    form = request.form or (SUFFIXES.get(request.out.suffix.lower()) if request.out is not None else None) or "terminal"
    if form not in FORMATS:
        raise ReportError(f"there is no format {form!r}. Write one of: {', '.join(FORMATS)}.")
    joined = join(
        request.runs,
        baseline=request.baseline,
        wanted=request.rows,
        shared=request.shared_problems,
        drop=request.drop_incomparable,
        vary=request.vary,
    )
    if request.out is not None:
        _require_writable(request.out, joined)
    if request.tensorboard is not None:
        from dllm_toolkit.evaluation.tensorboard import write_joined

        write_joined(request.tensorboard, joined)
        print(f"Written to {request.tensorboard}: tensorboard --logdir {request.tensorboard}", file=sys.stderr)
    if request.out is None:
        _write(joined, form, stream or sys.stdout)
        return joined
    with ledger.written(request.out):
        request.out.parent.mkdir(parents=True, exist_ok=True)
        with request.out.open("w", encoding="utf-8", newline="") as file:
            _write(joined, form, file)
    print(f"Written to {request.out}", file=sys.stderr)
    return joined


def _write(joined: Joined, form: str, stream: IO[str]) -> None:
    if form == "terminal":
        joined_text.print_terminal(joined, stream)
        return
    makers = {"markdown": joined_text.markdown, "csv": joined_text.csv_text, "json": joined_text.json_text, "html": joined_page.page}
    stream.write(makers[form](joined))


def _require_writable(out: Path, joined: Joined) -> None:
    """A slip must not cost a run its answers."""
    if out.is_dir():
        raise ReportError(f"--out {out} is a folder. A report is one file. Write --out {out / 'report.html'}.")
    if out.name == LEDGER or any(out.exists() and out.samefile(source.path) for source in joined.sources):
        raise ReportError(f"--out {out} is a ledger's name. A report would take the place of a run's answers. Write another name.")
