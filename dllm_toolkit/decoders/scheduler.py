"""The scheduler form: a noise schedule says how many masks each step decides, and steps that would decide none are left out.

    mask(t)      share of positions that is still masked at time t, from mask(1) = 1 to mask(0) = 0
                 linear: t        cosine: cos(pi/2 (1 - t))
    step j of n  goes from t = 1 - j/n to s = 1 - (j + 1)/n
    count        round(m (1 - mask(s) / mask(t))) of the m masks that are left, everything in the last step
                 or, drawn: how many of them leave the mask in that time if each does so by itself
    commit the `count` best-ranked positions; if it is 0, take the next step that has some

With linear noise this is LLaDA's even schedule up to rounding; cosine noise starts slowly and ends fast. A drawn count is never drawn in
steps: position k of the block leaves the mask at the time at which mask(t) falls below its own uniform number, so the counts of all steps
are known from the start, and are binomial.

Reference: dLLM, Simple Diffusion Language Modeling (repository dllm).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import pi
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Progress
from dllm_toolkit.decoders.rules.propose import Sample, Special
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import noise, select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas

Noise = Literal["linear", "cosine"]


@register("commit", "noise_schedule")
@dataclass(frozen=True)
class NoiseSchedule(Commit):
    """Commit as many of the best-ranked positions as a noise schedule decides in this step; steps without any are skipped.

    steps: of the whole answer, shared out over blocks by their size; None is one a token. A row may take fewer. draw: the count is random
    (what dllm calls stochastic transfer), otherwise rounded.

    Reference: (repository dllm).
    """

    cite = ("2602.22661",)

    steps: int | None = None
    noise: Noise = "linear"
    draw: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")
        if self.noise not in ("linear", "cosine"):
            raise DecodeError(f'noise must be "linear" or "cosine", got {self.noise!r}. It is a noise schedule. Write noise: cosine.')

    @property
    def noisy(self) -> bool:
        return self.draw

    def init(self, state: State) -> Progress:
        return Progress.begin(state)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        _, count = self._next(region, state)
        return select.top_k(proposal.score, region.eligible, count)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Progress:
        before: Progress = state.parts.commit
        step, _ = self._next(region, state)
        return replace(before.at(region), taken=step + 1)  # here `taken` counts steps of the schedule, skipped ones included

    def _next(self, region: Region, state: State) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
        """The next step of the schedule that decides something, and how much."""
        before: Progress = state.parts.commit
        own = before.at(region)
        steps = own.steps(self.steps)
        left = region.eligible.sum(1)
        if self.draw:
            leaves = self._leaves(own, steps, state)  # at which step each mask of the block goes
            waiting = leaves >= own.taken.unsqueeze(1)
            step = torch.where(waiting, leaves, steps.unsqueeze(1)).amin(1)
            count = (leaves == step.unsqueeze(1)).sum(1)
            more = (waiting & (leaves > step.unsqueeze(1))).any(1)
            return step, torch.where(more, count, left)
        index = torch.arange(self.steps or state.tokens.shape[1], device=left.device)
        time = 1 - index / steps.double().unsqueeze(1)  # [B, steps]
        following = 1 - (index + 1) / steps.double().unsqueeze(1)
        share = 1 - self._masked(following.clamp(0, 1)) / self._masked(time.clamp(0, 1)).clamp(min=1e-12)
        counts = (share * left.unsqueeze(1)).round().long()
        last = index >= (steps - 1).unsqueeze(1)
        counts = torch.where(last, left.unsqueeze(1), counts)
        useful = (index >= own.taken.unsqueeze(1)) & ((counts > 0) | last)
        step = torch.where(useful, index, len(index) - 1).amin(1)
        return step, counts.gather(1, step.unsqueeze(1)).squeeze(1)

    def _masked(self, time: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return time if self.noise == "linear" else torch.cos(pi / 2 * (1 - time))

    def _leaves(self, own: Progress, steps: Int[Tensor, "B"], state: State) -> Int[Tensor, "B L"]:
        """The step in which the k-th mask of the block leaves, for k = 0 .. masks - 1; -1 for the others."""
        salt = torch.full_like(state.seed, 0xA1FA).unsqueeze(1)
        drawn = noise.uniform(salt, state.seed.unsqueeze(1), own.epoch.unsqueeze(1), state.positions).double()
        time = drawn if self.noise == "linear" else 1 - torch.acos(drawn) * 2 / pi
        step = (steps.unsqueeze(1) * (1 - time)).ceil().long() - 1
        step = torch.minimum(step.clamp(min=0), steps.unsqueeze(1) - 1)
        return torch.where(state.positions < own.masks.unsqueeze(1), step, -1)


@register("decoder", "scheduler")
def scheduler(
    steps: int | None = None,
    noise: Noise = "linear",
    draw: bool = False,
    block_length: int | None = None,
    temperature: float = 0.0,
    suppress: tuple[Special, ...] = (),
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """Scheduled unmasking in general form (repository dllm): `noise` says how many tokens a step decides, rounded or drawn.

    steps: at most so many for the whole answer (None: as many as tokens). suppress: ids that are never proposed.
    """
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=NoiseSchedule(steps, noise, draw),
        propose=Sample(temperature=temperature, suppress=suppress),
        stop=stop,
    )
