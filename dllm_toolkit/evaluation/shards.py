"""One ledger, several processes: each appends to a shard of its own, and the first puts them together.

    ledger.jsonl            locked by process 0 while the run lasts
    ledger.shard-0.jsonl    whole batches of process 0, a ledger by itself
    ledger.shard-1.jsonl    ...

Shards are collected when a run ends, and before one begins: what killed processes left is there, however many they were and however many
come after them. The machines of a run need not share a file system, since records travel to process 0 and files do not. The result has
the lines of a single process in their order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.ledger import Event, Header, Ledger, Record
from dllm_toolkit.evaluation.processes import Processes


@contextlib.contextmanager
def open_shared(path: Path, header: Header, here: Processes, problems: Sequence[str]) -> Iterator[tuple[Ledger, Sequence[Record]]]:
    """This process's ledger to append to, with the events of all, and the records that are there (in process 0, the others get none).

    When the block ends, `path` holds everything, in the order of configurations and `problems` (their ids). Raises LedgerError, in all
    processes if in one; what was measured is kept.
    """
    with contextlib.ExitStack() as stack:
        main = None
        with here.together():
            if here.first:
                main = stack.enter_context(ledger.open_ledger(path, header))
        main = _collect(main, path, header, here)
        events = here.share(main.events if main is not None else ())
        if main is not None and here.count == 1:
            yield main, main.records
        else:
            with contextlib.ExitStack() as closed:
                with here.together():
                    own = closed.enter_context(ledger.open_ledger(_shard(path, here.rank), header))
                yield replace(own, events=events), () if main is None else main.records
            with here.together():  # every shard is closed
                pass
            main = _collect(main, path, header, here)
        with here.together():
            if main is not None:
                stack.enter_context(_in_order(path, header, problems))


def held(path: Path) -> tuple[Header, list[Record]]:
    """Header and records of a ledger and of the shards beside it: what a run that starts now would find. Nothing is changed."""
    header, records = ledger.read(path)
    for shard in _shards(path):
        records = _new(records, ledger.read(shard)[1])[0]
    return header, records


def _shard(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.shard-{rank}{path.suffix}")


def _shards(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.shard-*{path.suffix}"))


def _new(records: Sequence[Record], more: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """All records, and those of `more` that were not there: a process that died between two files left some in both."""
    there = {(record.configuration, record.problem) for record in records}
    fresh = [record for record in more if (record.configuration, record.problem) not in there]
    return [*records, *fresh], fresh


def _collect(main: Ledger | None, path: Path, header: Header, here: Processes) -> Ledger | None:
    """The ledger of process 0 with what all shards in reach hold; they are deleted once it is on the disk."""
    files: list[Path] = []
    found: list[tuple[tuple[Record, ...], tuple[Event, ...]]] = []
    with contextlib.ExitStack() as locked:
        with here.together():
            # One process a machine looks: the machines may share their files, or not. A shard that somebody writes is an error.
            for file in _shards(path) if here.local_rank == 0 else ():
                book = locked.enter_context(ledger.open_ledger(file, header))
                files.append(file)
                found.append((book.records, book.events))
        gathered = here.gather(found)
        with here.together():
            if main is not None:
                records, events = list(main.records), list(main.events)
                for more, happened in (shard for shards in gathered for shard in shards):
                    records, fresh = _new(records, more)
                    if fresh:
                        main.append(fresh)
                    for event in happened:
                        if event not in events:
                            events.append(event)
                            main.note(event)
                main = replace(main, records=tuple(records), events=tuple(events))
        for file in files:
            file.unlink(missing_ok=True)
    return main


@contextlib.contextmanager
def _in_order(path: Path, header: Header, problems: Sequence[str]) -> Iterator[None]:
    """Write the ledger again if its lines are not where a single process would have put them; the new file stays locked in the block."""
    found = ledger.contents(path)
    rows = {name: index for index, name in enumerate(header.configurations)}
    places = {problem: index for index, problem in enumerate(problems)}
    ordered = sorted(found.records, key=lambda record: (rows[record.configuration], places[record.problem]))
    if ordered == found.records:
        yield
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with ledger.written(path), fresh.open("wb") as stream:
            ledger.lock(stream, path)
            stream.write(ledger.header_line(found.header))
            stream.writelines(ledger.event_line(event) for event in found.events)
            stream.writelines(ledger.record_line(record) for record in ordered)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(fresh, path)
            yield
    finally:
        fresh.unlink(missing_ok=True)
