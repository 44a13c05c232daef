"""Which decided positions change: `Keep` is the rule of every method that never looks back; `standing` is what the others look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Revise
from dllm_toolkit.ops import lanes, score
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.types import Canvas, Rows, Scores, Tokens


def standing(proposal: Proposal, tokens: Tokens, state: State) -> Scores:
    """Probability [B, L] that the model gives now to these tokens, the mask id left out as in a proposal; -inf where nothing was read."""
    logits = proposal.logits
    if state.spec.mask_id < state.spec.vocab_size:
        logits = logits.clone()
        logits[..., state.spec.mask_id] = float("-inf")
    here = lanes.to_lanes(tokens, proposal.positions, 0)
    return proposal.to_canvas(score.probability(logits, here), float("-inf"))


def full(region: Region, after: State) -> Rows:
    """Rows in which nothing that the region reads is masked any more."""
    return ~(region.read & after.masked).any(1)


def taking_back(where: Canvas, settled: Rows, carry: object = ()) -> Edit:
    """An edit that masks positions again and replaces none."""
    return Edit(torch.zeros_like(where), where, settled, carry)


@register("revise", "keep")
@dataclass(frozen=True)
class Keep(Revise):
    """Decided tokens stay."""

    monotone = True
    looks_back = False

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        nothing = torch.zeros_like(after.masked)
        return Edit(nothing, nothing, torch.ones_like(after.done))
