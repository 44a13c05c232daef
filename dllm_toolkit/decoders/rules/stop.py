"""When is a row finished before its budget is full?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State, Verdict
from dllm_toolkit.types import PyTree, Result


@register("stop", "at_eos")
@dataclass(frozen=True)
class AtEos(Stop):
    """Stop a row once an end-of-text token is committed and no mask is left before it; the rest becomes end-of-text.

    With token editing the row must also have settled: an end-of-text that may still be edited away ends nothing. `fill` writes that rest
    at once, while masks are left before it, so that a model with full attention sees where the text ends (d3LLM, arXiv 2601.07568;
    dInfer, arXiv 2510.08666). `skip_first` does not do so in the first step of a block (a slip of dInfer's loops with a cache).
    """

    fill: bool = False
    skip_first: bool = False

    def __post_init__(self) -> None:
        if self.skip_first and not self.fill:
            raise DecodeError("skip_first says when fill waits, got fill=False. There is nothing to skip. Write fill: true.")

    def init(self, state: State) -> PyTree:
        return torch.full_like(state.begin, -1) if self.skip_first else ()  # the epoch of the last step

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        length = state.tokens.shape[1]
        first_eos = torch.where(state.is_eos(), state.positions, length).amin(1)
        first_mask = torch.where(state.masked, state.positions, length).amin(1)
        done = (first_eos < first_mask) & state.settled
        behind = None
        if self.fill:
            now = state.settled & (region.epoch == state.parts.stop) if self.skip_first else state.settled
            behind = (state.positions > first_eos.unsqueeze(1)) & state.inside & now.unsqueeze(1)
        epoch = region.epoch.clone() if self.skip_first else ()  # not the very tensor that other parts remember
        return Verdict(done, first_eos + 1, Result.END_OF_TEXT, epoch, behind)


@register("stop", "when_full")
@dataclass(frozen=True)
class WhenFull(Stop):
    """Never stop early: the schedule ends the row when nothing is masked (LLaDA and Dream as published)."""

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        return Verdict(torch.zeros_like(state.done), state.end, Result.FULL)
