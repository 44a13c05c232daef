"""The engine: the only mutable object. It turns a region into one forward and keeps the account.

    region -> cache.plan -> pack into lanes -> model(query, K/V buffer) -> logits of the read lanes

Guarantees that no rule can break live here: dead lanes write to the trash slot and see only it, finished rows get no lanes, what is
computed is visible, and every forward is counted for each row that took part in it. The host reads one small tensor a step (how
wide is the busiest row, is anybody left).

**Branches.** A decoder that looks ahead asks for K canvases of every row at once: `ask` gets a state of B * K rows, row b * K + k for
branch k of row b, and one that is `done` for a branch that is not in use. They are one forward of the row. `keep` says afterwards which
branch goes on; all of them then have its keys and values, and the cache remembers for all of them what it remembered for that one.

    form "rows"    every branch has its own row of the buffer; `keep` copies whole rows
    form "lanes"   the branches of a row share its slots; what a branch computes stands in scratch slots until `keep`

The second form, and the shadows of a canvas (positions that are asked anew, their token hidden), are laid out in sheets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit import sheets
from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.ops import lanes, masks, trees
from dllm_toolkit.state import Answer, Region, Shadow, State
from dllm_toolkit.types import Canvas, Rows

Form = Literal["rows", "lanes"]


@dataclass(frozen=True)
class Asked:
    """One forward as it happened: what was planned, what came back. Readers and tests look at it; rules do not.

    state, region, plan and answer have a row for every branch; plan.compute holds what went through the model.
    """

    state: State
    region: Region
    plan: Plan
    answer: Answer


class Engine:
    """Runs a model for one decode of B rows on a canvas of L positions.

    nfe, lanes [B]: forwards and query tokens of each row so far, whatever the number of branches. last: the most recent forward. over:
    nobody was left to ask for. listen: called with every forward, if somebody wants to know.
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
        branches: int = 1,
        form: Form = "rows",
    ) -> None:
        rows, length = state.tokens.shape
        self.model, self.cache = model, cache
        self.branches = branches
        self.sheets = branches if form == "lanes" else 1  # canvases that share a row of the buffer
        every = state if branches == 1 else state.branch(branches)
        self.own = cache.init(every)
        self.kv = model.buffer(rows * branches // self.sheets, length + 1)
        self.written = torch.full_like(every.tokens, -1)
        self.nfe = torch.zeros_like(state.step)
        self.lanes = torch.zeros_like(state.step)
        self.last: Asked | None = None
        self.listen: Callable[[Asked], None] | None = None
        self.over = False
        self.compile = compile
        self.max_reads = max_reads
        self.widths = widths or buckets(length)
        self._waiting = False  # for `keep`
        self._apart: lanes.SheetLanes | None = None  # lanes of the last forward, if some of their keys stand in scratch slots
        self._units: dict[Callable[..., Any], Callable[..., Any]] = {}
        if compile:
            _allow_graphs()
        self._forward: Callable[..., Tensor] = (
            torch.compile(model, mode="reduce-overhead", dynamic=False) if compile else model
        )

    def ask(self, state: State, region: Region, shadows: Canvas | None = None) -> Answer:
        """One forward. Logits of every read position of every unfinished row, aligned with the position they predict.

        shadows: positions that are asked anew, each with its own token hidden (`Answer.shadow`); models with shift 0 only. They take as
        many more lanes. With branches, state and region have B * K rows, and so has the answer; `keep` must follow.
        """
        assert not self._waiting, "Engine.keep must say which branch goes on before the next Engine.ask"
        alive = ~state.done.unsqueeze(1)
        dirty = self.written != state.tokens
        plan = self.cache.plan(region, state, self.own, dirty)
        plan = Plan(plan.compute & plan.visible & alive, plan.visible)
        wanted = region.read & alive
        asked = None if shadows is None else shadows & plan.visible & alive
        if self.sheets == 1 and asked is None:
            answer = self._plain(state, region, plan, wanted)
        else:
            answer = self._spread(state, region, plan, wanted, asked)
        if answer is None:
            return self._nothing(state, shadows is not None)
        self.written = torch.where(plan.compute, state.tokens, self.written)
        self.own = self.cache.update(plan, region, state, self.own, dirty)
        used, count = ~state.done, plan.compute.sum(1)
        if asked is not None:
            count = count + asked.sum(1)
        if self.branches > 1:
            self._waiting = True
            used, count = used.view(-1, self.branches).any(1), count.view(-1, self.branches).sum(1)
        self.nfe = self.nfe + used.long()
        self.lanes = self.lanes + count
        if self.compile:  # the next forward overwrites what this one returned
            answer = trees.over(torch.clone, answer)
        self.last = Asked(state, region, plan, answer)
        if self.listen is not None:
            self.listen(self.last)
        return answer

    @property
    def computed(self) -> Float[Tensor, "B"]:
        """Query tokens of each row that really ran: `lanes`, or fewer where the model says that it answered some from memory."""
        own = getattr(self.model, "computed", None)
        ran = None if own is None else own(self.kv)
        return self.lanes.float() if ran is None else ran

    def keep(self, choice: Int[Tensor, "B"]) -> None:
        """Go on with one branch of every row: its keys and values, and what the cache remembers of it, become those of all branches."""
        if not self._waiting:  # no branches, or nobody was left in the last forward
            return
        self._waiting = False
        source = torch.arange(choice.shape[0], device=choice.device) * self.branches + choice
        source = source.repeat_interleave(self.branches)  # [B * K]
        if self.sheets == 1:
            self.kv.pick(source)
        elif self._apart is not None:
            lane, scratch = self._apart, self.kv.slots - 1 - self.written.shape[1]
            mine = (lane.sheet == choice.unsqueeze(1)) & (lane.scratch < scratch) & ~lane.shadow
            trash = self.kv.slots - 1  # lanes that stay where they are copy the trash slot onto itself
            self.kv.move(
                torch.where(mine, self.written.shape[1] + lane.scratch, trash), torch.where(mine, lane.positions, trash)
            )
        self.own = trees.pick(self.own, source, source.shape[0])
        self.written = self.written.index_select(0, source)

    def accept(self, state: State, where: Canvas) -> None:
        """Positions of the last forward whose token turned out to be final: a draft that was verified. The cache may keep their K/V.

        Only what was computed in that forward, from the token that stands there now, is passed on.
        """
        if self.last is not None and not self.over:
            computed = self.last.plan.compute & (self.written == state.tokens)
            self.own = self.cache.accept(where & computed, self.own)

    def restart(self, where: Rows, state: State) -> None:
        """Rows begin anew where True, from those of `state`, a first state of as many rows: nothing of what was there is used again.

        Without branches only. Their slots keep old keys, as they held nothing before the first decode: `written` says that none counts.
        """
        assert self.branches == 1, "rows of a decoder with branches cannot begin anew"
        self.own = trees.choose(where, self.cache.init(state), self.own)
        self.written = self.written.masked_fill(where.unsqueeze(1), -1)
        self.nfe, self.lanes = self.nfe.masked_fill(where, 0), self.lanes.masked_fill(where, 0)

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

    def _plain(self, state: State, region: Region, plan: Plan, wanted: Canvas) -> Answer | None:
        """A forward in which every lane has the slot of its position. None if nobody is left."""
        # The one host read of a step.
        busiest, reads, left = torch.stack(
            (plan.compute.sum(1).amax(), wanted.sum(1).amax(), (~state.done).sum())
        ).tolist()
        self.over = left == 0
        if self.over:
            return None
        width, read_width = self._widths(busiest, reads, state.tokens.shape[1])
        positions = lanes.pack(plan.compute, width)  # [B, W]
        where = lanes.pack(wanted, read_width)  # [B, R]
        return Answer(self._forward(self._query(state, region, plan.visible, positions, where), self.kv), where)

    def _spread(self, state: State, region: Region, plan: Plan, wanted: Canvas, shadows: Canvas | None) -> Answer | None:
        """A forward over several canvases of a row, or over a canvas and its shadows. None if nobody is left."""
        length = state.tokens.shape[1]
        needed = sheets.Needed(plan.visible, plan.compute, wanted, shadows, state.done, self.sheets)
        # The one host read of a step.
        busiest, scratch, reads, shades, left = needed.counts().tolist()
        self.over = left == 0
        if self.over:
            return None
        self._make_room(scratch, length)
        layout = sheets.lay_out(
            state,
            region,
            needed,
            slots=self.kv.slots,
            width=min(_bucket(busiest), needed.length) if self.compile else max(busiest, 1),
            reads=self._widths(0, reads, length)[1],
            shades=self._widths(0, shades, length)[1],
        )
        self._apart = layout.lanes if scratch > 0 else None
        return layout.answer(self._forward(layout.query, self.kv))

    def _make_room(self, scratch: int, length: int) -> None:
        """At least so many scratch slots. Grows seldom, in powers of two; what stands in the slots of the canvas is copied."""
        if self.kv.slots - 1 - length < scratch:
            before = self.kv
            self.kv = self.model.buffer(self.written.shape[0] // self.sheets, length + _bucket(scratch) + 1)
            self.kv.take(before, length)

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
        return Query(
            tokens=lanes.to_lanes(state.tokens, positions, spec.pad_id),
            positions=positions.clamp(max=length - 1),
            slots=positions,
            allow=allow,
            read=sheets.source(where, spec.shift, length),
            prompt=positions < state.begin.unsqueeze(1),
        )

    def _nothing(self, state: State, shadows: bool) -> Answer:
        rows, length = state.tokens.shape
        _, reads = self._widths(0, 0, length)
        # Shape and type of every other answer, so that the last step needs no graph of its own.
        dtype = None if self.last is None else self.last.answer.logits.dtype
        logits = torch.zeros(rows, reads, state.spec.vocab_size, dtype=dtype, device=state.tokens.device)
        where = torch.full((rows, reads), length, device=state.tokens.device)
        return Answer(logits, where, Shadow(logits.clone(), where.clone()) if shadows else None)


def _allow_graphs(most: int = 1024) -> None:
    """Let one function have many graphs.

    `decide` and the model's forward are one code object each for every decoder, model, width and batch size of a process. At torch's
    limit of 8 graphs a comparison would fail in its fourth configuration, and forwards would fall back to eager without a word.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)


def _bucket(count: int) -> int:
    """The smallest of 16, 32, 64, ... that is enough."""
    return max(16, 1 << (count - 1).bit_length())


def buckets(length: int) -> tuple[int, ...]:
    """A handful of lane widths, so that compiled forwards come in few shapes: 16, 32, 64, ... and the canvas itself."""
    widths, width = [], 16
    while width < length:
        widths.append(width)
        width *= 2
    return (*widths, length)
