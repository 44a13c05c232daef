"""Block diffusion with a scheduled floor: SDAR's and LLaDA2.0's sampler for block-causal models.

    blocks of the model, left to right; in each, step t has a quota k_t (its masks spread evenly over its steps)
        H <- {i : c_i > threshold}
        commit H                         if |H| >= k_t          (dynamic)
        commit the k_t best              otherwise

    threshold above 1 leaves the quota alone (static); one step a token leaves k_t = 1, which is the plain threshold

Where the prompt does not fill its last block, the first answer tokens share that block with it (section 8 of DESIGN.md); prompt tokens
count for nothing in the quota. LLaDA2.1's editing of decided tokens is not part of this.

Reference: SDAR, arXiv 2510.06303; LLaDA2.0, arXiv 2512.15745.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Progress
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


@register("commit", "threshold_or_quota")
@dataclass(frozen=True)
class ThresholdOrQuota(Commit):
    """Commit what passes a threshold if that is at least the step's quota, otherwise the quota's best-ranked positions.

    steps: of the whole answer, shared out over blocks by their size; None is one a token, so a quota of 1. strict compares with >, as both
    released codes do.

    Reference: LLaDA2.0, arXiv 2512.15745; SDAR, arXiv 2510.06303.
    """

    cite = ("2512.15745", "2510.06303")

    at_least: float = 0.95
    steps: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")

    def init(self, state: State) -> Progress:
        return Progress.begin(state)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        before: Progress = state.parts.commit
        quota = before.at(region).quota(self.steps)
        passed = (proposal.confidence > self.at_least) if self.strict else (proposal.confidence >= self.at_least)
        passed = passed & region.eligible
        best = select.top_k(proposal.score, region.eligible, quota)
        return torch.where((passed.sum(1) >= quota).unsqueeze(1), passed, best)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Progress:
        before: Progress = state.parts.commit
        return before.at(region).after()


@register("decoder", "block_diffusion")
def block_diffusion(
    block_length: int | None = None,
    threshold: float = 0.95,
    steps: int | None = None,
    strict: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> BlockDecoder:
    """SDAR (arXiv 2510.06303) and LLaDA2.0 (arXiv 2512.15745): a threshold that never commits fewer than a scheduled quota.

    block_length None: the model's own blocks where they count from position 0, otherwise the whole answer. threshold: 0.95 for LLaDA2.0,
    0.9 for SDAR; above 1 only the quota is left. steps: of the whole answer; None is one a token.
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=ThresholdOrQuota(threshold, steps, strict),
        propose=Sample(temperature=temperature, top_p=top_p, top_k=top_k),
    )
