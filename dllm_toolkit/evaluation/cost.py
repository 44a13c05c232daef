"""What a comparison will cost before it starts: answers, forwards and seconds of every configuration.

A configuration's cost is that of its own answers in the ledger; without any, that of configurations there which differ from it in
arguments only; without those, of one problem that is decoded now, alone: an upper bound of the seconds that it takes in a batch.
The figure is an estimate: a lower threshold may need half the forwards of a higher one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from dllm_toolkit.evaluation.ledger import Record
from dllm_toolkit.evaluation.measure import Row, RunOptions, _decode
from dllm_toolkit.evaluation.room import Room
from dllm_toolkit.recipe_hints import COMPONENT


@dataclass(frozen=True)
class Rate:
    """Mean forwards (as the ledger counts them) and wall seconds of one answer, and where the figures come from."""

    forwards: float
    seconds: float
    source: str


@dataclass(frozen=True)
class Cost:
    """A configuration: answers that are there, answers that are missing, and the rate of an answer."""

    name: str
    done: int
    missing: int
    rate: Rate

    @property
    def forwards(self) -> float:
        return self.missing * self.rate.forwards

    @property
    def seconds(self) -> float:
        return self.missing * self.rate.seconds


def estimate(
    rows: Sequence[Row],
    configurations: Mapping[str, Any],
    records: Sequence[Record],
    problems: int,
    run: RunOptions,
    device: torch.device,
) -> list[Cost]:
    """The cost of each row. configurations: their recipes by name. records: what the ledger holds. problems: how many there are."""
    rates: dict[str, Rate] = {}  # by family
    own: dict[str, Rate] = {}
    done: dict[str, list[Record]] = {}
    for record in records:
        done.setdefault(record.configuration, []).append(record)
    families = {row.name: family(configurations[row.name]) for row in rows}
    for row in rows:
        if row.name in done:
            own[row.name] = _rate(done[row.name], "its own answers in the ledger")
    for name, members in done.items():
        if name in families and families[name] not in rates:
            rates[families[name]] = _rate(members, f"{name} in the ledger")
    costs = []
    for row in rows:
        there = len(done.get(row.name, ()))
        if row.name not in own and families[row.name] not in rates:
            rates[families[row.name]] = measured(row, run, device)
        costs.append(Cost(row.name, there, problems - there, own.get(row.name) or rates[families[row.name]]))
    return costs


def family(configuration: Mapping[str, Any]) -> str:
    """What configurations have in common that differ in arguments only: model, decoder, cache and driver."""
    parts = (configuration.get(slot) for slot in ("model", "decoder", "cache", "driver"))
    return "|".join(str(part.get(COMPONENT)) if isinstance(part, Mapping) else str(part) for part in parts)


def measured(row: Row, run: RunOptions, device: torch.device) -> Rate:
    """The rate of the row's first problem, decoded now by itself. On a GPU its models are on the CPU again afterwards."""
    for model in row.models:
        model.to(device=device, dtype=getattr(torch, run.dtype))
    output, room = None, Room(1, lambda *_: None)
    # Only the first call loads kernels and compiles; the CPU has too little of that to pay a second decode for.
    for _ in range(2 if run.compile is True or device.type != "cpu" else 1):
        ((_, output),) = room.parts([0], functools.partial(_decode, row, run=run))
    for model in row.models if device.type != "cpu" else ():
        model.to("cpu")
    if output is None:
        return Rate(0.0, 0.0, f"nothing: a problem of {row.name} does not fit into memory, alone")
    return Rate(float(output.stats.nfe[0]), output.stats.seconds, f"one problem of {row.name}, decoded alone")


def print_costs(costs: Sequence[Cost], stream: IO[str] | None = None) -> None:
    """The plan: one line for all, then one for each configuration that is not finished. To stderr, unless `stream` is given."""
    stream = stream or sys.stderr
    missing, done = sum(cost.missing for cost in costs), sum(cost.done for cost in costs)
    finished = sum(cost.missing == 0 for cost in costs)
    forwards, seconds = sum(cost.forwards for cost in costs), sum(cost.seconds for cost in costs)
    skipped = f"; {finished} are finished and skipped" if finished else ""
    print(
        f"plan: {len(costs)} configurations{skipped}; {missing:,} of {missing + done:,} answers to decode, "
        f"about {forwards:,.0f} forwards and {duration(seconds)}",
        file=stream,
    )
    for cost in costs:
        if cost.missing:
            line = f"{cost.missing} answers, about {cost.forwards:,.0f} forwards, {duration(cost.seconds)} (from {cost.rate.source})"
            print(f"  {cost.name}: {line}", file=stream)


def duration(seconds: float) -> str:
    """Seconds in a reader's units."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rate(records: Sequence[Record], source: str) -> Rate:
    count = len(records)
    return Rate(sum(record.nfe for record in records) / count, sum(record.seconds for record in records) / count, source)
