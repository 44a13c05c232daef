"""What surrounds a forward, as pure functions: what is asked of the model, in which lanes, and what the engine remembers afterwards.

    look       region -> cache.plan -> which positions are computed, read and visible, and how wide the busiest row is
    prepare    the same as a `Query` of so many lanes and reads
    after      the engine's memory once the forward has run

Each runs eagerly, compiled, or as part of a recorded graph (engine.py); none reads the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit import sheets
from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.models.base import Flat, Query
from dllm_toolkit.ops import lanes, masks
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, ModelSpec, PyTree, Tokens


@dataclass(frozen=True)
class Memory:
    """What the engine remembers from one forward to the next.

    own: the cache's state; written: the token that the keys and values of every slot come from, -1 for none; nfe, lanes: forwards and query
    tokens of each row so far.
    """

    own: PyTree
    written: Int[Tensor, "N L"]  # a row for every branch of a row
    nfe: Int[Tensor, "B"]
    lanes: Int[Tensor, "B"]


class Look(NamedTuple):
    """What the coming forward is about. counts: what the host must know, the number of unfinished rows last.

    With one canvas a row: the most lanes and reads of a row, then the lanes of each row if they were asked for. Otherwise see
    `sheets.Needed.counts`.
    """

    plan: Plan
    dirty: Canvas
    wanted: Canvas
    asked: Canvas | None
    counts: Int[Tensor, "N"]


def look(
    cache: Cache, count: int, plain: bool, each: bool, state: State, region: Region, shadows: Canvas | None, memory: Memory
) -> Look:
    """count: canvases that share a row of the buffer; plain: one, and nobody asks for shadows; each: count the lanes of each row."""
    alive = ~state.done.unsqueeze(1)
    dirty = memory.written != state.tokens
    plan = cache.plan(region, state, memory.own, dirty)
    plan = Plan(plan.compute & plan.visible & alive, plan.visible)
    wanted = region.read & alive
    asked = None if shadows is None else shadows & plan.visible & alive
    if plain:
        rows = plan.compute.sum(1)
        first, left = (rows.amax(), wanted.sum(1).amax()), (~state.done).sum()
        counts = torch.cat((torch.stack(first), rows, left.unsqueeze(0))) if each else torch.stack((*first, left))
    else:
        counts = sheets.Needed(plan.visible, plan.compute, wanted, asked, state.done, count).counts()
    return Look(plan, dirty, wanted, asked, counts)


class Part(NamedTuple):
    """What a query is made of; of all rows, or of one.

    compute, visible, wanted: positions that are run, seen and read; block: of every position; begin: of the answer.
    """

    compute: Canvas
    visible: Canvas
    wanted: Canvas
    tokens: Tokens
    block: Tokens
    begin: Int[Tensor, "B"]

    @classmethod
    def of(cls, state: State, region: Region, seen: Look) -> Part:
        return cls(seen.plan.compute, seen.plan.visible, seen.wanted, state.tokens, region.block, state.begin)

    def row(self, row: int) -> Part:
        return Part(*(one[row : row + 1] for one in self))

    def without(self, rows: Sequence[int]) -> Part:
        """The same, but nothing of these rows is computed."""
        compute = self.compute.clone()
        for row in rows:
            compute[row] = False
        return self._replace(compute=compute)


def prepare(
    spec: ModelSpec, width: int, reads: int, slots: int, part: Part, flat: int | None = None
) -> tuple[Query, Int[Tensor, "B R"]]:
    """The query of a forward in which every lane has the slot of its position, and the positions that are read.

    slots: of a row of the buffer; the last one is the trash slot, those between it and the canvas are never used. flat: the number of live
    lanes of all rows, or more, if they are to be computed one behind the other.
    """
    length, trash = part.tokens.shape[1], slots - 1
    positions = lanes.pack(part.compute, width)  # [B, W]
    where = lanes.pack(part.wanted, reads)  # [B, R]
    gone = positions == length
    dead: Bool[Tensor, "B W 1"] = gone.unsqueeze(2)
    allow = masks.lanes_allow(spec.attention, part.visible, part.block, positions) & ~dead
    # A dead lane sees the trash slot only: its softmax stays finite and it learns nothing of the row.
    unused = (torch.zeros_like(dead).expand(-1, -1, trash - length),) if trash > length else ()
    query = Query(
        tokens=lanes.to_lanes(part.tokens, positions, spec.pad_id),
        positions=positions.masked_fill(gone, 0),  # a padded canvas may be longer than the model's positions
        slots=positions.masked_fill(gone, trash) if trash > length else positions,
        allow=torch.cat((allow, *unused, dead), dim=2),  # [B, W, S]
        read=sheets.source(where, spec.shift, length),
        prompt=positions < part.begin.unsqueeze(1),
        flat=None if flat is None else _flat(~gone, flat),
    )
    return query, where


def _flat(live: Bool[Tensor, "B W"], count: int) -> Flat:
    """The live lanes are the first of their row. By rows, then within them: PyTorch 2.11 cannot compile a scan over many thousand lanes."""
    rows, width = live.shape
    each = live.sum(1)  # [B]
    end = each.cumsum(0)
    begin = end - each
    number = torch.arange(count, device=live.device)
    row = (end.unsqueeze(0) <= number.unsqueeze(1)).sum(1)  # [N], B behind the last live lane
    lane = number - begin[row.clamp(max=rows - 1)] + row * width
    # There is a dead lane wherever there are fewer live ones than flat places: it fills them, and ends in the trash slot of its row.
    spare = (each < width).long().argmax(0, keepdim=True)
    dead = spare * width + each.gather(0, spare)  # [1]
    place = (begin.unsqueeze(1) + torch.arange(width, device=live.device)).clamp(max=count - 1)
    return Flat(torch.where(row < rows, lane, dead), place)


LANES_OF_A_FLOOR = 256
"""Forwards of fewer lanes take no less time: they wait for the weights. Hardware of 2022 to 2025: some 200 to 300 operations a byte."""
SHARE_OF_ATTENTION = 0.15
"""What a dead lane costs that only attention computes, in live lanes: few operations in a slow kernel. An estimate."""


class Shape(NamedTuple):
    """Sizes of a forward: lanes of a row, flat lanes of all rows (None: not flat), and rows that get a forward of their own before it."""

    width: int
    flat: int | None
    apart: list[int]


def shape_of(counts: Sequence[int], widths: Sequence[int]) -> Shape:
    """The cheapest way to compute so many lanes of each row: one forward, or rows that alone would make it wide on their own before it."""

    def fitting(count: int) -> int:
        return next(width for width in widths if width >= count)

    def one(count: int) -> float:
        return max(count, LANES_OF_A_FLOOR)

    def whole(width: int, total: int) -> tuple[float, int | None]:
        padded, flat = len(counts) * width, _coarse(total)
        if flat >= padded:
            return one(padded), None
        return one(flat) + SHARE_OF_ATTENTION * padded, flat

    best: tuple[float, Shape] | None = None
    for width in widths:
        wide = [row for row, count in enumerate(counts) if count > width]
        if len(wide) == len(counts):
            continue
        cost, flat = whole(width, sum(count for count in counts if count <= width))
        cost += sum(one(fitting(counts[row])) for row in wide)
        if best is None or cost <= best[0]:
            best = cost, Shape(width, flat, wide)
        if not wide:
            break
    assert best is not None
    return best[1]


def _coarse(count: int) -> int:
    """The smallest of 256, 384, 512, 768, 1024, 1536, ... that is enough: few sizes, few graphs."""
    power = max(256, 1 << (count - 1).bit_length())
    return power * 3 // 4 if power > 256 and power * 3 // 4 >= count else power


def after(cache: Cache, branches: int, state: State, region: Region, seen: Look, memory: Memory) -> Memory:
    """Every unfinished row had one forward, whatever the number of its branches."""
    used, count = ~state.done, seen.plan.compute.sum(1)
    if seen.asked is not None:
        count = count + seen.asked.sum(1)
    if branches > 1:
        used, count = used.view(-1, branches).any(1), count.view(-1, branches).sum(1)
    return Memory(
        own=cache.update(seen.plan, region, state, memory.own, seen.dirty),
        written=torch.where(seen.plan.compute, state.tokens, memory.written),
        nfe=memory.nfe + used.long(),
        lanes=memory.lanes + count,
    )
