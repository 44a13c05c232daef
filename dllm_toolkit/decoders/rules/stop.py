"""When is a row finished before its budget is full?

    at_eos       an end-of-text token is decided and nothing before it is masked: the row is finished
    cut_at_eos   an end-of-text token is decided (or predicted): the row goes on, on a canvas that ends there
    when_full    never
    step_limit   enough steps were taken: everything that is left is committed
    any_of       the first of several rules that has something to say

Rules that commit the rest of an answer at once are in the files of their methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.ops import select
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

    wait_for: prefix, only what is before it. block, and the rest of its block, as loops do that look when a block is full (LocalLeap,
    arXiv 2510.07081); the text is the same. whole_block: a block that is nothing but end-of-text; the text ends with that block's first
    token, whatever end-of-text stands before it (FreeDave's early exit, arXiv 2510.00294).
    """

    fill: bool = False
    skip_first: bool = False
    wait_for: Literal["prefix", "block", "whole_block"] = "prefix"

    def __post_init__(self) -> None:
        if self.skip_first and not self.fill:
            raise DecodeError("skip_first says when fill waits, got fill=False. There is nothing to skip. Write fill: true.")

    def init(self, state: State) -> PyTree:
        return torch.full_like(state.begin, -1) if self.skip_first else ()  # the epoch of the last step

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        length = state.tokens.shape[1]
        ending = state.is_eos() & state.inside
        if self.wait_for == "whole_block":
            other = state.inside & ~(ending & ~state.filled)
            ending = ending & ~select.group_any(other, region.block)
        first = torch.where(ending, state.positions, length).amin(1)
        first_mask = torch.where(state.masked, state.positions, length).amin(1)
        done = (first < first_mask) & state.settled
        if self.wait_for == "block":
            own = region.block.gather(1, first.clamp(max=length - 1).unsqueeze(1))
            done = done & ~(state.masked & (region.block == own)).any(1)
        behind = None
        if self.fill:
            now = state.settled & (region.epoch == state.parts.stop) if self.skip_first else state.settled
            behind = (state.positions > first.unsqueeze(1)) & state.inside & now.unsqueeze(1)
        epoch = region.epoch.clone() if self.skip_first else ()  # not the very tensor that other parts remember
        return Verdict(done, first + 1, Result.END_OF_TEXT, epoch, behind)


@register("stop", "cut_at_eos")
@dataclass(frozen=True)
class CutAtEos(Stop):
    """Shorten the canvas of a row that goes on: nothing behind an end-of-text token is decoded, or seen, any more.

    The end is the first committed end-of-text. `predicted`: without one, the surest end-of-text that the open span proposes, committed or
    not; what is proposed there may change later, but what was cut is gone. Either way the end only moves to the left, and never across a
    decided token that is not end-of-text: the paper's code drops such tokens. A rule that only cuts finishes no row; see `AnyOf`.

    Reference: End-of-Text Prediction, Learn2PD, arXiv 2509.25188.
    """

    cite = ("2509.25188",)

    predicted: bool = False

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        length = state.tokens.shape[1]
        first = torch.where(state.is_eos() & state.inside, state.positions, length).amin(1)
        if self.predicted:
            proposed = region.eligible & state.masked & proposal.read & state.is_eos(proposal.tokens)
            surest = torch.where(select.best(proposal.confidence, proposed), state.positions, length).amin(1)
            first = torch.where(first < length, first, surest)
        first = first.masked_fill(~state.settled, length)
        return Verdict(torch.zeros_like(state.done), state.end, Result.END_OF_TEXT, cut=first + 1)


@register("stop", "when_full")
@dataclass(frozen=True)
class WhenFull(Stop):
    """Never stop early: the schedule ends the row when nothing is masked (LLaDA and Dream as published)."""

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        return Verdict(torch.zeros_like(state.done), state.end, Result.FULL)


@register("stop", "step_limit")
@dataclass(frozen=True)
class StepLimit(Stop):
    """After `steps` steps of a row, commit everything that is left of it at once, whatever its rules and gates would say.

    `decode(max_steps=...)` is the limit of a whole decode and cuts a text before its first mask; this one completes the text. It reads the
    whole answer; what attention does not see yet (later blocks of a block-causal model) cannot be completed, and the text ends before it.
    """

    wants_answer = True

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts steps of a row. Write steps: 256.")

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        now = (state.step + 1 >= self.steps) & state.masked.any(1)
        return Verdict(now, state.end, Result.MAX_STEPS, commit_all=now)


@register("stop", "any_of")
@dataclass(frozen=True)
class AnyOf(Stop):
    """Several stop rules: a row finishes as the first of them says that finishes it; what they fill and cut adds up."""

    rules: tuple[Stop, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise DecodeError("rules must name at least one stop rule, got none. Nothing would ever stop. Write rules: [at_eos].")

    def init(self, state: State) -> PyTree:
        return tuple(rule.init(state) for rule in self.rules)

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        own: tuple[PyTree, ...] = state.parts.stop
        parts = zip(self.rules, own, strict=True)
        verdicts = [rule.check(proposal, region, state.with_part(stop=mine)) for rule, mine in parts]
        done, commits = torch.zeros_like(state.done), torch.zeros_like(state.done)
        end, result = state.end, torch.zeros_like(state.result)
        for one in verdicts:
            said = one.done if one.commit_all is None else one.done | one.commit_all
            first = said & ~done
            why = one.result if isinstance(one.result, Tensor) else int(one.result)
            end = torch.where(first, one.end, end)
            result = torch.where(first, torch.where(one.done, why, int(Result.EARLY_COMMIT)), result)
            if one.commit_all is not None:
                commits = commits | (first & one.commit_all)
            done = done | said
        fill, cut = None, None
        for one in verdicts:
            if one.fill is not None:
                fill = one.fill if fill is None else fill | one.fill
            if one.cut is not None:
                cut = one.cut if cut is None else torch.minimum(cut, one.cut)
        early = commits if any(one.commit_all is not None for one in verdicts) else None
        return Verdict(done, end, result, tuple(one.carry for one in verdicts), fill, cut, early)
