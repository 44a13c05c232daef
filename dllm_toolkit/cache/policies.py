"""The cache policies that remember no more than an epoch or a mask: none, prefix, dual, block-causal.

                 at a refresh     between refreshes            refresh when          exact
    none         all              all                          always                yes
    prefix       all              from the open block on       the open span moves   no
    dual         all              the open span                the open span moves   no
    block_causal -                what is not stored yet       never                 yes, if the past never sees the future
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


@register("cache", "none")
@dataclass(frozen=True)
class NoCache(Cache):
    """Compute everything visible in every step."""

    exact = True

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible, region.visible)


def _moved(region: Region, own: Int[Tensor, "B"]) -> Canvas:
    return (region.epoch != own).unsqueeze(1)


@register("cache", "prefix")
@dataclass(frozen=True)
class PrefixCache(Cache):
    """Keep the K/V of what lies before the open block; recompute the block and everything behind it.

    Reference: Fast-dLLM, arXiv 2505.22618, prefix cache.
    """

    cite = ("2505.22618",)
    path_free = True

    def init(self, state: State) -> PyTree:
        return torch.full_like(state.begin, -1)  # epoch of the last refresh

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        start = torch.where(region.span, state.positions, state.tokens.shape[1]).amin(1, keepdim=True)
        return Plan(region.visible & (_moved(region, own) | (state.positions >= start) | (dirty & state.fixed)), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return torch.where(state.done, own, region.epoch)


@register("cache", "dual")
@dataclass(frozen=True)
class DualCache(Cache):
    """Keep the K/V of what lies before and behind the open block; recompute the block only.

    Reference: Fast-dLLM, arXiv 2505.22618, dual cache.
    """

    cite = ("2505.22618",)
    path_free = True

    def init(self, state: State) -> PyTree:
        return torch.full_like(state.begin, -1)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        # Dirty: pinned tokens of a block that has just opened are not read, but their keys are not there yet either.
        return Plan(region.visible & (_moved(region, own) | region.span | (dirty & state.fixed)), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return torch.where(state.done, own, region.epoch)


@register("cache", "block_causal")
@dataclass(frozen=True)
class BlockCausalCache(Cache):
    """Store the K/V of closed positions once, from the first forward that sees them clean; recompute what is open.

    The clean pass over a finished block shares a forward with the next blocks. Exact because a closed position never changes and sees
    closed positions only. For a causal model this is the usual append-only cache.

    Reference: D2F, arXiv 2508.09192; block diffusion, arXiv 2503.09573.
    """

    cite = ("2508.09192", "2503.09573")
    exact = True
    needs = frozenset({Need.BLOCK_CAUSAL})

    def init(self, state: State) -> PyTree:
        return torch.zeros_like(state.masked)  # stored positions

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible & ~own, region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return own | (plan.compute & region.closed & ~state.done.unsqueeze(1))

    def accept(self, where: Canvas, own: PyTree) -> PyTree:
        return own | where
