"""A decode with everything that happened in it: what the contract looks at.

`record` runs `decode.trace` with a listening cache and a listening model, so that every forward is seen as it was, also when a decoder
asks several times in one step. Logits are put back on the canvas, where two decodes of different width can be compared row by row.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.decode import Template, trace
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.engine import Asked
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
    """One forward: state, region, the cache's plan (as the cache gave it), the query, what was computed, logits on the canvas.

    With branches everything but the query has a row for each: row b * K + k is branch k of row b. shadow: logits of the positions that were
    asked anew, where `shaded`; None if the decoder asks for none.
    """

    state: State
    region: Region
    plan: Plan
    query: Query
    computed: Canvas
    read: Canvas
    logits: Float[Tensor, "B L V"]
    shaded: Canvas | None = None
    shadow: Float[Tensor, "B L V"] | None = None

    def first(self, row: int, rows: int) -> int:
        """The first branch of a row in a batch of `rows`; it is in use as long as the row goes on."""
        return row * (self.state.tokens.shape[0] // rows)

    def of_first(self, canvas: Tensor, rows: int) -> Tensor:
        """A canvas with a row for each branch, at the first branch of every row: the canvas that the step began with."""
        return canvas.view(rows, -1, canvas.shape[1])[:, 0]


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
    slots: int = 0  # of all rows of the K/V buffer together

    @property
    def last(self) -> State:
        return self.moments[-1].after if self.moments else self.first

    @property
    def asks(self) -> list[Ask]:
        return [ask for moment in self.moments for ask in moment.asks]

    def asks_of(self, row: int) -> list[Ask]:
        """The forwards in which a row took part."""
        rows = self.first.tokens.shape[0]
        return [ask for ask in self.asks if not bool(ask.state.done[ask.first(row, rows)])]

    def text(self, row: int) -> list[int]:
        """The answer of a row up to its end."""
        state = self.last
        return state.tokens[row, int(state.begin[row]) : int(state.end[row])].tolist()

    def fingerprint(self) -> list[Any]:
        """What must be equal for two decodes to be the same decode: tokens, when they were born, steps, forwards, lanes, slots."""
        state = self.last
        rows, length = state.tokens.shape
        answer = [slice(int(state.begin[row]), length) for row in range(rows)]
        return [
            [state.tokens[row, answer[row]].tolist() for row in range(rows)],
            [state.born[row, answer[row]].tolist() for row in range(rows)],
            state.step.tolist(),
            [len(self.asks_of(row)) for row in range(rows)],
            [int(sum(fold(ask.computed, rows, "sum")[row].sum() for ask in self.asks)) for row in range(rows)],
            self.slots,
        ]


def fold(canvas: Canvas, rows: int, how: Literal["any", "sum"] = "any") -> Tensor:
    """A mask with a row for each branch as one with a row for each of `rows` rows: in any branch, or in how many."""
    by_row = canvas.view(rows, -1, canvas.shape[1])
    return by_row.any(1) if how == "any" else by_row.sum(1)


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

    @property
    def path_free(self) -> bool:  # type: ignore[override]
        return self.inner.path_free

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
    """Any model, with its queries written down; `tamper` may get at the buffer around each forward. slots: of the largest buffer."""

    def __init__(self, model: Model, tamper: Tamper | None) -> None:
        self.model, self.tamper = model, tamper
        self.spec: ModelSpec = model.spec
        self.device = getattr(model, "device", torch.device("cpu"))
        self.query: Query | None = None
        self.slots = 0

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        self.slots = max(self.slots, rows * slots)
        return self.model.buffer(rows, slots)

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Tensor:
        assert kv is not None and query.read is not None
        undo = self.tamper(query, kv) if self.tamper else None
        logits = self.model(query, kv)
        if undo is not None:
            undo()
        self.query = query
        return logits


def _on_canvas(logits: Tensor, positions: Tensor, length: int) -> tuple[Canvas, Tensor]:
    """Logits of lanes as logits of positions, and which positions have some."""
    rows = positions.shape[0]
    found = torch.zeros(rows, length + 1, dtype=torch.bool).scatter(1, positions, True)[:, :length]
    canvas = torch.zeros(rows, length + 1, logits.shape[-1], dtype=logits.dtype)
    return found, canvas.scatter(1, positions.unsqueeze(-1).expand_as(logits), logits)[:, :length]


def _computed(asked: Asked, query: Query) -> Canvas:
    """Positions that went through the model: as the lanes say, or where branches share slots, as the engine says."""
    rows, length = asked.state.tokens.shape
    assert query.slots is not None
    if query.slots.shape[0] != rows:
        return asked.plan.compute
    landed = torch.zeros(rows, int(query.slots.amax()) + length + 1, dtype=torch.bool)
    return landed.scatter(1, query.slots, True)[:, :length]


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
    model_heard = _ListeningModel(model, tamper)
    moments: list[Moment] = []
    asks: list[Ask] = []
    first: State | None = None

    def hear(asked: Asked) -> None:
        planned, query, answer = listening.heard[-1], model_heard.query, asked.answer
        assert query is not None and planned.state is asked.state
        length = asked.state.tokens.shape[1]
        read, logits = _on_canvas(answer.logits, answer.positions, length)
        shadow = (None, None) if answer.shadow is None else _on_canvas(answer.shadow.logits, answer.shadow.positions, length)
        asks.append(Ask(asked.state, asked.region, planned.plan, query, _computed(asked, query), read, logits, *shadow))

    steps = trace(
        model_heard,
        decoder,
        batch.prompts,
        templates=batch.templates,
        cache=listening,
        seed=batch.seeds,
        max_steps=max_steps,
        listen=hear,
    )
    for step in steps:
        first = first or step.before
        moments.append(Moment(step.before, step.after, tuple(asks), keep(step.after)))
        asks.clear()
    assert first is not None
    return Recording(tuple(moments), first, model_heard.slots)


def sharing(decoders: Iterable[Decoder]) -> Callable[[Model, Decoder, Cache, Batch], Recording]:
    """`record` for decodes that many others are compared with: decoders that occur twice among `decoders` are decoded once a place.

    Decoders and caches are told apart by their `repr`, so none of them may hold tensors.
    """
    common = {said for said, count in Counter(map(repr, decoders)).items() if count > 1}
    made: dict[tuple[int, str, str, Batch], tuple[Model, Recording]] = {}

    def recorded(model: Model, decoder: Decoder, cache: Cache, batch: Batch) -> Recording:
        key = (id(model), repr(decoder), repr(cache), batch)
        if key in made:
            return made[key][1]
        recording = record(model, decoder, cache, batch)
        if key[1] in common:
            made[key] = (model, recording)  # with the model, whose id must not become another's
        return recording

    return recorded


def keep(state: State) -> State:
    """A copy that shares no memory with `state`."""
    return replace(copy.copy(state), tokens=state.tokens.clone(), masked=state.masked.clone(), born=state.born.clone())


def difference(one: Recording, row: int, other: Recording, other_row: int, tolerance: float = 1e-10) -> str | None:
    """How the forwards of a row differ between two decodes, in words; None if they agree in number, places and logits."""
    mine, theirs = one.asks_of(row), other.asks_of(other_row)
    rows, other_rows = one.first.tokens.shape[0], other.first.tokens.shape[0]
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        at, other_at = a.first(row, rows), b.first(other_row, other_rows)
        branches = min(a.state.tokens.shape[0] // rows, b.state.tokens.shape[0] // other_rows)
        for branch in range(branches):
            found = _difference(a, at + branch, b, other_at + branch, tolerance)
            if found is not None:
                return f"row {row}, forward {number}{f', branch {branch}' if branches > 1 else ''}: {found}"
    if len(mine) != len(theirs):
        return f"row {row}: {len(mine)} forwards instead of {len(theirs)}"
    return None


def difference_where_both_read(one: Recording, other: Recording, tolerance: float = 1e-10) -> str | None:
    """How two decodes differ of which the first may read more, in words: tokens, births, steps, forwards, the logits of what both read."""
    for what, a, b in zip(("tokens", "births", "steps", "forwards"), one.fingerprint(), other.fingerprint(), strict=False):
        if a != b:
            return f"{what}: {a} instead of {b}"
    for number, (a, b) in enumerate(zip(one.asks, other.asks, strict=True)):
        alive = ~b.state.done.unsqueeze(1)
        both = a.read & b.read
        if not torch.equal(both & alive, b.read & alive):
            return f"forward {number}: something is read by the second alone."
        gap = gaps(a.logits, b.logits)[both]
        if bool(both.any()) and float(gap.max()) > tolerance:
            return f"forward {number}: logits differ by {float(gap.max()):.2g}."
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
    pairs = [("logits", a.logits, b.logits)]
    if a.shadow is not None and b.shadow is not None:
        pairs.append(("shadow logits", a.shadow, b.shadow))
    for what, left, right in pairs:
        gap = gaps(left[row, :length], right[other_row, :length])
        if float(gap.max()) > tolerance:
            place = int(gap.argmax())
            return f"{what} at position {place} differ by {float(gap[place]):.3g}"
    return None
