"""Certainty prior: commit where the model is sure *and* the surroundings are known.

    D_i = sum_j known_j exp(-(i - j)^2 / 2 sigma^2) / sum_j exp(-(i - j)^2 / 2 sigma^2)      the prompt counts as known, the end does not
    rank masked positions by c_i * D_i; commit the best k, or all with c_i * D_i >= threshold

Why: a confident guess far from everything that is decided is often a guess of what kind of token stands there. Decoding becomes quasi left
to right without blocks. sigma towards 0 is left to right, one by one.

Made for d2Cache (models/d2cache.py), which computes the positions that this ranks first.

Reference: d2Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching, arXiv 2509.23094.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from dllm_toolkit.decoders.base import Commit, DecodeError, Propose
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops.density import certainty_density
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Proposal, Region, State
from dllm_toolkit.types import PyTree


@register("propose", "certainty_prior")
@dataclass(frozen=True)
class CertaintyPrior(Propose):
    """Propose as `inner` does, ranked by confidence times the share of known positions within about `sigma` positions.

    Reference: d2Cache, arXiv 2509.23094.
    """

    cite = ("2509.23094",)

    sigma: float = 10.0
    inner: Propose = field(default_factory=Sample)

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1000:
            raise DecodeError(f"sigma must be above 0 and at most 1000, got {self.sigma}. It is a width in positions. Write sigma: 10.")

    def init(self, state: State) -> PyTree:
        return self.inner.init(state)

    def __call__(self, answer: Answer, state: State) -> Proposal:
        proposal = self.inner(answer, state)
        behind = state.positions >= state.end.unsqueeze(1)
        density = certainty_density(~state.masked & ~behind, self.sigma).to(proposal.confidence.dtype)
        read = proposal.confidence > float("-inf")
        return replace(proposal, score=torch.where(read, proposal.confidence * density, float("-inf")))

    def carry(self, proposal: Proposal, region: Region, state: State) -> PyTree:
        return self.inner.carry(proposal, region, state)


@register("decoder", "certainty_prior")
def certainty_prior(
    block_length: int | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    sigma: float = 10.0,
    temperature: float = 0.0,
) -> BlockDecoder:
    """d2Cache's certainty-prior decoding (arXiv 2509.23094): the surest position near known ones first, in the whole answer or in blocks.

    steps: forwards of a whole answer, None for one a token. threshold: instead of a number of tokens, commit whatever score reaches it; the
    surroundings of the first mask behind known ones are known by half, so its score is below 0.5.
    """
    if steps is not None and threshold is not None:
        raise DecodeError(
            f"certainty_prior takes steps or threshold, got steps={steps} and threshold={threshold}. They are two commit rules. "
            "Write one of them, e.g. threshold: 0.9."
        )
    commit: Commit = Quota(steps) if threshold is None else Gate(threshold, on="score")
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=commit,
        propose=CertaintyPrior(sigma, Sample(temperature=temperature)),
    )
