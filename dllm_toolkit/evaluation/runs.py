"""Runs that a report joins: folders or ledgers of `compare`, sweeps included, and of `harness`, read, labelled and cut into rows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.ledger import Header, Record, Summary

LEDGER = "ledger.jsonl"


class ReportError(ToolkitError):
    """Runs that cannot be read, or cannot stand in one report."""


@dataclass(frozen=True)
class Source:
    """A run. label: its short name in the report, unique there."""

    label: str
    path: Path
    header: Header
    records: tuple[Record, ...]

    @property
    def command(self) -> str:
        """The command that makes such a run."""
        return "harness" if "tasks" in self.header.recipe else "compare"

    def configuration(self, name: str) -> Mapping[str, Any]:
        """The recipe of a row: the grid's cell, or for the harness, whose rows are tasks, what it ran them with."""
        recipe = self.header.recipe
        if "configurations" in recipe:
            return recipe["configurations"].get(name, {})
        return {key: recipe[key] for key in ("model", "decoder", "cache", "driver") if key in recipe}


@dataclass(frozen=True)
class Row:
    """A configuration of a run. name: its own, with the run's label before it where two runs have one of that name."""

    name: str
    source: Source
    configuration: str
    records: tuple[Record, ...]
    summary: Summary

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its recipe."""
        return self.source.configuration(self.configuration)

    @property
    def model(self) -> str:
        """Which model it is, for telling alike names apart: the weights' digest, or the run's own word for it."""
        name = self.settings.get("model")
        key = f"weights.{name}" if isinstance(name, str) else "weights.model"
        return self.source.header.made_of.get(key, f"{self.source.label}/{name}")


def read_runs(paths: Sequence[Path]) -> list[Source]:
    """The runs, labelled by their folders. Raises ReportError where there is no ledger, no answer, or the same one twice."""
    files = [_ledger_of(path) for path in paths]
    for index, file in enumerate(files):
        if any(file.samefile(other) for other in files[:index]):
            raise ReportError(f"{paths[index]} is named twice. Its answers would be compared with themselves. Leave one out.")
    sources = []
    for file, label in zip(files, _labels(files), strict=True):
        header, records = ledger.read(file)
        if not records:
            raise ReportError(f"{file} holds no whole batch. There is nothing to report. Give its command again, which continues it.")
        sources.append(Source(label, file, header, tuple(records)))
    return sources


def rows_of(sources: Sequence[Source], wanted: Sequence[str] = ()) -> list[Row]:
    """A row a configuration, in the order of the runs. wanted: names, `*` standing for anything; none: all of them.

    Raises ReportError for a wanted name that is no row's.
    """
    groups: list[tuple[Source, str, list[Record]]] = []
    for source in sources:
        own: dict[str, list[Record]] = {}
        for record in source.records:
            own.setdefault(record.configuration, []).append(record)
        groups += [(source, name, records) for name, records in own.items()]
    names = [name for _, name, _ in groups]
    titles = [name if names.count(name) == 1 else f"{source.label}/{name}" for source, name, _ in groups]
    kept = set(range(len(groups))) if not wanted else set()
    for pattern in wanted:
        found = {i for i, (source, name, _) in enumerate(groups) if _matches(pattern, name, f"{source.label}/{name}")}
        if not found:
            raise ReportError(f"no row is called {pattern!r}. Write one of {titles}; * stands for anything, as in {names[0][:3]}*.")
        kept |= found
    return [
        Row(title, source, name, tuple(records), ledger.summarise(records)[0])
        for index, (title, (source, name, records)) in enumerate(zip(titles, groups, strict=True))
        if index in kept
    ]


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row of this name, with or without its run's label. Raises ReportError if none or several are called so."""
    found = [row for row in rows if name in (row.name, row.configuration, f"{row.source.label}/{row.configuration}")]
    if len(found) != 1:
        several = "several rows are" if found else "no row is"
        choice = [row.name for row in found or rows]
        raise ReportError(f"{several} called {name!r}. A baseline is one row. Write --baseline with one of {choice}.")
    return found[0]


def _matches(pattern: str, *names: str) -> bool:
    # Not fnmatch: the brackets of a sweep's cells are part of their names.
    rule = re.compile(".*".join(re.escape(part) for part in pattern.split("*")))
    return any(rule.fullmatch(name) for name in names)


def _ledger_of(path: Path) -> Path:
    if path.is_dir():
        if (path / LEDGER).is_file():
            return path / LEDGER
        inside = sorted(str(found.parent) for found in path.glob(f"*/{LEDGER}"))
        hint = f"Write the runs inside it: {' '.join(inside[:8])}" if inside else "Write the folder that a comparison wrote"
        raise ReportError(f"{path} holds no {LEDGER}, so it is not a run. {hint}.")
    if not path.exists():
        raise ReportError(f"there is no run at {path}. Write a folder that `dllm-toolkit compare` wrote, or the path of a {LEDGER}.")
    return path


def _labels(files: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell all of them apart."""
    parts = [
        (resolved.parent if resolved.name == LEDGER else resolved.with_suffix("")).parts[1:]
        for resolved in (file.resolve() for file in files)
    ]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(own[-count:]) or "run" for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(file) for file in files]
