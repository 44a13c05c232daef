"""Which decided positions change: `Keep` is the rule of every method that never looks back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Revise
from dllm_toolkit.ops import lanes, score
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, Shadow, State
from dllm_toolkit.types import Scores


def hidden_probability(shadow: Shadow, state: State) -> Scores:
    """Probability [B, L] of the token that stands at a position when the model cannot see it; -inf at masks and where nobody asked."""
    logits = shadow.logits
    if state.spec.mask_id < state.spec.vocab_size:  # never proposed, so it takes no probability here either
        logits = logits.clone()
        logits[..., state.spec.mask_id] = float("-inf")
    standing = lanes.to_lanes(state.tokens, shadow.positions, 0)
    found = lanes.to_canvas(score.probability(logits, standing), shadow.positions, state.tokens.shape[1], float("-inf"))
    return found.masked_fill(state.masked, float("-inf"))


@register("revise", "keep")
@dataclass(frozen=True)
class Keep(Revise):
    """Decided tokens stay."""

    monotone = True

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        nothing = torch.zeros_like(after.masked)
        return Edit(nothing, nothing, torch.ones_like(after.done))
