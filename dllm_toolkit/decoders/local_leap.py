"""LocalLeap: next to a very sure token, be content with less.

    S <- masked positions of the block
    A <- {i in S : c_i >= anchor}                                       anchors of this step
    R <- {j in S : c_j >= relaxed, and an anchor within `distance`}      what they pull along
    commit A and R                                                      (A empty: the best of S)

         c   .5 .8 .95 .7 .8 .6 .8 .4        anchor .9, relaxed .75, distance 2
             .  R  A   .  R  .  .  .         nothing chains: a pulled token is no anchor in the same step

Reference: Accelerating Diffusion LLM Inference via Local Determinism Propagation, arXiv 2510.07081.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, Tokens


def within(anchors: Canvas, block: Tokens, distance: int) -> Canvas:
    """Positions with an anchor of the same block at most `distance` positions away, on either side."""
    length = anchors.shape[1]
    positions = torch.arange(length, device=anchors.device).expand_as(anchors)
    # Blocks are runs, so if the nearest anchor on a side lies in another block, no farther one lies in this one.
    left = torch.where(anchors, positions, -1).cummax(1).values
    right = torch.where(anchors, positions, length).flip(1).cummin(1).values.flip(1)
    near = torch.zeros_like(anchors)
    for found, there in ((left >= 0, left.clamp(min=0)), (right < length, right.clamp(max=length - 1))):
        near = near | (found & ((positions - there).abs() <= distance) & (block.gather(1, there) == block))
    return near


@register("commit", "local_leap")
@dataclass(frozen=True)
class LocalLeap(Commit):
    """Commit what passes `anchor`, and within `distance` positions of it what passes `relaxed`.

    Neighbourhoods end at block borders. Only masked positions are anchors, so a token of an earlier step pulls nothing along.

    Reference: LocalLeap, arXiv 2510.07081.
    """

    cite = ("2510.07081",)

    anchor: float = 0.9
    relaxed: float = 0.75
    distance: int = 4

    def __post_init__(self) -> None:
        if self.relaxed > self.anchor:
            raise DecodeError(
                f"relaxed must be at most anchor, got relaxed={self.relaxed} and anchor={self.anchor}. Neighbours of an anchor are "
                "accepted more easily than the anchor. Write anchor: 0.9 and relaxed: 0.75."
            )
        if self.distance < 0:
            raise DecodeError(f"distance must be 0 or more, got {self.distance}. It counts positions. Write distance: 4.")

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        anchors = region.eligible & (proposal.confidence >= self.anchor)
        pulled = within(anchors, region.block, self.distance) & (proposal.confidence >= self.relaxed)
        return anchors | (region.eligible & pulled)


@register("decoder", "local_leap")
def local_leap(
    block_length: int | None = 32,
    anchor: float = 0.9,
    relaxed: float = 0.75,
    distance: int = 4,
    temperature: float = 0.0,
) -> BlockDecoder:
    """LocalLeap (arXiv 2510.07081): a threshold that is relaxed near very sure tokens. Quality falls below relaxed = 0.75."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=LocalLeap(anchor, relaxed, distance),
        propose=Sample(temperature=temperature),
    )
