"""Annealed threshold (dInfer): ask for more certainty in the first forwards than later.

    bound_t = max(start - decay * t, threshold)        t: forwards of the row so far
    commit {i in block : c_i >= bound_t}, at least the best

Made for iteration smoothing (models/smoothing.py): the first answers come from plain masks, later ones from masks that carry what was said
before, and deserve more trust.

Reference: dInfer: An Efficient Inference Framework for Diffusion Language Models, arXiv 2510.08666.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


@register("commit", "annealed")
@dataclass(frozen=True)
class Annealed(Commit):
    """Commit what passes a bound that falls from `start` by `decay` a step of the row, down to `at_least`.

    Reference: dInfer, arXiv 2510.08666, iteration smoothing.
    """

    cite = ("2510.08666",)

    at_least: float = 0.9
    decay: float = 0.02
    start: float = 1.0

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise DecodeError(f"decay must be 0 or more, got {self.decay}. It is what a step takes from the bound. Write decay: 0.02.")

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        bound = (self.start - self.decay * state.step.to(proposal.confidence.dtype)).clamp(min=self.at_least)  # [B]
        return region.eligible & (proposal.confidence >= bound.unsqueeze(1))


@register("decoder", "annealed_threshold")
def annealed_threshold(
    block_length: int | None = 32, threshold: float = 0.9, decay: float = 0.02, start: float = 1.0, temperature: float = 0.0
) -> BlockDecoder:
    """dInfer's threshold for iteration smoothing (arXiv 2510.08666): falls from `start` by `decay` a forward, down to `threshold`."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length), commit=Annealed(threshold, decay, start), propose=Sample(temperature=temperature)
    )
