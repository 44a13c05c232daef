"""A commit rule of one's own: spend a budget of uncertainty in every step.

dllm-toolkit check   my_rule.EntropySpend          does it keep the contract?    (from this folder)
dllm-toolkit compare my_rule.yaml                  what does it cost and save?
"""

from dataclasses import dataclass
from math import inf

import torch

from dllm_toolkit import Commit, Proposal, Region, State
from dllm_toolkit.ops.score import entropy
from dllm_toolkit.types import Canvas


@dataclass(frozen=True)
class EntropySpend(Commit):
    """Commit the surest positions as long as their entropies add up to no more than `budget` nats."""

    budget: float = 1.0

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        doubt = proposal.to_canvas(entropy(proposal.logits), fill=inf)  # [B, L]
        doubt, order = doubt.masked_fill(~region.eligible, inf).sort(dim=1, stable=True)
        return torch.zeros_like(region.eligible).scatter(1, order, doubt.cumsum(1) <= self.budget)
