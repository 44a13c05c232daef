"""KLASS, KL-adaptive stability sampling: commit what is sure and has stopped changing.

    d_t(i)  <- KL(p_t(i) || p_(t-1)(i))       between the predictions of two successive steps
    ready   <- {i : c_i >= threshold, and the last n values of d(i) are below the divergence}
    commit     ready, or if that is empty what the fallback chooses: LLaDA's scheduled quota, by default one token

A prediction that was not made in the step before is unknown, and unknown is not stable: in a block's first n steps, and wherever a schedule
did not read the position. The released code reads the whole canvas in every step and so has a history when a block opens; here a history
begins with the block.

Reference: KLASS: KL-Guided Fast Inference in Masked Diffusion Models, arXiv 2511.05664.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import lanes
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, PyTree

TINY = 1e-12
"""Added to probabilities under the logarithm, as in the released code."""


@dataclass(frozen=True)
class Beliefs:
    """State of Stable: the distributions of the step before, for M positions only, and how long each position has been stable.

    M instead of L, because L x V numbers a row are more than the canvas itself is worth: 128 positions of a 126464-token vocabulary are
    65 MB, 4096 are 2 GB.
    """

    belief: Float[Tensor, "B M V"]
    positions: Int[Tensor, "B M"]  # whose belief each slot holds; L where none
    steady: Int[Tensor, "B L"]  # steps in a row with a divergence below the bound, up to now
    fallback: PyTree


@register("commit", "stable")
@dataclass(frozen=True)
class Stable(Commit):
    """Commit what has probability `at_least` and whose distribution moved by less than `divergence` in each of the last `history` steps.

    memory: how many positions' distributions are kept, [B, memory, V] in float32; the leftmost read ones, others count as unknown. Give it
    the block length; None keeps as many as the canvas has. fallback: what chooses in a row where nothing is ready.

    Reference: KLASS, arXiv 2511.05664.
    """

    cite = ("2511.05664",)

    at_least: float = 0.6
    divergence: float = 0.01
    history: int = 2
    memory: int | None = None
    fallback: Commit = field(default_factory=Quota)

    def __post_init__(self) -> None:
        if self.divergence < 0:
            raise DecodeError(f"divergence must be 0 or more, got {self.divergence}. It bounds a KL in nats. Write divergence: 0.01.")
        if self.history < 0:
            raise DecodeError(f"history must be 0 or more, got {self.history}. It counts steps. Write history: 2.")
        if self.memory is not None and self.memory < 1:
            raise DecodeError(f"memory must be 1 or more, got {self.memory}. It counts positions. Write memory: 64, or the block length.")

    def init(self, state: State) -> Beliefs:
        rows, length = state.tokens.shape
        kept = min(self.memory or length, length)
        device = state.tokens.device
        return Beliefs(
            belief=torch.zeros(rows, kept, state.spec.vocab_size, device=device),
            positions=torch.full((rows, kept), length, device=device),
            steady=torch.zeros_like(state.tokens),
            fallback=self.fallback.init(state),
        )

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own: Beliefs = state.parts.commit
        steady = self._steady(_belief(proposal, state), proposal, state)
        ready = region.eligible & (proposal.confidence >= self.at_least) & (steady >= self.history)
        scheduled = self.fallback.select(proposal, region, state.with_part(commit=own.fallback))
        return torch.where(ready.any(1, keepdim=True), ready, scheduled)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Beliefs:
        own: Beliefs = state.parts.commit
        length = state.tokens.shape[1]
        belief = _belief(proposal, state)
        missing = own.positions.shape[1] - proposal.positions.shape[1]  # negative: more was read than is kept
        return Beliefs(
            belief=functional.pad(belief, (0, 0, 0, missing)),
            positions=functional.pad(proposal.positions, (0, missing), value=length),
            steady=self._steady(belief, proposal, state),
            fallback=self.fallback.carry(proposal, region, state.with_part(commit=own.fallback)),
        )

    def _steady(self, belief: Float[Tensor, "B R V"], proposal: Proposal, state: State) -> Int[Tensor, "B L"]:
        """For how many steps in a row, this one included, each read position has hardly moved; 0 where that is not known."""
        own: Beliefs = state.parts.commit
        rows, kept, vocabulary = own.belief.shape
        length = state.tokens.shape[1]
        slots = torch.arange(kept, device=belief.device).expand(rows, kept)
        slot = lanes.to_lanes(lanes.to_canvas(slots, own.positions, length, kept), proposal.positions, kept)  # [B, R]
        before = own.belief.gather(1, slot.clamp(max=kept - 1).unsqueeze(-1).expand(-1, -1, vocabulary))
        moved = (belief * ((belief + TINY).log() - (before + TINY).log())).sum(-1)  # [B, R]
        calm = lanes.to_canvas((slot < kept) & (moved < self.divergence), proposal.positions, length, False)
        return torch.where(calm, own.steady + 1, 0)


def _belief(proposal: Proposal, state: State) -> Float[Tensor, "B R V"]:
    """The distribution of every read lane, in float32 and without the mask id."""
    vocabulary = torch.arange(proposal.logits.shape[-1], device=proposal.logits.device)
    return proposal.logits.float().masked_fill(vocabulary == state.spec.mask_id, float("-inf")).softmax(-1)


@register("decoder", "klass")
def klass(
    block_length: int | None = 64,
    threshold: float = 0.6,
    divergence: float = 0.01,
    history: int = 2,
    steps: int | None = None,
    temperature: float = 0.0,
) -> BlockDecoder:
    """KLASS (arXiv 2511.05664): sure and stable tokens at once, otherwise the scheduled quota.

    The paper's threshold / divergence: LLaDA 0.6 / 0.015 on GSM8K, 0.6 / 0.01 on MATH, 0.9 / 0.01 on HumanEval; Dream 0.9 / 0.001.
    steps: of the fallback's schedule for the whole answer (None: one token a step).
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Stable(threshold, divergence, history, block_length, Quota(steps)),
        propose=Sample(temperature=temperature),
    )
