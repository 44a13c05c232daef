"""Where the problems of public data sets come from: a file of yours, an installed package, or the hub.

Files are read in the form in which the data sets are published: JSON lines (also gzipped), one JSON list, or CSV with a header. The hub is
read with `datasets` if it is installed and the network answers. Nothing is stored here and nothing ships with the package.
"""

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_toolkit.evaluation.tasks.base import TaskError

Rows = list[dict[str, Any]]


def text(path: Path, where: str = "path") -> str:
    """The text of a file, gzipped or not."""
    try:
        raw = path.expanduser().read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TaskError(f"{where} cannot be read, got {str(path)!r} ({reason}). Write the path of the data file.") from error


def read(path: Path, columns: Sequence[str], where: str = "path") -> Rows:
    """The rows of a file, all of them with `columns`. `where`: the argument that named the file, for errors."""
    content = text(path, where)
    try:
        rows = _parse(content, path.name.removesuffix(".gz"))
    except (ValueError, csv.Error) as error:
        raise TaskError(
            f"{where} is no data file, got {str(path)!r} ({error}). Rows are JSON lines, a JSON list, or CSV with a header. "
            "Write the path of the published file."
        ) from error
    return _checked(rows, columns, f"{where} {str(path)!r}")


def _parse(text: str, name: str) -> Rows:
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    lines = [] if text.lstrip().startswith("[") else [line for line in text.split("\n") if line.strip()]
    rows = [json.loads(line) for line in lines] if lines else json.loads(text or "[]")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is no mapping")
    return rows


def _checked(rows: Rows, columns: Sequence[str], source: str) -> Rows:
    if not rows:
        raise TaskError(f"{source} has no rows. A comparison needs problems. Write the path of the published file.")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise TaskError(
                f"{source}, row {number} lacks {', '.join(missing)}; it has {', '.join(map(str, row))}. "
                "Another data set, or another form of it. Write the path of the published file."
            )
    return rows


def hub(name: str, split: str, columns: Sequence[str], *, config: str | None = None, where: str = "path") -> Rows:
    """The rows of a data set of the hub. `where`: the argument that a local file would go to, for errors."""
    instead = f"Write task.{where}=FILE for a local copy"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise TaskError(
            f"{where} is null, and {name} cannot be fetched without the package datasets. {instead}, or: pip install 'dllm-toolkit[eval]'."
        ) from error
    try:
        rows = [dict(row) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # the library raises errors of many others: network, hub, file system, arrow
        first = str(error).strip().partition("\n")[0][:200]
        raise TaskError(
            f"{where} is null, and {name} cannot be fetched from the hub ({type(error).__name__}: {first}). "
            f"It needs the network, or a copy in the hub's cache. {instead}."
        ) from error
    return _checked(rows, columns, f"{name} ({split})")


def load(path: Path | None, name: str, split: str, columns: Sequence[str], *, config: str | None = None, where: str = "path") -> Rows:
    """The file if there is one, the hub otherwise."""
    return hub(name, split, columns, config=config, where=where) if path is None else read(path, columns, where)
