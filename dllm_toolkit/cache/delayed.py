"""Caches that wait: a token's keys are kept only after it has been seen as a token for a while.

What a position's keys say changes most in the moment when it is decided, and little after that. So its keys are computed a few more times
after the decision before they are reused (dKV-Cache, arXiv 2505.15781: once more). Everything masked is computed in every forward.

    delayed, delay 1           . mask   n new token   x token, keys reused
    forward 3   x x . . . .    computes     . . . .
    forward 4   x x . n . .    computes     . n . .     the new token, as itself
    forward 5   x x n x . .    computes     n   . .     its keys are reused from now on
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache, CacheError, Plan, check_count, sources
from dllm_toolkit.cache.refreshed import Clock
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas


@register("cache", "delayed")
@dataclass(frozen=True)
class DelayedCache(Cache):
    """Reuse the keys of decided tokens, each from `delay` steps after its decision on; compute masks and younger tokens in every forward.

    computed = masked, or decided at most `delay` steps ago, or everything at a refresh: when the open span moves, and every `refresh_every`
    forwards after that. `keep` says whose keys are reused: "decoded" all tokens' (dKV-Cache-Decode; 8 for LLaDA, 4 to 16 for Dream),
    "prompt" the prompt's alone and for good (Prefill), "both" everything decoded, while refreshes pass over the prompt (PD).

    With shift 1 a position counts as decided when the next one is too, because that one is read from it. The released code offers two
    more definitions, which reuse keys of masks. Its greedy variant computes what will be decided next, in an order drawn beforehand: a
    schedule, with the dual cache.

    Reference: dKV-Cache, arXiv 2505.15781.
    """

    cite = ("2505.15781",)

    delay: int = 1
    refresh_every: int | None = 8
    keep: Literal["decoded", "prompt", "both"] = "decoded"

    def __post_init__(self) -> None:
        if self.delay < 1:
            raise CacheError(
                f"delay must be 1 or more, got {self.delay}. The keys of a token that has just been decided are still those of a mask. "
                "Write delay: 1."
            )
        check_count("refresh_every", self.refresh_every, 1, "forwards", "8")
        if self.keep not in ("decoded", "prompt", "both"):
            raise CacheError(f'keep must be "decoded", "prompt" or "both", got {self.keep!r}. It says whose keys are reused.')

    def init(self, state: State) -> Clock:
        return Clock.begin(state)

    def plan(self, region: Region, state: State, own: Clock, dirty: Canvas) -> Plan:
        young = ~state.fixed & (state.step.unsqueeze(1) - state.born <= self.delay)
        compute = sources(state.masked, state) | young | region.read | dirty | own.due(region, self.refresh_every)
        if self.keep != "decoded":
            # The row before the answer is what a shifted model reads the first answer token from.
            prompt = state.positions < (state.begin - state.spec.shift).unsqueeze(1)
            compute = (compute | (self.keep == "prompt")) & (~prompt | dirty)
        return Plan(region.visible & compute, region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: Clock, dirty: Canvas) -> Clock:
        return own.after(own.due(region, self.refresh_every).squeeze(1), region, state)


@dataclass(frozen=True)
class Waiting:
    """State of DelayedBlocksCache: for how many forwards each position has been closed, and how many there were."""

    age: Int[Tensor, "B L"]
    taken: Int[Tensor, "B"]


@register("cache", "delayed_blocks")
@dataclass(frozen=True)
class DelayedBlocksCache(Cache):
    """Reuse the keys of closed blocks, each from `delay` forwards after it was closed on; compute everything else in every forward.

    delay counts the forwards that see a block closed before its keys are reused; 1 reuses those of the first (it is the released code's
    cache_delay_iter + 1; the prompt has waited one forward when a decode starts). While a block waits, forwards are full, so that its keys
    and those before it are of one age. Its last forward of waiting computes what is not kept yet. Every `refresh_every`-th forward is full.

    Reference: d3LLM, arXiv 2601.07568.
    """

    cite = ("2601.07568",)

    delay: int = 2
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        check_count("delay", self.delay, 1, "forwards", "2")
        check_count("refresh_every", self.refresh_every, 1, "forwards", "16")

    def init(self, state: State) -> Waiting:
        return Waiting((state.positions < state.begin.unsqueeze(1)).long(), torch.zeros_like(state.begin))

    def _age(self, state: State, own: Waiting, dirty: Canvas) -> Int[Tensor, "B L"]:
        """A token that was changed starts anew."""
        return own.age.masked_fill(dirty & ~state.fixed, 0)

    def plan(self, region: Region, state: State, own: Waiting, dirty: Canvas) -> Plan:
        age = self._age(state, own, dirty)
        kept = region.closed & ~dirty & (age >= self.delay)
        last = (region.closed & region.visible & (age == self.delay - 1)).any(1, keepdim=True)
        waits = (region.closed & region.visible & (age < self.delay - 1)).any(1, keepdim=True)
        if self.refresh_every is not None:
            waits = waits | ((own.taken + 1) % self.refresh_every == 0).unsqueeze(1)
        return Plan(region.visible & (~kept | region.read | (waits & ~last)), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: Waiting, dirty: Canvas) -> Waiting:
        age = torch.where(region.closed, self._age(state, own, dirty) + 1, 0)
        done = state.done
        return Waiting(torch.where(done.unsqueeze(1), own.age, age), torch.where(done, own.taken, own.taken + 1))
