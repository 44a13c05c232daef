"""CAD, confidence-adaptive decoding: as many tokens as are sure, within bounds, and no end-of-text too early.

    S <- masked positions of the block, without those that say end-of-text while less than r of the answer is decided
    k <- clamp(#{i in S : score_i >= tau}, k_min, min(k_max, |S|))
    commit the k best of S              (S empty: the k_min best of what the gate held back)
    after B steps in a block: commit all that is left

Reference: CD4LM, arXiv 2601.02236 (repository CDLM), confidence-adaptive decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample, Special
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


@dataclass(frozen=True)
class StepsInBlock:
    """How many steps a row has spent in the present block, and which epoch that is."""

    taken: Int[Tensor, "B"]
    epoch: Int[Tensor, "B"]
    answer: Int[Tensor, "B"]


@register("commit", "adaptive")
@dataclass(frozen=True)
class Adaptive(Commit):
    """Commit between `minimum` and `maximum` of the best-ranked positions, as many as score `at_least`.

    eos_share: until this share of the answer is decided, positions that say one of `late` ("eos" or ids) wait.
    max_steps: steps in one block after which everything left in it is committed at once, the gate lifted; None: no limit, since a block
    never needs more steps than it has tokens.

    Reference: CD4LM, arXiv 2601.02236 (repository CDLM).
    """

    cite = ("2601.02236",)

    at_least: float = 0.8
    minimum: int = 1
    maximum: int = 32
    eos_share: float = 0.5
    late: tuple[Special, ...] = ("eos",)
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise DecodeError(
                f"minimum and maximum must satisfy 1 <= minimum <= maximum, got {self.minimum} and {self.maximum}. They bound the tokens "
                "of one step. Write minimum: 1 and maximum: 4."
            )
        if not 0 <= self.eos_share <= 1:
            raise DecodeError(f"eos_share must be in [0, 1], got {self.eos_share}. It is a share of the answer. Write eos_share: 0.5.")

        if self.max_steps is not None and self.max_steps < 1:
            raise DecodeError(f"max_steps must be 1 or more, got {self.max_steps}. It counts steps of a block. Write max_steps: 32.")

    def init(self, state: State) -> StepsInBlock:
        nothing = torch.zeros_like(state.begin)
        return StepsInBlock(nothing, nothing - 1, state.end - state.begin)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own = self._now(region, state)
        decided = (state.inside & ~state.masked).sum(1)
        early = (decided < self.eos_share * own.answer).unsqueeze(1)
        ids = tuple(one for item in self.late for one in (state.spec.eos_ids if item == "eos" else (int(item),)))
        ending = torch.zeros_like(state.masked)
        for one in ids:
            ending = ending | (proposal.tokens == one)
        free = region.eligible & ~(ending & early)
        count = ((proposal.score >= self.at_least) & free).sum(1).clamp(min=self.minimum, max=self.maximum)
        chosen = select.top_k(proposal.score, free, count)
        held = select.top_k(proposal.score, region.eligible, torch.full_like(count, self.minimum))
        chosen = torch.where(free.any(1, keepdim=True), chosen, held)
        if self.max_steps is None:
            return chosen
        return torch.where((own.taken >= self.max_steps).unsqueeze(1), region.eligible, chosen)

    def carry(self, proposal: Proposal, region: Region, state: State) -> StepsInBlock:
        own = self._now(region, state)
        return StepsInBlock(own.taken + 1, own.epoch, own.answer)

    def _now(self, region: Region, state: State) -> StepsInBlock:
        own: StepsInBlock = state.parts.commit
        return StepsInBlock(own.taken.masked_fill(region.epoch != own.epoch, 0), region.epoch, own.answer)


@register("decoder", "confidence_adaptive")
def confidence_adaptive(
    block_length: int | None = 32,
    threshold: float | None = None,
    minimum: int = 1,
    maximum: int = 32,
    eos_share: float = 0.5,
    late: tuple[Special, ...] = ("eos",),
    max_steps_per_block: int | None = None,
    score: Literal["probability", "negative_entropy", "random"] = "probability",
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """CAD (CD4LM): between `minimum` and `maximum` tokens a step by confidence, end-of-text held back at first.

    threshold: default 0.8 for probability, -0.3 for negative_entropy. block_length None: the whole answer (the paper's setting for code).
    max_steps_per_block None: no limit (the released default, the block's length, is never exceeded either).
    """
    at_least = threshold if threshold is not None else (-0.3 if score == "negative_entropy" else 0.8)
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Adaptive(at_least, minimum, maximum, eos_share, late, max_steps_per_block),
        propose=Sample(temperature=temperature, score=score),
        stop=stop,
    )
