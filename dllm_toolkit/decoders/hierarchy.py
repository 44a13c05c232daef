"""Hierarchical decoding (dInfer): divide every gap by its surest token, so that a gap of n masks takes about log n steps.

    for each run of masked positions in the block:
        commit its surest position, if its probability is at least `low`
    commit every position with probability >= `high`
    commit the surest position of all, however sure

         masks    . . . . x x . . .  x . .       x: decided
         step 1   . . o .     . o .    o .       one in each run
         step 2   . o   o     o   o    o   o     ...

Why: tokens that are far apart depend on each other less than neighbours do.

The variant that remasks looks back first: a decided token of the block to which the model now gives a probability below `remask_below`
counts as masked in this step's selection, which is then filled up so that one token more is committed than was taken back. (The released
code compares the probability of what it would now put there, not that of the token that stands there.)

Reference: dInfer: An Efficient Inference Framework for Diffusion Language Models, arXiv 2510.08666.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Commit, DecodeError, Revise
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep, full, standing, taking_back
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.types import Canvas, Tokens


def runs(flag: Canvas, block: Tokens) -> Tokens:
    """Number every maximal run of True inside one block, from 1 in each row; 0 where False."""
    continued = torch.zeros_like(flag)
    continued[:, 1:] = flag[:, :-1] & (block[:, 1:] == block[:, :-1])
    return (flag & ~continued).cumsum(1).masked_fill(~flag, 0)


@register("commit", "hierarchy")
@dataclass(frozen=True)
class Hierarchy(Commit):
    """Commit what passes `high`, and the best position of every run of masks if it passes `low`.

    Reference: dInfer, arXiv 2510.08666, hierarchical decoding.
    """

    cite = ("2510.08666",)

    low: float = 0.4
    high: float = 0.92

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise DecodeError(
                f"low must be at most high, got low={self.low} and high={self.high}. low is for one position of a run, high for all. "
                "Write low: 0.4 and high: 0.92."
            )

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        best = select.group_best(proposal.score, region.eligible, runs(region.eligible, region.block))
        return region.eligible & ((proposal.confidence >= self.high) | (best & (proposal.confidence >= self.low)))


@register("revise", "take_back_doubtful")
@dataclass(frozen=True)
class TakeBackDoubtful(Revise):
    """Decided tokens whose probability is now < `below` are up for decision again in the same step, with this forward's proposals.

    Reference: dInfer, arXiv 2510.08666, hierarchical decoding with remasking.
    """

    cite = ("2510.08666",)

    below: float = 0.4

    @property
    def net_progress(self) -> bool:
        return True  # the loop commits one more than is taken back

    def extra_steps(self, answer_length: int) -> int:
        return 0

    def reopen(self, proposal: Proposal, region: Region, state: State) -> Canvas | None:
        if self.below <= 0:
            return None
        return region.changeable(state) & (standing(proposal, state.tokens, state) < self.below)

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        settled = torch.ones_like(after.done) if self.below <= 0 else full(region, after)
        return taking_back(torch.zeros_like(after.masked), settled)


@register("decoder", "hierarchy")
def hierarchy(
    block_length: int | None = 32,
    low: float = 0.4,
    high: float = 0.92,
    temperature: float = 0.0,
    remask_below: float = 0.0,
) -> BlockDecoder:
    """dInfer's hierarchical decoding (arXiv 2510.08666): one token a gap, plus everything above `high`.

    remask_below: decided tokens whose probability has fallen below it are decided anew; 0 is off, dInfer's variant has 0.4.
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Hierarchy(low, high),
        propose=Sample(temperature=temperature),
        revise=TakeBackDoubtful(remask_below) if remask_below > 0 else Keep(),
    )
