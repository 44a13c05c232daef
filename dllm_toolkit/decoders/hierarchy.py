"""Hierarchical decoding (dInfer): divide every gap by its surest token, so that a gap of n masks takes about log n steps.

    for each run of masked positions in the block:
        commit its surest position, if its probability is at least `low`
    commit every position with probability >= `high`
    commit the surest position of all, however sure

         masks    . . . . x x . . .  x . .       x: decided
         step 1   . . o .     . o .    o .       one in each run
         step 2   . o   o     o   o    o   o     ...

Why: tokens that are far apart depend on each other less than neighbours do.

Reference: dInfer: An Efficient Inference Framework for Diffusion Language Models, arXiv 2510.08666.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
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


@register("decoder", "hierarchy")
def hierarchy(block_length: int | None = 32, low: float = 0.4, high: float = 0.92, temperature: float = 0.0) -> BlockDecoder:
    """dInfer's hierarchical decoding (arXiv 2510.08666): one token a gap, plus everything above `high`."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Hierarchy(low, high),
        propose=Sample(temperature=temperature),
    )
