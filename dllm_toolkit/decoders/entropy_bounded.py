"""EB-sampler, entropy-bounded unmasking: commit as many tokens as their dependence on each other allows.

    H_i   <- entropy of the prediction at masked position i, in nats
    order    the positions by a proxy of their error: lowest entropy, highest probability, or largest margin first
    commit   the longest prefix U of that order with  sum_U H - max_U H <= budget        (one position always fits)

Why: the error of sampling U independently instead of jointly is bounded by that difference. Under the order by entropy the maximum is the
last element, so the bound is the sum of all entropies but the last.

Reference: Ben-Hamu et al., Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking, arXiv 2505.24857.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample, Score
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import score, select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


@register("commit", "entropy_budget")
@dataclass(frozen=True)
class EntropyBudget(Commit):
    """Commit the longest prefix of the ranking whose entropies, the largest left out, add up to no more than `budget` nats.

    0 commits the best position, and with it only those that are certain; .inf commits everything.

    Reference: EB-sampler, arXiv 2505.24857.
    """

    cite = ("2505.24857",)

    budget: float = 0.1

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise DecodeError(f"budget must be 0 or more, got {self.budget}. It bounds a sum of entropies in nats. Write budget: 0.1.")

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        length = state.tokens.shape[1]
        # The mask id is never proposed, so it is no part of the distribution either.
        vocabulary = torch.arange(proposal.logits.shape[-1], device=proposal.logits.device)
        logits = proposal.logits.masked_fill(vocabulary == state.spec.mask_id, float("-inf"))
        doubt = proposal.to_canvas(score.entropy(logits), 0.0).clamp(min=0).double()
        place = select.rank(proposal.score, region.eligible)  # 0-based; L for the others
        ranked = torch.zeros_like(torch.cat((doubt, doubt[:, :1]), dim=1)).scatter(1, place, doubt)[:, :length]
        # sum - max of every prefix, added up without ever subtracting: each position brings the smaller of its own entropy and the
        # largest before it. A difference of two sums would lose small entropies next to large ones.
        largest_before = torch.cat((torch.zeros_like(ranked[:, :1]), ranked.cummax(1).values[:, :-1]), dim=1)
        spent = torch.minimum(ranked, largest_before).cumsum(1)
        return region.eligible & (spent.gather(1, place.clamp(max=length - 1)) <= self.budget)


@register("decoder", "entropy_bounded")
def entropy_bounded(
    block_length: int | None = 32,
    budget: float = 0.1,
    order: Literal["entropy", "probability", "margin"] = "entropy",
    temperature: float = 0.0,
) -> BlockDecoder:
    """EB-sampler (arXiv 2505.24857): a budget of entropy a step. budget: 0.1 nats is common, 0.01 and 0.001 are cautious.

    order: what ranks the positions. block_length None: the whole answer at once, as in the paper.
    """
    ranking: dict[str, Score] = {"entropy": "negative_entropy", "probability": "probability", "margin": "margin"}
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=EntropyBudget(budget),
        propose=Sample(temperature=temperature, score=ranking[order]),
    )
