"""Saber: accept what is surer than the accepted so far, and take back what new context has made doubtful.

    theta <- mean probability at which the present tokens of the answer were accepted     (none yet: 1)
    commit {i masked : c_i >= theta}, at least the surest `minimum`                        K positions
    span full: done with it
    r <- min(K - 1, max(minimum // 2, ceil(K / 8)))
    take back the r tokens, old or new, whose probability has fallen most since the step before

At least one more token stands after every step, so an answer never takes more steps than it has tokens.

What the released code does otherwise, and this does not: its probability of a decided position is that of whatever the model would now put
there, not of the token that stands there; tokens that were taken back stay in the mean; and where fewer masks than `minimum` are left, its
top-k also names decided positions, whose tokens are then overwritten in passing.

Reference: Saber: An Efficient Sampling with Adaptive Acceleration and Backtracking Enhanced Remasking, arXiv 2510.18165.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Revise
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import full, standing, taking_back
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.types import Canvas


@register("commit", "above_mean")
@dataclass(frozen=True)
class AboveMean(Commit):
    """Commit what is at least as sure as the row's present tokens were on average when they were accepted, and the surest `minimum`.

    Nothing accepted yet: only what is certain, and the minimum. Tokens that were taken back do not count.

    Reference: Saber, arXiv 2510.18165, adaptive acceleration.
    """

    cite = ("2510.18165",)

    minimum: int = 2

    def __post_init__(self) -> None:
        if self.minimum < 1:
            raise DecodeError(f"minimum must be 1 or more, got {self.minimum}. It counts tokens of a step. Write minimum: 2.")

    def init(self, state: State) -> Float[Tensor, "B L"]:
        """Probability at which each decided position was accepted; meaningless where masked."""
        return torch.zeros_like(state.masked, dtype=torch.float64)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own: Tensor = state.parts.commit
        accepted = state.born >= 0  # neither prompt nor pinned nor filled, and not taken back
        count = accepted.sum(1)
        mean = own.masked_fill(~accepted, 0).sum(1) / count.clamp(min=1)
        bound = torch.where(count > 0, mean, 1.0).unsqueeze(1)
        passed = region.eligible & (proposal.confidence >= bound)
        return select.top_k(proposal.score, region.eligible, passed.sum(1).clamp(min=self.minimum))

    def carry(self, proposal: Proposal, region: Region, state: State) -> Float[Tensor, "B L"]:
        # Which positions were accepted is known only after the step, so every open one leaves its probability; the last one stays.
        return torch.where(region.eligible, proposal.confidence.double(), state.parts.commit)


@register("revise", "take_back_fallen")
@dataclass(frozen=True)
class TakeBackFallen(Revise):
    """Take back the tokens whose probability has fallen most since the step before: min(K - 1, max(least, ceil(K / one_in))) of K commits.

    Of a position decided in this step, the probability before is that of its proposal then. Nothing is taken back when the open span has
    just become full. one_in null: only `least`.

    Reference: Saber, arXiv 2510.18165, backtracking enhanced remasking.
    """

    cite = ("2510.18165",)

    least: int = 1
    one_in: int | None = 8

    def __post_init__(self) -> None:
        if self.least < 0:
            raise DecodeError(f"least must be 0 or more, got {self.least}. It counts tokens taken back in a step. Write least: 1.")
        if self.one_in is not None and self.one_in < 1:
            raise DecodeError(
                f"one_in must be 1 or more, got {self.one_in}. One of so many commits is taken back. Write one_in: 8, or null."
            )

    @property
    def net_progress(self) -> bool:
        return True

    def extra_steps(self, answer_length: int) -> int:
        return 0

    def init(self, state: State) -> Float[Tensor, "B L"]:
        """Probability of the token that stood or was proposed at each position in the step before."""
        return torch.zeros_like(state.masked, dtype=torch.float64)

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        own: Tensor = before.parts.revise
        tokens = torch.where(after.masked, proposal.tokens, after.tokens)
        now = standing(proposal, tokens, after).double()
        carry = torch.where(region.read, now, own)
        ended = full(region, after)
        if self.least == 0 and self.one_in is None:
            return taking_back(torch.zeros_like(after.masked), torch.ones_like(ended), carry)
        commits = (before.masked & ~after.masked).sum(1)
        share = torch.zeros_like(commits) if self.one_in is None else (commits + self.one_in - 1).div(self.one_in, rounding_mode="floor")
        count = torch.minimum(commits - 1, share.clamp(min=self.least)).clamp(min=0).masked_fill(ended, 0)
        return taking_back(select.top_k(own - now, region.changeable(after), count), ended, carry)


@register("decoder", "saber")
def saber(
    block_length: int | None = None,
    minimum: int = 2,
    one_in: int | None = 8,
    temperature: float = 0.0,
) -> BlockDecoder:
    """Saber (arXiv 2510.18165): an adaptive threshold, and tokens that new context speaks against are taken back. Meant for code."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=AboveMean(minimum),
        propose=Sample(temperature=temperature),
        revise=TakeBackFallen(minimum // 2, one_in),
    )
