"""What a comparison leaves for people and programs: terminal table, JSON line, summary.json, TensorBoard, HTML page, README picture.

Everything is made from a ledger alone, so a report can be made again, without a model, from any ledger:

    python -m dllm_toolkit.evaluation.report runs/quickstart/ledger.jsonl [docs/quickstart.png]
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.ledger import Header, Record, Summary
from dllm_toolkit.evaluation.page import COLUMNS, page
from dllm_toolkit.evaluation.pictures import machine, plural


@dataclass(frozen=True)
class ReportOptions:
    """Which reports to write beside the ledger. tensorboard: event files. html: report.html, one self-contained page."""

    tensorboard: bool = True
    html: bool = True


def summaries_of(header: Header, records: Sequence[Record]) -> list[Summary]:
    """Summaries with the speed-ups against the baselines that the header names."""
    return ledger.summarise(
        records,
        autoregressive=header.baselines.get("autoregressive"),
        vanilla=header.baselines.get("vanilla"),
    )


def print_table(header: Header, summaries: Sequence[Summary], stream: IO[str] | None = None) -> None:
    """The comparison as a table; fits 86 columns, names are folded where there are fewer."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream or sys.stdout)
    if not console.is_terminal:
        console = Console(file=stream or sys.stdout, width=100)
    count = max((summary.problems for summary in summaries), default=0)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{plural(count, 'problem')}, batch {header.batch_size}, {machine(header)}",
        title_justify="left",
        title_style="dim",
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("configuration", overflow="fold")
    columns = [column for column in COLUMNS if column[0] != "exact"]
    for title, *_ in columns:
        table.add_column(title.replace("/forward", "/\nforward").replace(" ", "\n", 1), justify="right")
    for summary in summaries:
        numbers = [(value(summary), text) for _, value, text, _ in columns]
        cells = ["-" if number is None else text(number) for number, text in numbers]
        table.add_row(Text(summary.name), *(Text(cell, no_wrap=True) for cell in cells))
    console.print(table)


def json_line(header: Header, summaries: Sequence[Summary], **more: Any) -> str:
    """One line of JSON: the recipe's hash, how it was measured, and a row a configuration."""
    rows = [{key: _round(value) for key, value in asdict(summary).items()} for summary in summaries]
    content = {
        "recipe": header.recipe_hash,
        "batch_size": header.batch_size,
        "device": header.made_on.get("device"),
        "dtype": header.made_on.get("dtype"),
        "rows": rows,
        **more,
    }
    return json.dumps(content)


def write_reports(directory: Path, header: Header, records: Sequence[Record], options: ReportOptions) -> list[Summary]:
    """summary.json, and the TensorBoard files and the page that `options` ask for, into `directory`; returns the summaries."""
    summaries = summaries_of(header, records)
    content = {
        "recipe": header.recipe_hash,
        "made_on": dict(header.made_on),
        "versions": dict(header.versions),
        "commit": header.commit,
        "date": header.date,
        "counting": list(header.counting),
        "rows": [asdict(summary) for summary in summaries],
    }
    (directory / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if options.html:
        (directory / "report.html").write_text(page(header, records, summaries), encoding="utf-8")
    if options.tensorboard:
        from dllm_toolkit.evaluation.tensorboard import write_tensorboard

        write_tensorboard(directory / "tensorboard", header, records, summaries)
    return summaries


def readme_figure(source: Path, path: Path, **options: Any) -> None:
    """The README's picture of the ledger `source`, to `path` (.png or .svg). Options: see pictures.readme_figure."""
    from dllm_toolkit.evaluation import pictures

    header, records = ledger.read(source)
    pictures.readme_figure(header, records, summaries_of(header, records), path, **options)


def _round(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def main(arguments: Sequence[str]) -> int:
    """Make the reports of a ledger again, and the README picture if a path for it is given."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m dllm_toolkit.evaluation.report LEDGER.jsonl [PICTURE.png|.svg]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    try:
        if not source.is_file():
            raise ToolkitError(f"there is no ledger at {source}. Write the path of a ledger.jsonl.")
        header, records = ledger.read(source)
        summaries = write_reports(source.parent, header, records, ReportOptions())
        if len(arguments) == 2:
            readme_figure(source, Path(arguments[1]))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(header, summaries)
    print(json_line(header, summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
