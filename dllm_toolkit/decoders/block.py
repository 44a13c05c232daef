"""The template step that nine methods in ten are a choice of slots for.

    region <- schedule            where
    answer <- model               the only forward
    proposal <- propose           which token, how sure
    reopened <- revise            which tokens count as masked in this step (most rules: none)
    chosen <- commit + progress   which masks become tokens
    edit <- revise                which tokens change or go back
    verdict <- stop               which rows are finished
    advance <- schedule           move the open span

`decide` is everything after the forward: one sync-free graph on canvases of one shape for the whole decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from dllm_toolkit.decoders.base import Commit, Decoder, Part, Propose, Revise, Schedule, Stop
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep, hidden_probability
from dllm_toolkit.decoders.rules.stop import AtEos
from dllm_toolkit.ops.select import ensure_count, ensure_progress
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Region, State
from dllm_toolkit.types import Canvas

if TYPE_CHECKING:
    from dllm_toolkit.engine import Engine


@register("decoder", "block")
@dataclass(frozen=True)
class BlockDecoder(Decoder):
    """One forward, one decision: the template with five slots."""

    schedule: Schedule
    commit: Commit
    propose: Propose = field(default_factory=Sample)
    revise: Revise = field(default_factory=Keep)
    stop: Stop = field(default_factory=AtEos)

    def init(self, state: State) -> State:
        _ = self.looks_back, self.wants_answer  # known before a step is compiled: looking for them takes a lock
        return state.with_part(
            schedule=self.schedule.init(state),
            propose=self.propose.init(state),
            commit=self.commit.init(state),
            revise=self.revise.init(state),
            stop=self.stop.init(state),
        )

    @cached_property
    def looks_back(self) -> bool:
        """Does a part want the logits of decided positions?"""
        return any(isinstance(one, Part) and one.looks_back for one in self.members())

    @cached_property
    def wants_answer(self) -> bool:
        """Does a stop rule look at the whole answer?"""
        return any(isinstance(one, Stop) and one.wants_answer for one in self.members())

    def max_reads(self, answer_length: int) -> int:
        reads = self.schedule.max_reads(answer_length)
        return max(reads, answer_length) if self.wants_answer else reads

    def region(self, state: State) -> Region:
        """The region that the coming step asks for: the schedule's, less what no part looks at, and what a stop rule wants besides."""
        region = self.schedule.region(state)
        if not self.looks_back:
            region = replace(region, read=region.read & state.masked, open=region.span)
        if self.wants_answer:
            region = replace(region, read=region.read | (state.masked & state.inside & region.visible))
        return region

    def look(self, state: State) -> tuple[Region, Canvas | None]:
        """The region of the coming step, and the positions that are asked anew."""
        region = self.region(state)
        return region, self.revise.shadows(region, state)

    def step(self, engine: Engine, state: State) -> State:
        state = engine.hold(state)
        region, shadows = engine.unit(self.look, borrow=True, light=True)(state)
        answer = engine.ask(state, region, shadows, borrow=True)
        if engine.over:
            return state
        return engine.unit(self.decide, borrow=True)(answer, region, state)

    def decide(self, answer: Answer, region: Region, state: State) -> State:
        proposal = self.propose(answer, state)
        if answer.shadow is not None:
            proposal = replace(proposal, shadow=hidden_probability(answer.shadow, state))
        region = self.schedule.refine(region, proposal, state)
        opened = state
        reopened = self.revise.reopen(proposal, region, state)
        if reopened is not None:
            reopened = reopened & region.changeable(state) & region.eligible.any(1, keepdim=True)
            opened = state.take_back(reopened)
            region = replace(region, eligible=region.eligible | reopened)
        asked = self.commit.select(proposal, region, opened) & region.eligible
        chosen = ensure_progress(asked, proposal.score, region.eligible, region.group, region.force)
        if reopened is not None:  # what is taken back first must not cost progress
            chosen = ensure_count(chosen, proposal.score, region.eligible, reopened.sum(1) + reopened.any(1).long())
        chosen = chosen & ~state.done.unsqueeze(1)
        after = opened.write(chosen, proposal.tokens)
        parts = replace(
            state.parts,
            schedule=self.schedule.carry(proposal, region, opened),
            propose=self.propose.carry(proposal, region, opened),
            commit=self.commit.carry(proposal, region, opened),
        )
        after = replace(after, forced=state.forced + (chosen & ~asked).sum(1), parts=parts)
        if reopened is not None:
            changed = reopened & ((after.tokens != state.tokens) | after.masked) & ~state.done.unsqueeze(1)
            after = replace(after, edits=state.edits + changed.sum(1))
        if not isinstance(self.revise, Keep):
            edit = self.revise.edit(proposal, region, state, after)
            may = region.changeable(after)
            edit = replace(edit, replace=edit.replace & may & ~edit.remask, remask=edit.remask & may)
            after = after.revise(edit, proposal.tokens)
        after = after.finish(self.stop.check(proposal, region, after), proposal)
        return after.advance(*self.schedule.advance(after))
