"""WINO (wide in, narrow out): accept liberally, and in the same forward ask again what was accepted before.

    masks of the block: m
    forward over the canvas, and over a shadow of the block: mask tokens at the block's positions, each of which sees the canvas without its
    own position, and the other shadows (the canvas sees no shadow)
    in   commit {c_i >= wide}, at least the best, at most min(max(floor(0.7 m), 5), 20) of them
    out  if that were more than one: of what was decided earlier in the block, mask again where the shadow gives the token less than
         `narrow`; no more than the previous step committed less one, the most doubtful first
    the next block opens when nothing is masked; what was committed last is not asked again

A step may leave more masks than it found, but never takes back what the step before has not committed: a block of n positions takes at most
n steps. The released code compares with > when it accepts.

Reference: Hong et al., Wide-In, Narrow-Out, arXiv 2507.18578.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Revise
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.types import Canvas, Need


@register("commit", "wide_in")
@dataclass(frozen=True)
class WideIn(Commit):
    """Commit what passes a low bound, at least one position and at most a share of the masks, itself between `least` and `most`.

    With m masks eligible: chosen = {c_i >= at_least}, no more than min(max(floor(share m), least), most), the surest first.

    Reference: WINO, arXiv 2507.18578.
    """

    cite = ("2507.18578",)

    at_least: float = 0.6
    share: float = 0.7
    least: int = 5
    most: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DecodeError(f"share must be in (0, 1], got {self.share}. It is a share of the open masks. Write share: 0.7.")
        if not 1 <= self.least <= self.most:
            raise DecodeError(
                f"least and most must satisfy 1 <= least <= most, got {self.least} and {self.most}. They bound how many tokens a step may "
                "commit. Write least: 5 and most: 20."
            )

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        passed = region.eligible & (proposal.confidence >= self.at_least)
        masks = region.eligible.sum(1)
        cap = (masks.double() * self.share).floor().long().clamp(min=self.least, max=self.most)
        return select.top_k(proposal.confidence, region.eligible, torch.minimum(passed.sum(1).clamp(min=1), cap))


@register("revise", "narrow_out")
@dataclass(frozen=True)
class NarrowOut(Revise):
    """Mask decided tokens again that the model would not give with probability `at_least` if it could not see them.

    Only in steps that commit more than one token, only tokens from earlier steps, and fewer than the previous step committed. `at_least` 0
    asks nothing and takes nothing back.

    Reference: WINO, arXiv 2507.18578.
    """

    cite = ("2507.18578",)
    needs = frozenset({Need.UNSHIFTED})

    at_least: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.at_least <= 1:
            raise DecodeError(f"at_least must be in [0, 1], got {self.at_least}. It is a probability. Write at_least: 0.9.")

    def init(self, state: State) -> Int[Tensor, "B"]:
        return torch.zeros_like(state.begin)  # committed by the step before

    def shadows(self, region: Region, state: State) -> Canvas | None:
        return None if self.at_least == 0 else region.read

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        accepted = (before.masked & ~after.masked).sum(1)
        taken = torch.zeros_like(before.masked)
        if proposal.shadow is not None:
            asked = region.read & ~region.closed & ~before.masked & ~before.fixed & ~before.filled
            doubtful = asked & (proposal.shadow < self.at_least)
            cap: Tensor = (before.parts.revise - 1).clamp(min=0)
            taken = select.top_k(-proposal.shadow, doubtful, cap) & (accepted > 1).unsqueeze(1)
        # What is committed may still go back while the block holds masks, so no text ends there before that.
        settled = ~((after.masked | taken) & region.read).any(1)
        return Edit(torch.zeros_like(taken), taken, settled, accepted)


@register("decoder", "wino")
def wino(
    block_length: int | None = 128,
    wide: float = 0.6,
    narrow: float = 0.9,
    share: float = 0.7,
    least: int = 5,
    most: int = 20,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """WINO (arXiv 2507.18578): accept above `wide` (0.5 to 0.7 by task), take back below `narrow`, 128 tokens a block.

    share, least, most: how many tokens a step may accept, see `WideIn`. A forward computes the block twice.
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=WideIn(wide, share, least, most),
        propose=Sample(temperature=temperature),
        revise=NarrowOut(narrow),
        stop=AtEos() if stop_at_eos else WhenFull(),
    )
