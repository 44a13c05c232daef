"""SchED, schedule-based early decoding: commit the rest when the whole answer is sure enough for how far it is.

    decode as LLaDA does, a quota of the surest tokens a step; in every step:
        g <- mean over the whole answer of (best logit - second best)
        p <- progress, 0 .. 1
        g >= bound(p): all masks take their proposed tokens, and the row is finished

        bound    linear        high + (low - high) p
                 cosine        low + (high - low) (1 + cos(pi p)) / 2
                 exponential   low + (high - low) exp(-rate p)

Prophet's test without an answer region and without steps in its bound. RECONSTRUCTED from the abstract and summaries: that the margins are
averaged over the full span, the three families of bounds and that they fall with progress are published; the formulas above are the
plainest of each family, and `high`, `low` and `rate` are choices of ours (high and low: Prophet's first and last bound).

Reference: Fast-Decoding Diffusion Language Models via Progress-Aware Confidence Schedules, arXiv 2512.02892.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.early import Margins, commit_rest
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AnyOf, AtEos
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State, Verdict

Shape = Literal["linear", "cosine", "exponential"]


@register("stop", "scheduled_margin")
@dataclass(frozen=True)
class ScheduledMargin(Stop):
    """Commit the rest once the answer's mean logit gap reaches a bound that falls smoothly from `high` to `low` with progress.

    rate: how fast the exponential falls; at the end it is still (high - low) exp(-rate) above low. end_at_eos: an early commit ends the
    text at its first end-of-text token; otherwise the budget stays whole.

    Reference: SchED, arXiv 2512.02892, reconstructed (see the module).
    """

    cite = ("2512.02892",)
    wants_answer = True

    high: float = 7.5
    low: float = 2.5
    shape: Shape = "linear"
    rate: float = 2.0
    end_at_eos: bool = False

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise DecodeError(
                f"low must be at most high, got low={self.low} and high={self.high}. The bound falls. Write low: 2.5 and high: 7.5."
            )
        if self.rate <= 0:
            raise DecodeError(f"rate must be above 0, got {self.rate}. It says how fast the exponential bound falls. Write rate: 2.0.")

    def bound(self, progress: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The mean gap that is enough at this progress."""
        if self.high == self.low:  # also where both are infinite
            return progress * 0 + self.low
        if self.shape == "linear":
            left = 1 - progress
        elif self.shape == "cosine":
            left = (1 + (math.pi * progress).cos()) / 2
        else:
            left = (-self.rate * progress).exp()
        return self.low + (self.high - self.low) * left

    def init(self, state: State) -> Margins:
        return Margins.begin(state, state.inside)

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        before: Margins = state.parts.stop
        own = before.after(proposal, state)
        return commit_rest(own, self.bound(own.progress(state)), self.end_at_eos, proposal, state)


@register("decoder", "sched")
def sched(
    steps: int | None = None,
    block_length: int | None = None,
    high: float = 7.5,
    low: float = 2.5,
    shape: Shape = "linear",
    rate: float = 2.0,
    temperature: float = 0.0,
    stop_at_eos: bool = False,
) -> BlockDecoder:
    """SchED (arXiv 2512.02892, reconstructed): LLaDA's quota, until the whole answer passes a bound that falls with progress.

    steps: forwards of the whole answer (None: one token a step); block_length None: the whole answer at once. stop_at_eos true: also stop
    at end-of-text.
    """
    stop: Stop = ScheduledMargin(high, low, shape, rate, end_at_eos=stop_at_eos)
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Quota(steps),
        propose=Sample(temperature=temperature),
        stop=AnyOf((AtEos(), stop)) if stop_at_eos else stop,
    )
