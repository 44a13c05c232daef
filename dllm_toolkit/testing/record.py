"""A decode with everything that happened in it: what the contract looks at.

`record` runs `decode.trace` with a listening cache and a listening model, so that every forward is seen as it was, also when a decoder
asks several times in one step. Logits are put back on the canvas, where two decodes of different width can be compared row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.decode import Template, trace
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, ModelSpec, Need, PyTree


@dataclass(frozen=True)
class Batch:
    """Requests of unequal size: prompts, answer templates (None is decoded, an id is pinned), one seed each."""

    prompts: tuple[tuple[int, ...], ...]
    templates: tuple[Template, ...]
    seeds: tuple[int, ...]

    def take(self, rows: Sequence[int]) -> Batch:
        """Some rows, in the given order."""
        return Batch(
            tuple(self.prompts[row] for row in rows),
            tuple(self.templates[row] for row in rows),
            tuple(self.seeds[row] for row in rows),
        )

    def __len__(self) -> int:
        return len(self.prompts)


def unequal(seed: int = 0) -> Batch:
    """Four rows that share no length: a prompt of one token, an answer of one token, answers that fill no whole block."""
    return Batch(
        ((3, 1, 4, 1, 5), (9,), (2, 6, 5, 3, 5, 8, 9, 7), (11, 3, 2)),
        tuple((None,) * length for length in (8, 6, 1, 11)),
        tuple(range(seed, seed + 4)),
    )


def infill(seed: int = 0) -> Batch:
    """Canvases with pinned tokens: in the middle, a whole first block of four, the last position, nothing to do at all."""
    return Batch(
        ((3, 1, 4), (9,), (2, 6, 5, 3), (7, 7)),
        (
            (None, None, 12, None, None, None, 13, None, None),
            (1, 2, 3, 4, None, None, None),
            (None, None, None, None, None, 5),
            (8, 9),
        ),
        tuple(range(seed, seed + 4)),
    )


@dataclass(frozen=True)
class Ask:
    """One forward: the state it saw, the region, the cache's plan (as the cache gave it), the query, logits on the canvas."""

    state: State
    region: Region
    plan: Plan
    query: Query
    read: Canvas
    logits: Float[Tensor, "B L V"]

    @property
    def computed(self) -> Canvas:
        """Positions that went through the model."""
        assert self.query.slots is not None
        rows, length = self.state.tokens.shape
        landed = torch.zeros(rows, length + 1, dtype=torch.bool)
        return landed.scatter(1, self.query.slots, True)[:, :length]


@dataclass(frozen=True)
class Moment:
    """One step of the decoder: before, after, every forward in between, and copies that nobody else can have changed."""

    before: State
    after: State
    asks: tuple[Ask, ...]
    kept: State


@dataclass(frozen=True)
class Recording:
    """A whole decode of a batch."""

    moments: tuple[Moment, ...]
    first: State

    @property
    def last(self) -> State:
        return self.moments[-1].after if self.moments else self.first

    @property
    def asks(self) -> list[Ask]:
        return [ask for moment in self.moments for ask in moment.asks]

    def asks_of(self, row: int) -> list[Ask]:
        """The forwards in which a row took part."""
        return [ask for ask in self.asks if not bool(ask.state.done[row])]

    def text(self, row: int) -> list[int]:
        """The answer of a row up to its end."""
        state = self.last
        return state.tokens[row, int(state.begin[row]) : int(state.end[row])].tolist()

    def fingerprint(self) -> list[Any]:
        """What must be equal for two decodes to be the same decode: tokens, when they were born, steps, forwards, lanes."""
        state = self.last
        rows, length = state.tokens.shape
        answer = [slice(int(state.begin[row]), length) for row in range(rows)]
        return [
            [state.tokens[row, answer[row]].tolist() for row in range(rows)],
            [state.born[row, answer[row]].tolist() for row in range(rows)],
            state.step.tolist(),
            [len(self.asks_of(row)) for row in range(rows)],
            [int(sum(ask.computed[row].sum() for ask in self.asks)) for row in range(rows)],
        ]


@dataclass(frozen=True)
class _Planned:
    state: State
    region: Region
    plan: Plan


