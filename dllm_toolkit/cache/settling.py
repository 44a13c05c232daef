"""Settling: keep the K/V of a finished block only after it has been finished for a while, and refresh everything now and then.

    forward        1     2 ... 7     8           9            10 ...
    block 1        open  open        finished    stored       reused        delay 1
    computed       all   from b1 on  everything  from b1 on   from b2 on

With full attention the keys of a finished block go on changing while its neighbours change. A block is stored from the forward that
comes `delay` forwards after the one that first saw it finished; while one waits, every forward is a full one. The prompt counts as finished
one forward before the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, PyTree, Tokens


@dataclass(frozen=True)
class Settled:
    """Forwards since each position was first seen closed (-1: not yet), what is stored, forwards of the row so far."""

    age: Tokens
    stored: Canvas
    forwards: Int[Tensor, "B"]


@register("cache", "settling")
@dataclass(frozen=True)
class SettlingCache(Cache):
    """Keep the K/V of closed positions once they have been closed for `delay` forwards; everything is computed while some wait.

    refresh_every: every so many forwards of a row everything is computed anew, None never; a forward that stores something is put first.
    Approximate under full attention (what is kept saw later masks); the released code counts the same way.

    Reference: d3LLM, arXiv 2601.07568, delayed cache.
    """

    cite = ("2601.07568",)

    delay: int = 1
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ToolkitError(f"delay must be 0 or more, got {self.delay}. It counts forwards. Write delay: 1.")
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ToolkitError(f"refresh_every must be 1 or more, got {self.refresh_every}. It counts forwards. Write refresh_every: 8.")

    def init(self, state: State) -> Settled:
        prompt = state.positions < state.begin.unsqueeze(1)
        age = torch.where(prompt, 0, -1)
        return Settled(age, torch.zeros_like(prompt), torch.zeros_like(state.begin))

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        age = self._age(region, own)
        ready = (age >= self.delay) & ~own.stored
        whole = ((age >= 0) & ~own.stored & ~ready).any(1)
        if self.refresh_every is not None:
            whole = whole | ((own.forwards + 1) % self.refresh_every == 0)
        whole = whole & ~ready.any(1)
        return Plan(region.visible & (~own.stored | whole.unsqueeze(1)), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> Settled:
        age = self._age(region, own)
        alive = ~state.done
        now = plan.compute & (age >= self.delay) & alive.unsqueeze(1)
        return Settled(age, own.stored | now, own.forwards + alive.long())

    @staticmethod
    def _age(region: Region, own: Settled) -> Tokens:
        return own.age + (region.closed & region.visible).long()
