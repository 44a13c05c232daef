"""What surrounds a forward, as pure functions: what is asked of the model, in which lanes, and what the engine remembers afterwards.

    look       region -> cache.plan -> which positions are computed, read and visible, and how wide the busiest row is
    prepare    the same as a `Query` of so many lanes and reads
    after      the engine's memory once the forward has run

Each runs eagerly, compiled, or as part of a recorded graph (engine.py); none reads the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit import sheets
from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.models.base import Query
from dllm_toolkit.ops import lanes, masks
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, PyTree, Tokens


@dataclass(frozen=True)
class Memory:
    """What the engine remembers from one forward to the next.

    own: the cache's state; written: the token that the keys and values of every slot come from, -1 for none; nfe, lanes: forwards and query
    tokens of each row so far.
    """

    own: PyTree
    written: Tokens
    nfe: Int[Tensor, "B"]
    lanes: Int[Tensor, "B"]


class Look(NamedTuple):
    """What the coming forward is about. counts: the sizes that the host must know, the number of unfinished rows last."""

    plan: Plan
    dirty: Canvas
    wanted: Canvas
    asked: Canvas | None
    counts: Int[Tensor, "N"]


def look(cache: Cache, count: int, plain: bool, state: State, region: Region, shadows: Canvas | None, memory: Memory) -> Look:
    """count: canvases that share a row of the buffer; plain: there is one, and nobody asks for shadows."""
    alive = ~state.done.unsqueeze(1)
    dirty = memory.written != state.tokens
    plan = cache.plan(region, state, memory.own, dirty)
    plan = Plan(plan.compute & plan.visible & alive, plan.visible)
    wanted = region.read & alive
    asked = None if shadows is None else shadows & plan.visible & alive
    if plain:
        counts = torch.stack((plan.compute.sum(1).amax(), wanted.sum(1).amax(), (~state.done).sum()))
    else:
        counts = sheets.Needed(plan.visible, plan.compute, wanted, asked, state.done, count).counts()
    return Look(plan, dirty, wanted, asked, counts)


def prepare(width: int, reads: int, slots: int, state: State, region: Region, seen: Look) -> tuple[Query, Int[Tensor, "B R"]]:
    """The query of a forward in which every lane has the slot of its position, and the positions that are read.

    slots: of a row of the buffer; the last one is the trash slot, those between it and the canvas are never used.
    """
    length, spec, trash = state.tokens.shape[1], state.spec, slots - 1
    positions = lanes.pack(seen.plan.compute, width)  # [B, W]
    where = lanes.pack(seen.wanted, reads)  # [B, R]
    dead: Bool[Tensor, "B W 1"] = (positions == length).unsqueeze(2)
    allow = masks.lanes_allow(spec.attention, seen.plan.visible, region.block, positions) & ~dead
    # A dead lane sees the trash slot only: its softmax stays finite and it learns nothing of the row.
    unused = torch.zeros_like(dead).expand(-1, -1, trash - length)
    allow = torch.cat((allow, unused, dead), dim=2)  # [B, W, S]
    query = Query(
        tokens=lanes.to_lanes(state.tokens, positions, spec.pad_id),
        positions=positions.clamp(max=length - 1),
        slots=torch.where(positions < length, positions, trash),
        allow=allow,
        read=sheets.source(where, spec.shift, length),
        prompt=positions < state.begin.unsqueeze(1),
    )
    return query, where


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