@dataclass(frozen=True)
class _ListeningCache(Cache):
    """Any cache, with its plans written down."""

    inner: Cache
    heard: list[_Planned] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.inner.needs

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.inner.exact

    def init(self, state: State) -> PyTree:
        return self.inner.init(state)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        plan = self.inner.plan(region, state, own, dirty)
        self.heard.append(_Planned(state, region, plan))
        return plan

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return self.inner.update(plan, region, state, own, dirty)


Tamper = Callable[[Query, KVBuffer], Callable[[], None]]
"""Changes the K/V buffer before a forward; what it returns is called after it."""


class _ListeningModel:
    """Any model, with its answers written down; `tamper` may get at the buffer around each forward."""

    def __init__(self, model: Model, cache: _ListeningCache, tamper: Tamper | None) -> None:
        self.model, self.cache, self.tamper = model, cache, tamper
        self.spec: ModelSpec = model.spec
        self.device = getattr(model, "device", torch.device("cpu"))
        self.asks: list[Ask] = []

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return self.model.buffer(rows, slots)

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Tensor:
        assert kv is not None and query.read is not None
        undo = self.tamper(query, kv) if self.tamper else None
        logits = self.model(query, kv)
        if undo is not None:
            undo()
        planned = self.cache.heard[-1]
        length = kv.slots - 1
        where = torch.where(query.read < length, query.read + self.spec.shift, length)
        rows = logits.shape[0]
        read = torch.zeros(rows, length + 1, dtype=torch.bool).scatter(1, where, True)[:, :length]
        canvas = torch.zeros(rows, length + 1, logits.shape[-1], dtype=logits.dtype)
        canvas = canvas.scatter(1, where.unsqueeze(-1).expand_as(logits), logits)[:, :length]
        self.asks.append(Ask(planned.state, planned.region, planned.plan, query, read, canvas))
        return logits


def record(
    model: Model,
    decoder: Decoder,
    cache: Cache,
    batch: Batch,
    *,
    max_steps: int | None = None,
    tamper: Tamper | None = None,
) -> Recording:
    """Decode `batch` and keep everything. Ends without an error when the step limit is reached; look at `last.done`."""
    listening = _ListeningCache(cache)
    model_heard = _ListeningModel(model, listening, tamper)
    moments: list[Moment] = []
    first: State | None = None
    taken = 0
    steps = trace(
        model_heard,
        decoder,
        batch.prompts,
        templates=batch.templates,
        cache=listening,
        seed=batch.seeds,
        max_steps=max_steps,
    )
    for step in steps:
        first = first or step.before
        asks = tuple(model_heard.asks[taken:])
        taken = len(model_heard.asks)
        moments.append(Moment(step.before, step.after, asks, keep(step.after)))
    assert first is not None
    return Recording(tuple(moments), first)


def keep(state: State) -> State:
    """A copy that shares no memory with `state`."""
    return replace(copy.copy(state), tokens=state.tokens.clone(), masked=state.masked.clone(), born=state.born.clone())


def difference(one: Recording, row: int, other: Recording, other_row: int, tolerance: float = 1e-10) -> str | None:
    """How the forwards of a row differ between two decodes, in words; None if they agree in number, places and logits."""
    mine, theirs = one.asks_of(row), other.asks_of(other_row)
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        found = _difference(a, row, b, other_row, tolerance)
        if found is not None:
            return f"row {row}, forward {number}: {found}"
    if len(mine) != len(theirs):
        return f"row {row}: {len(mine)} forwards instead of {len(theirs)}"
    return None


def gaps(one: Float[Tensor, "... V"], other: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """Largest difference of two distributions' logits; equal infinities agree, NaN differs from everything by infinity."""
    apart = (one - other).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return torch.where(one == other, 0.0, apart).amax(-1)


def _difference(a: Ask, row: int, b: Ask, other_row: int, tolerance: float) -> str | None:
    length = min(a.read.shape[1], b.read.shape[1])
    mine, theirs = a.read[row].nonzero().flatten().tolist(), b.read[other_row].nonzero().flatten().tolist()
    if mine != theirs:
        return f"read positions {mine} instead of {theirs}"
    gap = gaps(a.logits[row, :length], b.logits[other_row, :length])
    if float(gap.max()) > tolerance:
        place = int(gap.argmax())
        return f"logits at position {place} differ by {float(gap[place]):.3g}"
    return None
