"""The engine: the only mutable object. It turns a region into one forward and keeps the account.

    region -> cache.plan -> pack into lanes -> model(query, K/V buffer) -> logits of the read lanes

Guarantees that no rule can break live here: dead lanes write to the trash slot and see only it, finished rows get no lanes, what is
computed is visible, and every forward is counted for each row that took part in it. The host reads one small tensor a step (how
wide is the busiest row, is anybody left).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.ops import lanes, masks
from dllm_toolkit.state import Answer, Region, State
from dllm_toolkit.types import Canvas


@dataclass(frozen=True)
class Asked:
    """One forward as it happened: what was planned, what came back. Readers and tests look at it; rules do not."""

    region: Region
    plan: Plan
    answer: Answer


class Engine:
    """Runs a model for one decode of B rows on a canvas of L positions.

    nfe, lanes [B]: forwards and query tokens of each row so far. last: the most recent forward. over: nobody was left to ask for.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        state: State,
        *,
        max_reads: int | None = None,
        widths: tuple[int, ...] | None = None,
        compile: bool = False,
    ) -> None:
        rows, length = state.tokens.shape
        self.model, self.cache = model, cache
        self.own = cache.init(state)
        self.kv = model.buffer(rows, length + 1)
        self.written = torch.full_like(state.tokens, -1)
        self.nfe = torch.zeros_like(state.step)
        self.lanes = torch.zeros_like(state.step)
        self.last: Asked | None = None
        self.over = False
        self.compile = compile
        self.max_reads = max_reads
        self.widths = widths or buckets(length)
        self._units: dict[Callable[..., Any], Callable[..., Any]] = {}
        if compile:
            _allow_graphs()
        self._forward: Callable[..., Tensor] = (
            torch.compile(model, mode="reduce-overhead", dynamic=False) if compile else model
        )

    def ask(self, state: State, region: Region) -> Answer:
        """One forward. Logits of every read position of every unfinished row, aligned with the position they predict."""
        length = state.tokens.shape[1]
        alive = ~state.done.unsqueeze(1)
        dirty = self.written != state.tokens
        plan = self.cache.plan(region, state, self.own, dirty)
        plan = Plan(plan.compute & plan.visible & alive, plan.visible)
        wanted = region.read & alive
        # The one host read of a step.
        busiest, reads, left = torch.stack(
            (plan.compute.sum(1).amax(), wanted.sum(1).amax(), alive.sum())
        ).tolist()
        self.over = left == 0
        if self.over:
            return self._nothing(state)
        width, read_width = self._widths(busiest, reads, length)
        positions = lanes.pack(plan.compute, width)  # [B, W]
        where = lanes.pack(wanted, read_width)  # [B, R]
        logits = self._forward(self._query(state, region, plan.visible, positions, where), self.kv)
        self.written = torch.where(plan.compute, state.tokens, self.written)
        self.own = self.cache.update(plan, region, state, self.own, dirty)
        self.nfe = self.nfe + alive.squeeze(1).long()
        self.lanes = self.lanes + plan.compute.sum(1)
        answer = Answer(logits.clone() if self.compile else logits, where)
        self.last = Asked(region, plan, answer)
        return answer

    def accept(self, state: State, where: Canvas) -> None:
        """Positions of the last forward whose token turned out to be final: a draft that was verified. The cache may keep their K/V.

        Only what was computed in that forward, from the token that stands there now, is passed on.
        """
        if self.last is not None and not self.over:
            computed = self.last.plan.compute & (self.written == state.tokens)
            self.own = self.cache.accept(where & computed, self.own)

    def finished(self, state: State) -> bool:
        """Nothing left to do? Known from the host read of the last `ask`, so it costs nothing; one step late by design."""
        return self.over

    def unit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled as one graph when this engine compiles, itself otherwise."""
        if not self.compile:
            return function
        # Keyed by the bound method, not its name: a decoder may hold two template decoders.
        if function not in self._units:
            self._units[function] = torch.compile(function, fullgraph=True, dynamic=False)
        return self._units[function]

    def _widths(self, busiest: int, reads: int, length: int) -> tuple[int, int]:
        if not self.compile:
            return max(busiest, 1), max(reads, 1)
        return next(width for width in self.widths if width >= busiest), min(self.max_reads or length, length)

    def _query(
        self,
        state: State,
        region: Region,
        visible: Canvas,
        positions: Int[Tensor, "B W"],
        where: Int[Tensor, "B R"],
    ) -> Query:
        length = state.tokens.shape[1]
        spec = state.spec
        dead: Bool[Tensor, "B W 1"] = (positions == length).unsqueeze(2)
        allow = masks.lanes_allow(spec.attention, visible, region.block, positions) & ~dead
        # A dead lane sees the trash slot only: its softmax stays finite and it learns nothing of the row.
        allow = torch.cat((allow, dead), dim=2)  # [B, W, S]
        source = where if spec.shift == 0 else torch.where(where < length, (where - spec.shift).clamp(min=0), length)
        return Query(
            tokens=lanes.to_lanes(state.tokens, positions, spec.pad_id),
            positions=positions.clamp(max=length - 1),
            slots=positions,
            allow=allow,
            read=source,
            prompt=positions < state.begin.unsqueeze(1),
        )

    def _nothing(self, state: State) -> Answer:
        rows, length = state.tokens.shape
        _, reads = self._widths(0, 0, length)
        # Shape and type of every other answer, so that the last step needs no graph of its own.
        dtype = None if self.last is None else self.last.answer.logits.dtype
        logits = torch.zeros(rows, reads, state.spec.vocab_size, dtype=dtype, device=state.tokens.device)
        return Answer(logits, torch.full((rows, reads), length, device=state.tokens.device))


def _allow_graphs(most: int = 1024) -> None:
    """Let one function have many graphs.

    `decide` and the model's forward are one code object each for every decoder, model, width and batch size of a process. At torch's
    limit of 8 graphs a comparison would fail in its fourth configuration, and forwards would fall back to eager without a word.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)


def buckets(length: int) -> tuple[int, ...]:
    """A handful of lane widths, so that compiled forwards come in few shapes: 16, 32, 64, ... and the canvas itself."""
    widths, width = [], 16
    while width < length:
        widths.append(width)
        width *= 2
    return (*widths, length)
