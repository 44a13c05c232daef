"""Which decided positions change: `Keep` is the rule of every method that never looks back; `standing` is what the others look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.decoders.base import Revise
from dllm_toolkit.ops import lanes, score
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, Shadow, State
from dllm_toolkit.types import Canvas, Rows, Scores, Tokens


def standing(proposal: Proposal, tokens: Tokens, state: State) -> Scores:
    """Probability [B, L] that the model gives now to these tokens, the mask id left out as in a proposal; -inf where nothing was read."""
    return _given(proposal.logits, proposal.positions, tokens, state)


def hidden_probability(shadow: Shadow, state: State) -> Scores:
    """Probability [B, L] of the token that stands at a position when the model cannot see it; -inf at masks and where nobody asked."""
    return _given(shadow.logits, shadow.positions, state.tokens, state).masked_fill(state.masked, float("-inf"))


def _given(logits: Float[Tensor, "B R V"], positions: Int[Tensor, "B R"], tokens: Tokens, state: State) -> Scores:
    """Probability of each canvas position's token at the lanes that were read; -inf elsewhere."""
    if state.spec.mask_id < state.spec.vocab_size:  # never proposed, so it takes no probability here either
        logits = logits.clone()
        logits[..., state.spec.mask_id] = float("-inf")
    here = score.probability(logits, lanes.to_lanes(tokens, positions, 0))
    return lanes.to_canvas(here, positions, state.tokens.shape[1], float("-inf"))


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
