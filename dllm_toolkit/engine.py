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

import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit import rounds, sheets, workspace
from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.graphs import Pool, copy_all, leaves
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.pieces import Pieces
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.models.wrapper import recordable
from dllm_toolkit.ops import lanes, trees
from dllm_toolkit.rounds import Look, Memory, Part
from dllm_toolkit.state import Answer, Region, Shadow, State
from dllm_toolkit.types import Canvas, ModelSpec, PyTree, Rows, Tokens

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
    nobody was left to ask for. listen: called with every forward, if somebody wants to know. compile: see above.
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
        self.last: Asked | None = None
        self.listen: Callable[[Asked], None] | None = None
        self.over = False
        self.compile = compile
        self.max_reads = max_reads
        self.widths = widths or buckets(length)
        self._waiting = False  # for `keep`
        self._apart: lanes.SheetLanes | None = None  # lanes of the last forward, if some of their keys stand in scratch slots
        self._core = recordable(model) if compile else None
        # What stays for later decodes may be written to inside inference mode and outside.
        with torch.inference_mode(False), torch.no_grad():
            self._space = self._workspace(rows * branches // self.sheets, length, state)
            self._pool = self._space.pool
            self._warm_up = self._pool.seconds
            zeros = torch.zeros_like(state.step)
            first = Memory(cache.init(every), torch.full_like(every.tokens, -1), zeros, zeros.clone())
            self._memory: Memory = self._pool.hold(first)

    def _workspace(self, rows: int, length: int, state: State) -> workspace.Workspace:
        model, device = self.model, state.tokens.device
        pool = Pool(device) if self.compile else Pool(torch.device("cpu"))
        if self.compile:
            _allow_graphs()
        if pool.kind is None or self._core is None:
            return workspace.Workspace(model.buffer(rows, length + 1), pool)
        self._core.fuse()
        # The trash slot is the last of a whole number of 16: attention kernels want aligned rows of the mask.
        slots = -(-(length + 1) // 16) * 16
        key = (state.tokens.shape, rows, self.branches, self.sheets, state.spec, self.cache, self.widths, self.max_reads)
        assert isinstance(model, torch.nn.Module)
        return workspace.take(self, model, key, lambda: workspace.Workspace(model.buffer(rows, slots), pool))

    @property
    def kv(self) -> KVBuffer:
        return self._space.kv

    @property
    def own(self) -> PyTree:
        """The cache's state."""
        return self._memory.own

    @property
    def written(self) -> Tokens:
        """The token that the keys and values of every slot come from; -1 for none."""
        return self._memory.written

    @property
    def nfe(self) -> Int[Tensor, "B"]:
        return self._memory.nfe

    @property
    def lanes(self) -> Int[Tensor, "B"]:
        return self._memory.lanes

    @property
    def computed(self) -> Float[Tensor, "B"]:
        """Query tokens of each row that really ran: `lanes`, or fewer where the model says that it answered some from memory."""
        own = getattr(self.model, "computed", None)
        ran = None if own is None else own(self.kv)
        return self.lanes.float() if ran is None else ran

    @property
    def warm_up(self) -> float:
        """Seconds that this decode spent on compiling and recording; 0 without graphs."""
        return self._pool.seconds - self._warm_up

    def hold(self, state: State) -> State:
        """The state where the graphs read it: one object for all states of its form. Without graphs the state itself."""
        return self._pool.hold(state) if self.compile else state

    def ask(self, state: State, region: Region, shadows: Canvas | None = None, *, borrow: bool = False) -> Answer:
        """One forward. Logits of every read position of every unfinished row, aligned with the position they predict.

        shadows: positions that are asked anew, each with its own token hidden (`Answer.shadow`); models with shift 0 only. They take as
        many more lanes. With branches, state and region have B * K rows, and so has the answer; `keep` must follow. borrow: the answer is
        not used once the engine is asked again, so it need not be copied out of a graph's memory.
        """
        assert not self._waiting, "Engine.keep must say which branch goes on before the next Engine.ask"
        plain = self.sheets == 1 and shadows is None
        seen: Look = self._run(("look", plain), self._look(plain), state, region, shadows, self._memory)
        counts = seen.counts.tolist()  # the one host read of a step
        self.over = counts[-1] == 0
        if self.over:
            return self._nothing(state, shadows is not None)
        answer = (self._plain if plain else self._spread)(state, region, seen, counts)
        if self.branches > 1:
            self._waiting = True
        if self._pool.kind is not None and not (borrow and self.listen is None):
            answer = trees.over(torch.clone, answer)
        self.last = Asked(state, region, seen.plan, answer)
        if self.listen is not None:
            self.listen(self.last if self._pool.kind is None else trees.over(torch.clone, self.last))  # listeners may keep it
        return answer

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
        self._remember(own=trees.pick(self.own, source, source.shape[0]), written=self.written.index_select(0, source))

    def accept(self, state: State, where: Canvas) -> None:
        """Positions of the last forward whose token turned out to be final: a draft that was verified. The cache may keep their K/V.

        Only what was computed in that forward, from the token that stands there now, is passed on.
        """
        if self.last is not None and not self.over:
            computed = self.last.plan.compute & (self.written == state.tokens)
            self._remember(own=self.cache.accept(where & computed, self.own))

    def restart(self, where: Rows, state: State) -> None:
        """Rows begin anew where True, from those of `state`, a first state of as many rows: nothing of what was there is used again.

        Without branches only. Their slots keep old keys, as they held nothing before the first decode: `written` says that none counts.
        """
        assert self.branches == 1, "rows of a decoder with branches cannot begin anew"
        self._remember(
            own=trees.choose(where, self.cache.init(state), self.own),
            written=self.written.masked_fill(where.unsqueeze(1), -1),
            nfe=self.nfe.masked_fill(where, 0),
            lanes=self.lanes.masked_fill(where, 0),
        )

    def finished(self, state: State) -> bool:
        """Nothing left to do? Known from the host read of the last `ask`, so it costs nothing; one step late by design."""
        return self.over

    def unit(self, function: Callable[..., Any], *, borrow: bool = False, light: bool = False) -> Callable[..., Any]:
        """`function` compiled as one graph when this engine compiles, itself otherwise.

        borrow: what it returns is not used once it is called again, so it need not be copied out of a graph's memory. light: a few
        operations, worth compiling only where each is a launch.
        """
        if not self.compile or (light and self._pool.kind is None):
            return function
        unit = self._space.unit(_rule(function), function)
        if borrow or self._pool.kind is None:
            return unit
        return lambda *arguments: trees.over(torch.clone, unit(*arguments))

    def _run(self, name: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """A light function of the engine's own."""
        return function(*arguments) if self._pool.kind is None else self._space.unit(name, function)(*arguments)

    def _remember(self, **changes: Any) -> None:
        self._memory = self._pool.hold(replace(self._memory, **changes))

    def _look(self, plain: bool) -> Callable[..., Look]:
        cache, count = self.cache, self.sheets
        each = self._pool.kind is not None

        def look(state: State, region: Region, shadows: Canvas | None, memory: Memory) -> Look:
            return rounds.look(cache, count, plain, each, state, region, shadows, memory)

        return look

    def _after(self) -> Callable[..., Memory]:
        cache, branches = self.cache, self.branches

        def after(state: State, region: Region, seen: Look, memory: Memory) -> Memory:
            return rounds.after(cache, branches, state, region, seen, memory)

        return after

    def _plain(self, state: State, region: Region, seen: Look, counts: list[int]) -> Answer:
        """A forward in which every lane has the slot of its position."""
        spec, kv = state.spec, self.kv
        slots = kv.slots
        width, reads = self._widths(counts[0], counts[1], state.tokens.shape[1])
        if self._pool.kind is None or self._core is None:

            def direct(state: State, region: Region, seen: Look) -> tuple[Query, Tensor]:
                return rounds.prepare(spec, width, reads, slots, Part.of(state, region, seen))

            query, where = self._run(("prepare", slots, width, reads), direct, state, region, seen)
            answer = Answer(self._forward(query, kv), where)
            self._memory = self._pool.hold(self._run("after", self._after(), state, region, seen, self._memory))
            return answer
        alone: list[tuple[int, Tensor]] = []
        left: Part | None = None
        flat: int | None = None
        if len(counts) > 4 and self._core is self.model:
            width, flat, apart = rounds.shape_of(counts[2:-1], self.widths)
            if apart:
                part = Part.of(state, region, seen)
                alone = [(row, self._alone(part.row(row), counts[2 + row], reads, row, spec).clone()) for row in apart]
                left = part.without(apart)
        name = ("forward", id(kv), width, reads, flat, left is None)
        unit = self._space.units.get(name)
        if unit is None:
            prepare, after = torch.compile(rounds.prepare, fullgraph=True, dynamic=False), self._after()
            after, run = torch.compile(after, fullgraph=True, dynamic=False), self._forward

            def forward(state: State, region: Region, seen: Look, memory: Memory, left: Part | None) -> Answer:
                query, where = prepare(spec, width, reads, slots, Part.of(state, region, seen) if left is None else left, flat)
                logits = run(query, kv)
                copy_all(zip(leaves(memory), leaves(after(state, region, seen, memory)), strict=True))
                return Answer(logits, where)

            unit = self._space.unit(name, forward, compiled=False)
        answer = unit(state, region, seen, self._memory, left)
        for row, logits in alone:
            answer.logits[row].copy_(logits[0])
        return answer

    def _alone(self, part: Part, count: int, reads: int, row: int, spec: ModelSpec) -> Tensor:
        """A forward of one row, which alone would make the others' wide. The next one overwrites its logits [1, R, V].

        One graph serves all rows: the row is copied into a buffer of its own and back, which costs little beside so many lanes.
        """
        kv, slots, width = self.kv, self.kv.slots, self._widths(count, 0, part.tokens.shape[1])[0]
        name = ("alone", id(kv), width, reads)
        unit = self._space.units.get(name)
        if unit is None:
            single, run = self._space.one_row(self.model.buffer), self._forward
            prepare = torch.compile(rounds.prepare, fullgraph=True, dynamic=False)

            def forward(part: Part, row: Tensor) -> Tensor:
                single.take_row(kv, row)
                query, _ = prepare(spec, width, reads, slots, part)
                logits = run(query, single)
                single.give_row(kv, row)
                return logits

            unit = self._space.unit(name, forward, compiled=False)
        return unit(part, torch.full((1,), row, device=part.tokens.device))  # a fill, where a copy from the host would wait

    def _spread(self, state: State, region: Region, seen: Look, counts: list[int]) -> Answer:
        """A forward over several canvases of a row, or over a canvas and its shadows."""
        length = state.tokens.shape[1]
        busiest, scratch, reads, shades, _ = counts
        needed = sheets.Needed(seen.plan.visible, seen.plan.compute, seen.wanted, seen.asked, state.done, self.sheets)
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
        kv, forward = self.kv, self._forward
        if self._pool.kind is None or self._core is None:
            logits = forward(layout.query, kv)
        else:
            logits = self._space.unit(("sheets", id(kv)), lambda query: forward(query, kv), compiled=False)(layout.query)
        self._memory = self._pool.hold(self._run("after", self._after(), state, region, seen, self._memory))
        return layout.answer(logits)

    def _make_room(self, scratch: int, length: int) -> None:
        """At least so many scratch slots. Grows seldom, in powers of two; what stands in the slots of the canvas is copied."""
        if self.kv.slots - 1 - length < scratch:
            before = self.kv
            with torch.inference_mode(False), torch.no_grad():  # as the first one: the next decode takes it, too
                self._space.kv = self.model.buffer(self.written.shape[0] // self.sheets, length + _bucket(scratch) + 1)
            self._space.kv.take(before, length)
            self._space.unused.append(before)  # graphs may be recorded on it; another buffer must not get its name

    def _widths(self, busiest: int, reads: int, length: int) -> tuple[int, int]:
        if not self.compile:
            return max(busiest, 1), max(reads, 1)
        width = next(width for width in self.widths if width >= busiest)
        most = min(self.max_reads or length, length)
        if self._pool.kind is None:
            return width, most
        return width, min(most, next(width for width in self.widths if width >= reads))

    @functools.cached_property
    def _forward(self) -> Callable[[Query, KVBuffer], Tensor]:
        """The model; compiled when this engine compiles."""
        model: Callable[..., Tensor] = self.model
        if not self.compile:
            return model
        if self._core is None:
            return torch.compile(model, dynamic=False)
        return _in_pieces(model, self._core, Pieces())

    def _nothing(self, state: State, shadows: bool) -> Answer:
        rows, length = state.tokens.shape
        _, reads = self._widths(0, 0, length)
        # Shape and type of every other answer, so that the last step needs no graph of its own.
        dtype = None if self.last is None else self.last.answer.logits.dtype
        logits = torch.zeros(rows, reads, state.spec.vocab_size, dtype=dtype, device=state.tokens.device)
        where = torch.full((rows, reads), length, device=state.tokens.device)
        return Answer(logits, where, Shadow(logits.clone(), where.clone()) if shadows else None)


def _rule(function: Callable[..., Any]) -> Hashable:
    """A name for a decoder's function: that of an equal decoder, however often it is made. A decoder may hold two template decoders."""
    owner = getattr(function, "__self__", None)
    try:
        hash(owner)
    except TypeError:
        owner = None
    return ("rule", function) if owner is None else ("rule", type(owner), owner, getattr(function, "__func__", function))


def _in_pieces(model: Callable[..., Tensor], core: Transformer, pieces: Pieces) -> Callable[[Query, KVBuffer], Tensor]:
    """`model`, whose transformer runs in compiled pieces. Not kept alive: this stays on the model, and would never be gone with it."""
    inner, whole = weakref.ref(core), weakref.ref(model)

    def forward(query: Query, kv: KVBuffer) -> Tensor:
        core, model = inner(), whole()
        assert core is not None and model is not None  # the engine that calls has them
        with core.in_pieces(pieces):
            return model(query, kv)

    return forward


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
    """A handful of lane widths, so that compiled forwards come in few shapes: 16, 32, 64, 96, 128, 192, 256, ... and the canvas itself."""
    widths, width = [16, 32], 64
    while width < length:
        widths += [width, width + width // 2]
        width *= 2
    return (*(one for one in widths if one < length), length)


def canvas_length(length: int, device: torch.device) -> int:
    """The length of a canvas in compiled decoding: few lengths, few graphs.

    On a GPU they are far apart. What a longer canvas costs there is a little attention, and a new length is half a minute of compiling.
    """
    step = 256 if device.type == "cuda" and length > 128 else 128 if device.type == "cuda" else 64
    return -(-length // step) * step


def whether_to_compile(choice: bool | Literal["auto"], model: Model) -> bool:
    """`choice`; "auto": on a GPU, if the model's forward can be recorded."""
    device = getattr(model, "device", None)
    on_gpu = device is not None and torch.device(device).type == "cuda"
    return (on_gpu and recordable(model) is not None) if choice == "auto" else choice
