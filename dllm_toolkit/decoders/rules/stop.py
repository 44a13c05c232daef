"""When is a row finished before its budget is full?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Stop
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State, Verdict
from dllm_toolkit.types import Result


@register("stop", "at_eos")
@dataclass(frozen=True)
class AtEos(Stop):
    """Stop a row once an end-of-text token is committed and no mask is left before it; the rest becomes end-of-text.

    With token editing the row must also have settled: an end-of-text that may still be edited away ends nothing.
    """

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        length = state.tokens.shape[1]
        first_eos = torch.where(state.is_eos(), state.positions, length).amin(1)
        first_mask = torch.where(state.masked, state.positions, length).amin(1)
        done = (first_eos < first_mask) & state.settled
        return Verdict(done, first_eos + 1, Result.END_OF_TEXT)


@register("stop", "when_full")
@dataclass(frozen=True)
class WhenFull(Stop):
    """Never stop early: the schedule ends the row when nothing is masked (LLaDA and Dream as published)."""

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        return Verdict(torch.zeros_like(state.done), state.end, Result.FULL)
