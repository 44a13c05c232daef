"""Nested: finished blocks are stored for good, and in the open block only what is being decoded is computed between refreshes.

block_causal            computes the whole open block in every forward
nested                  computes it when the open span moves, then the span alone
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, Need, PyTree


@dataclass(frozen=True)
class Kept:
    """Stored positions, and the epoch of the last refresh."""

    stored: Canvas
    epoch: Int[Tensor, "B"]


@register("cache", "nested")
@dataclass(frozen=True)
class NestedCache(Cache):
    """The block-causal cache outside the open block, the dual cache inside it.

    Exact for schedules that open whole blocks only; with parts of blocks the keys of the other parts are those of the last refresh.

    Reference: Fast-dLLM v2, arXiv 2509.26328, block cache and sub-block cache.
    """

    cite = ("2509.26328",)
    needs = frozenset({Need.BLOCK_CAUSAL})

    def init(self, state: State) -> Kept:
        return Kept(torch.zeros_like(state.masked), torch.full_like(state.begin, -1))

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        # Dirty: a token that was decided since its keys were computed. Fill may keep the keys of its masks.
        wanted = (region.epoch != own.epoch).unsqueeze(1) | region.span | region.closed | (dirty & ~state.filled)
        return Plan(region.visible & ~own.stored & wanted, region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> Kept:
        alive = ~state.done
        stored = own.stored | (plan.compute & region.closed & alive.unsqueeze(1))
        return Kept(stored, torch.where(alive, region.epoch, own.epoch))
