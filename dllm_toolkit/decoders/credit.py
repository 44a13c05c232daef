"""Credit decoding (dInfer): evidence for a token adds up over the steps in which the model keeps naming it.

    C: a table (position, token) of credits, empty at first
    each step:  C <- decay * C
                C[i, argmax_i] += c_i ^ power          for every masked position i that was read
                z'_i <- z_i + weight * ln(1 + C[i])    decode from z' instead of z

Why: a token that is named again and again, each time with moderate probability, is more likely right than one glance says.

The table is sparse: `memory` tokens a position. As long as a position has named no more than that many different ones the result is that of
the full table; then the least credit is given up.

Reference: dInfer: An Efficient Inference Framework for Diffusion Language Models, arXiv 2510.08666.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Propose
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import lanes, score
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Proposal, Region, State
from dllm_toolkit.types import PyTree


@dataclass(frozen=True)
class Credits:
    """State of Credit: `memory` tokens for each position with what they have earned (0: a free place)."""

    tokens: Int[Tensor, "B L M"]
    earned: Float[Tensor, "B L M"]
    inner: PyTree


@register("propose", "credit")
@dataclass(frozen=True)
class Credit(Propose):
    """Propose as `inner` does, from logits to which the logarithm of each token's credit is added.

    Credits belong to masked positions: a decided position loses them. A masked position that is not read earns nothing, and what it has
    decays. The proposal keeps the logits as the model gave them.

    Reference: dInfer, arXiv 2510.08666, credit decoding.
    """

    cite = ("2510.08666",)

    weight: float = 0.7
    decay: float = 0.8
    power: float = 0.2
    memory: int = 8
    inner: Propose = field(default_factory=Sample)

    def __post_init__(self) -> None:
        if self.weight < 0 or self.power < 0:
            raise DecodeError(
                f"weight and power must be 0 or more, got {self.weight} and {self.power}. Credits are evidence for a token. "
                "Write weight: 0.7 and power: 0.2."
            )
        if not 0 <= self.decay <= 1:
            raise DecodeError(f"decay must be in [0, 1], got {self.decay}. It is what a step leaves of a credit. Write decay: 0.8.")
        if self.memory < 1:
            raise DecodeError(f"memory must be 1 or more, got {self.memory}. It counts tokens a position. Write memory: 8.")

    def init(self, state: State) -> Credits:
        rows, length = state.tokens.shape
        device = state.tokens.device
        tokens = torch.zeros(rows, length, self.memory, dtype=torch.long, device=device)
        return Credits(tokens, torch.zeros(rows, length, self.memory, device=device), self.inner.init(state))

    def __call__(self, answer: Answer, state: State) -> Proposal:
        own: Credits = state.parts.propose
        credits = self._credited(answer.logits, answer.positions, state)
        there = answer.positions.clamp(max=state.tokens.shape[1] - 1).unsqueeze(-1).expand(-1, -1, self.memory)
        bonus = (self.weight * credits.earned.gather(1, there).log1p()).to(answer.logits.dtype)
        logits = answer.logits.scatter_add(-1, credits.tokens.gather(1, there), bonus)
        proposal = self.inner(replace(answer, logits=logits), state.with_part(propose=own.inner))
        return replace(proposal, logits=answer.logits)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Credits:
        own: Credits = state.parts.propose
        credits = self._credited(proposal.logits, proposal.positions, state)
        return replace(credits, inner=self.inner.carry(proposal, region, state.with_part(propose=own.inner)))

    def _credited(self, logits: Float[Tensor, "B R V"], positions: Int[Tensor, "B R"], state: State) -> Credits:
        """The table after this step's predictions."""
        own: Credits = state.parts.propose
        length = state.tokens.shape[1]
        vocabulary = torch.arange(logits.shape[-1], device=logits.device)
        clean = logits.masked_fill(vocabulary == state.spec.mask_id, float("-inf"))
        best = clean.argmax(-1)
        gain = score.probability(clean, best).float() ** self.power
        named = lanes.to_canvas(best, positions, length, 0)
        gain = lanes.to_canvas(gain, positions, length, 0.0).masked_fill(~state.masked, 0)
        earned = (own.earned * self.decay).masked_fill(~state.masked.unsqueeze(-1), 0)
        known = (own.tokens == named.unsqueeze(-1)) & (earned > 0)
        # Its own place if the token has one; otherwise the place with the least credit, free ones first.
        place = torch.where(known.any(-1), known.to(torch.uint8).argmax(-1), earned.argmin(-1)).unsqueeze(-1)
        here = (torch.arange(self.memory, device=earned.device) == place) & (gain > 0).unsqueeze(-1)
        kept = torch.where(known, earned, 0)
        return Credits(
            tokens=torch.where(here, named.unsqueeze(-1), own.tokens),
            earned=torch.where(here, kept + gain.unsqueeze(-1), earned),
            inner=own.inner,
        )


@register("decoder", "credit")
def credit(
    block_length: int | None = 32,
    threshold: float = 0.9,
    weight: float = 0.7,
    decay: float = 0.8,
    power: float = 0.2,
    memory: int = 8,
    temperature: float = 0.0,
) -> BlockDecoder:
    """dInfer's credit decoding (arXiv 2510.08666): a threshold on probabilities that grow while the model keeps naming the same token."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Gate(threshold),
        propose=Credit(weight, decay, power, memory, Sample(temperature=temperature)),
    )
