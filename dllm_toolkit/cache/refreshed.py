"""When to compute everything again: the clock that refreshing caches share, and a refresh around any cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan, check_count
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, Need, PyTree, Rows


@dataclass(frozen=True)
class Clock:
    """Forwards of each row: how many there were, how many since the last refresh, and the epoch of the last one."""

    taken: Int[Tensor, "B"]
    rested: Int[Tensor, "B"]
    epoch: Int[Tensor, "B"]

    @classmethod
    def begin(cls, state: State) -> Clock:
        return cls(torch.zeros_like(state.begin), torch.zeros_like(state.begin), torch.full_like(state.begin, -1))

    def due(self, region: Region, every: int | None, warm_up: int = 0) -> Canvas:
        """Is a refresh due, [B, 1]: the open span has moved, `every` forwards have passed, or the row is still warming up?"""
        now = (region.epoch != self.epoch) | (self.taken < warm_up)
        if every is not None:
            now = now | (self.rested + 1 >= every)
        return now.unsqueeze(1)

    def after(self, refreshed: Rows, region: Region, state: State) -> Clock:
        """The clock after a forward that was a refresh in some rows. It stands still in finished rows."""
        rested = torch.where(refreshed, 0, self.rested + 1)
        return Clock(
            torch.where(state.done, self.taken, self.taken + 1),
            torch.where(state.done, self.rested, rested),
            torch.where(state.done, self.epoch, region.epoch),
        )


def whole(plan: Plan) -> Rows:
    """Rows in which everything visible is computed."""
    return ~(plan.visible & ~plan.compute).any(1)


@register("cache", "refreshed")
@dataclass(frozen=True)
class RefreshedCache(Cache):
    """Any cache, with everything visible computed again in the first `warm_up` forwards and after at most `every` forwards.

    Full forwards that `inner` asks for by itself count as refreshes. every 1 is no cache; None leaves the warm-up only. It bounds how
    old a reused key can be, which none of the block caches does: their refreshes come when the open span moves.

    Reference: interval refresh of dKV-Cache, arXiv 2505.15781, and of dInfer, arXiv 2510.08666 (warm-up).
    """

    cite = ("2505.15781", "2510.08666")

    inner: Cache
    every: int | None = 8
    warm_up: int = 0

    def __post_init__(self) -> None:
        check_count("every", self.every, 1, "forwards", "8")
        check_count("warm_up", self.warm_up, 0, "forwards", "4")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What the cache inside asks of the model."""
        return self.inner.needs

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Is the cache inside exact?"""
        return self.inner.exact

    def init(self, state: State) -> PyTree:
        return Clock.begin(state), self.inner.init(state)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        clock, inner = own
        planned = self.inner.plan(region, state, inner, dirty)
        # Against the clock's own epoch nothing is due: when the open span moves is the business of the cache inside.
        rests = Clock(clock.taken, clock.rested, region.epoch)
        return Plan(planned.visible & (planned.compute | rests.due(region, self.every, self.warm_up)), planned.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        clock, inner = own
        return clock.after(whole(plan), region, state), self.inner.update(plan, region, state, inner, dirty)
