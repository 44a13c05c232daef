"""Rules that look back, for tests of what the shipped monotone methods never do: change a decided token, or mask it again.

They are small on purpose and written as a user would write them; no recipe names them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Revise
from dllm_toolkit.state import Edit, Proposal, Region, State


def _decided(proposal: Proposal, region: Region, before: State) -> Tensor:
    """Positions that were decided before this forward and that the schedule still reads."""
    return region.read & ~region.closed & ~before.masked & ~before.fixed


@dataclass(frozen=True)
class Rewrite(Revise):
    """Replace a decided token that the model would now choose otherwise with probability `at_least`, at most `limit` times a position."""

    at_least: float = 0.3
    limit: int = 2

    @property
    def net_progress(self) -> bool:
        return True

    def extra_steps(self, answer_length: int) -> int:
        return self.limit * answer_length

    def init(self, state: State) -> Int[Tensor, "B L"]:
        return torch.zeros_like(state.tokens)

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        spent: Tensor = before.parts.revise
        other = _decided(proposal, region, before) & (proposal.tokens != before.tokens) & (proposal.confidence >= self.at_least)
        replaced = other & (spent < self.limit)
        return Edit(replaced, torch.zeros_like(replaced), ~replaced.any(1), spent + replaced)


@dataclass(frozen=True)
class Doubt(Revise):
    """Mask a decided token again, once, when the model now gives another one with probability `at_least`."""

    at_least: float = 0.3

    def extra_steps(self, answer_length: int) -> int:
        return 2 * answer_length  # a step in which it takes back, and one in which that is decided again

    def init(self, state: State) -> Int[Tensor, "B L"]:
        return torch.zeros_like(state.tokens)

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        spent: Tensor = before.parts.revise
        other = _decided(proposal, region, before) & (proposal.tokens != before.tokens) & (proposal.confidence >= self.at_least)
        doubted = other & (spent < 1)
        return Edit(torch.zeros_like(doubted), doubted, ~doubted.any(1), spent + doubted)
