"""A finishing loop: when most of the answer is decided, look back at its weakest tokens again and again, then finish.

    decode as usual, k tokens a step, until the share `at` of the answer is decided
    `loops` times:   one forward: take back the k tokens that are least probable now
                     one forward: commit the k best masks
    decode the rest as usual

         decided  k 2k 3k ...  7/8                                   all
         step     c  c  c       c  b  c  b  c  b  c  ...  b  c  c  c  c        c commit, b take back

The loop of ReMDM (*Remasking Discrete Diffusion Models with Inference-Time Scaling*, arXiv 2503.00307) as the repository of PC-sampler
(arXiv 2508.13021) runs it: by confidence instead of by chance. The commits may rank by any score.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Revise, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import full, standing, taking_back
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.types import PyTree, Rows


@dataclass(frozen=True)
class Loops:
    """State of LookingBack: the inner schedule's state, masks at the start, loops begun, whether the coming step looks back."""

    inner: PyTree
    answer: Int[Tensor, "B"]
    begun: Int[Tensor, "B"]
    looking: Rows


@register("schedule", "looking_back")
@dataclass(frozen=True)
class LookingBack(Schedule):
    """Another schedule, in which every second step commits nothing, `loops` times, once the share `at` of the answer is decided.

    Such steps are for a revise rule that takes tokens back.

    Reference: ReMDM, arXiv 2503.00307.
    """

    cite = ("2503.00307",)

    schedule: Schedule = field(default_factory=lambda: SemiAutoregressive(None))
    at: float = 0.875
    loops: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1:
            raise DecodeError(f"at must be in [0, 1], got {self.at}. It is a share of the answer. Write at: 0.875.")
        if self.loops < 0:
            raise DecodeError(f"loops must be 0 or more, got {self.loops}. It counts pairs of steps. Write loops: 32.")

    def max_reads(self, answer_length: int) -> int:
        return self.schedule.max_reads(answer_length)

    def extra_steps(self, answer_length: int) -> int:
        return self.loops * (1 + answer_length) + self.schedule.extra_steps(answer_length)  # a look may take back everything

    def init(self, state: State) -> Loops:
        answer = state.masked.sum(1)
        return Loops(self.schedule.init(state), answer, torch.zeros_like(answer), torch.zeros_like(state.done))

    def region(self, state: State) -> Region:
        own: Loops = state.parts.schedule
        region = self.schedule.region(state.with_part(schedule=own.inner))
        return replace(region, **self._held(region, own.looking))

    def refine(self, region: Region, proposal: Proposal, state: State) -> Region:
        own: Loops = state.parts.schedule
        refined = self.schedule.refine(region, proposal, state.with_part(schedule=own.inner))
        return replace(refined, **self._held(refined, own.looking))

    @staticmethod
    def _held(region: Region, looking: Rows) -> dict[str, Tensor]:
        free = ~looking.unsqueeze(1)
        return {"eligible": region.eligible & free, "force": region.force & free}

    def advance(self, state: State) -> tuple[Loops, Rows]:
        own: Loops = state.parts.schedule
        inner, nothing_left = self.schedule.advance(state.with_part(schedule=own.inner))
        left = state.masked.sum(1)
        far = (own.answer - left).double() >= self.at * own.answer
        looking = ~own.looking & far & (left > 0) & (own.begun < self.loops)
        return Loops(inner, own.answer, own.begun + looking.long(), looking), nothing_left


@register("revise", "take_back_least")
@dataclass(frozen=True)
class TakeBackLeast(Revise):
    """In steps in which nothing may be committed, take back the `count` tokens that are least probable now.

    Reference: ReMDM, arXiv 2503.00307; by confidence: PC-sampler's repository, arXiv 2508.13021.
    """

    cite = ("2503.00307", "2508.13021")

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DecodeError(f"count must be 1 or more, got {self.count}. It counts tokens taken back in a step. Write count: 1.")

    @property
    def net_progress(self) -> bool:
        return True  # in steps that must commit it takes nothing back

    def extra_steps(self, answer_length: int) -> int:
        return 0  # the schedule declares its looks

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        looking = ~region.eligible.any(1)
        count = torch.where(looking, self.count, 0)
        weakest = select.top_k(-standing(proposal, after.tokens, after), region.changeable(after), count)
        return taking_back(weakest, full(region, after) & ~looking)


@register("decoder", "remdm_loop")
def remdm_loop(
    steps: int | None = None,
    at: float = 0.875,
    loops: int = 32,
    count: int = 1,
    temperature: float = 0.0,
) -> BlockDecoder:
    """ReMDM's loop by confidence (arXiv 2503.00307, repository of arXiv 2508.13021): LLaDA's quota, with looks back near the end.

    steps: forwards of the whole answer without the loops (None: one a token). count: tokens taken back in a loop.
    """
    if loops == 0:
        return BlockDecoder(SemiAutoregressive(None), Quota(steps), Sample(temperature=temperature))
    return BlockDecoder(
        schedule=LookingBack(SemiAutoregressive(None), at, loops),
        commit=Quota(steps),
        propose=Sample(temperature=temperature),
        revise=TakeBackLeast(count),
    )
