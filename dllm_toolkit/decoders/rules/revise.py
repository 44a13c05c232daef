"""Which decided positions change: `Keep` is the rule of every method that never looks back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Revise
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State


@register("revise", "keep")
@dataclass(frozen=True)
class Keep(Revise):
    """Decided tokens stay."""

    monotone = True
    looks_back = False

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        nothing = torch.zeros_like(after.masked)
        return Edit(nothing, nothing, torch.ones_like(after.done))
