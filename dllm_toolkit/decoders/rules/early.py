"""Committing the rest of an answer at once: what the rules that do so (Prophet, SchED) measure, and what they say.

    gap_i <- z_i(best) - z_i(second best)         raw logits; the mask token does not count
    g     <- mean of gap_i over a region of the answer
    g >= bound(progress): every mask takes its proposed token, and the row is finished

A position that is decided and not read any more keeps the gap of its last reading: the released code reads it in every forward and
counts whatever the model says of its own token. Progress is the decided share of what there is to decode, after the commits of the step;
for a quota it is the share of the steps that are over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.state import Proposal, State, Verdict
from dllm_toolkit.types import Canvas, Result, Rows


@dataclass(frozen=True)
class Margins:
    """State of such a rule: the last gap of every position (-inf before the first), its region, masks of the answer at the start."""

    gap: Float[Tensor, "B L"]
    region: Canvas
    masks: Int[Tensor, "B"]

    @classmethod
    def begin(cls, state: State, region: Canvas) -> Margins:
        """Before the first step. A row whose region holds nothing to decode is judged by its whole answer."""
        there = region & state.masked
        region = torch.where(there.any(1, keepdim=True), there, state.masked)
        gap = torch.full(state.tokens.shape, float("-inf"), dtype=torch.float64, device=state.tokens.device)
        return cls(gap, region, state.masked.sum(1))

    def after(self, proposal: Proposal, state: State) -> Margins:
        """With the gaps of this step."""
        seen = proposal.to_canvas(gaps(proposal.logits, state.spec.mask_id), float("-inf"))
        return replace(self, gap=torch.where(proposal.read, seen, self.gap))

    def mean(self, state: State) -> Float[Tensor, "B"]:
        """Mean gap of the region, end-of-text that nobody committed left out; -inf where nothing is left of it."""
        counted = self.region & ~state.filled
        count = counted.sum(1)
        mean = torch.where(counted, self.gap, 0.0).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, mean, float("-inf"))

    def progress(self, state: State) -> Float[Tensor, "B"]:
        """Decided share of the answer, in [0, 1]."""
        return 1.0 - state.masked.sum(1).double() / self.masks.clamp(min=1)


def gaps(logits: Float[Tensor, "B R V"], mask_id: int) -> Float[Tensor, "B R"]:
    """Best logit minus second best, among the tokens that can be proposed; float64."""
    top = logits.topk(min(3, logits.shape[-1]), dim=-1)
    hidden = top.indices == mask_id
    value = top.values.double()
    best = torch.where(hidden[..., 0], value[..., 1], value[..., 0])
    second = torch.where(hidden[..., 0] | hidden[..., 1], value[..., 2], value[..., 1])
    return best - second


def commit_rest(own: Margins, bound: Float[Tensor, "B"], end_at_eos: bool, proposal: Proposal, state: State) -> Verdict:
    """Rows whose mean gap reaches `bound` commit all; never a row with a mask that was not read, nor where the bound is infinite.

    end_at_eos: the text then ends with the first end-of-text token, committed or just proposed.
    """
    unread: Rows = (state.masked & ~proposal.read).any(1)
    sure = (own.mean(state) >= bound) & (bound < float("inf"))
    commits = sure & state.masked.any(1) & ~unread & state.settled
    end = state.end
    if end_at_eos:
        ending = (state.is_eos() | (state.masked & state.is_eos(proposal.tokens))) & state.inside
        end = torch.minimum(end, torch.where(ending, state.positions + 1, state.tokens.shape[1]).amin(1))
    return Verdict(torch.zeros_like(state.done), end, Result.EARLY_COMMIT, own, commit_all=commits)
