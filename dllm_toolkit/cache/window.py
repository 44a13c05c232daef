"""Caches that compute a neighbourhood: what lies around the open span, or what was decided since the last refresh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan, check_count, sources
from dllm_toolkit.cache.refreshed import Clock
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas


def near(span: Canvas, before: int, after: int) -> Canvas:
    """Positions of the span, up to `before` positions to the left of one, and up to `after` to the right of one."""
    length = span.shape[1]
    count = torch.nn.functional.pad(span.long().cumsum(1), (1, 0))  # [B, L + 1]: how many of the span lie before each position
    places = torch.arange(length, device=span.device)
    first = (places - after).clamp(min=0).expand_as(span)
    last = (places + before + 1).clamp(max=length).expand_as(span)
    return count.gather(1, last) > count.gather(1, first)


@register("cache", "vicinity")
@dataclass(frozen=True)
class VicinityCache(Cache):
    """Compute the open span and what is near it: `before` positions to its left, `after` to its right. Keep the rest.

    Keys change most close to what is being decided. Everything is computed in the first `warm_up` forwards, when the open span moves, and
    every `refresh_every` forwards. before = after = 0 is the dual cache; where they reach over the canvas, no cache.

    Reference: dInfer, arXiv 2510.08666, vicinity refresh (16 and 16, 4 forwards of warm-up).
    """

    cite = ("2510.08666",)

    before: int = 16
    after: int = 16
    warm_up: int = 4
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        check_count("before", self.before, 0, "positions", "16")
        check_count("after", self.after, 0, "positions", "16")
        check_count("warm_up", self.warm_up, 0, "forwards", "4")
        check_count("refresh_every", self.refresh_every, 1, "forwards", "16")

    def init(self, state: State) -> Clock:
        return Clock.begin(state)

    def plan(self, region: Region, state: State, own: Clock, dirty: Canvas) -> Plan:
        compute = near(region.span, self.before, self.after) | own.due(region, self.refresh_every, self.warm_up) | (dirty & state.fixed)
        return Plan(region.visible & compute, region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: Clock, dirty: Canvas) -> Clock:
        return own.after(own.due(region, self.refresh_every, self.warm_up).squeeze(1), region, state)


@dataclass(frozen=True)
class Since:
    """State of WindowCache: its clock, and the row step of the last refresh."""

    clock: Clock
    step: Int[Tensor, "B"]


@register("cache", "window")
@dataclass(frozen=True)
class WindowCache(Cache):
    """Compute what is read and what was decided since the last refresh; keep the rest, the masks that nobody reads among it.

    A refresh comes when the open span moves and every `refresh_every` forwards. What the refresh itself decided is computed once, in the
    forward after it; what is decided later, in every forward up to the next refresh. What a schedule prunes is not visible.
    The dual cache computes the whole open span instead, also what was decided in it long ago.

    Reference: Window-Diffusion (repository Window-Diffusion), the cache half.
    """

    refresh_every: int | None = None

    def __post_init__(self) -> None:
        check_count("refresh_every", self.refresh_every, 1, "forwards", "32")

    def init(self, state: State) -> Since:
        return Since(Clock.begin(state), torch.zeros_like(state.step))

    def plan(self, region: Region, state: State, own: Since, dirty: Canvas) -> Plan:
        recent = ~state.fixed & (state.born > own.step.unsqueeze(1))
        # What a stop rule fills behind an end-of-text keeps the keys of its masks, as the masks behind a block do.
        missing = dirty & ~state.filled
        due = own.clock.due(region, self.refresh_every)
        return Plan(region.visible & (sources(region.read, state) | recent | missing | due), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: Since, dirty: Canvas) -> Since:
        due = own.clock.due(region, self.refresh_every).squeeze(1)
        return Since(own.clock.after(due, region, state), torch.where(due & ~state.done, state.step, own.step))
