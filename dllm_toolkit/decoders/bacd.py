"""BACD, bounded adaptive confidence decoding: the threshold follows how sure the block has been so far.

    tau <- clamp(mean probability of the tokens accepted in this block, low, high)
           nothing accepted yet: clamp(best probability, low, high)
    commit {i : c_i >= tau}, at least the best

What is remembered is the probability at which each position was accepted, and the mean is taken over a position's own block. So nothing has
to be reset, and nothing can leak into another block or another row.

Reference: Advancing Block Diffusion Language Models for Test-Time Scaling (TDAR), arXiv 2602.09555.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


@register("commit", "bounded_adaptive")
@dataclass(frozen=True)
class BoundedAdaptive(Commit):
    """Commit what is as sure as the tokens accepted in its block were on average, that bound kept between `low` and `high`.

    Tokens committed only because progress is promised count too, as in the paper.

    Reference: BACD, arXiv 2602.09555.
    """

    cite = ("2602.09555",)

    low: float = 0.6
    high: float = 0.9

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise DecodeError(
                f"low must be at most high, got low={self.low} and high={self.high}. They bound one threshold. "
                "Write low: 0.6 and high: 0.9."
            )

    def init(self, state: State) -> Float[Tensor, "B L"]:
        """Probability at which each decided position was accepted; meaningless where masked."""
        return torch.zeros_like(state.masked, dtype=torch.float64)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        return region.eligible & (proposal.confidence >= self.threshold(proposal, region, state))

    def threshold(self, proposal: Proposal, region: Region, state: State) -> Float[Tensor, "B L"]:
        """The bound of every position's block."""
        own: Tensor = state.parts.commit
        rows, length = own.shape
        accepted = state.born >= 0  # decided by this decode: neither prompt nor pinned nor filled
        empty = own.new_zeros(rows, length + 1)
        total = empty.scatter_add(1, region.block, own.masked_fill(~accepted, 0))
        count = empty.scatter_add(1, region.block, accepted.to(own.dtype))
        open_now = proposal.confidence.double().masked_fill(~region.eligible, 0)
        best = empty.scatter_reduce(1, region.block, open_now, "amax")
        bound = torch.where(count > 0, total / count.clamp(min=1), best)
        return bound.clamp(self.low, self.high).gather(1, region.block)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Float[Tensor, "B L"]:
        # Which positions were accepted is known only after the step, so every open one leaves its probability; the last one stays.
        return torch.where(region.eligible, proposal.confidence.double(), state.parts.commit)


@register("decoder", "bacd")
def bacd(block_length: int | None = 16, low: float = 0.6, high: float = 0.9, temperature: float = 0.0) -> BlockDecoder:
    """BACD (arXiv 2602.09555): a threshold that follows the block's difficulty. The paper: block-causal models at temperature 1."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=BoundedAdaptive(low, high),
        propose=Sample(temperature=temperature),
    )
