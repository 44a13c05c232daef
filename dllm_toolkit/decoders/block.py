"""The template step that nine methods in ten are a choice of slots for.

    region <- schedule            where
    answer <- model               the only forward
    proposal <- propose           which token, how sure
    chosen <- commit + progress   which masks become tokens
    edit <- revise                which tokens change or go back
    verdict <- stop               which rows are finished
    advance <- schedule           move the open span

`decide` is everything after the forward: one sync-free graph on canvases of one shape for the whole decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dllm_toolkit.decoders.base import Commit, Decoder, Propose, Revise, Schedule, Stop
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep, hidden_probability
from dllm_toolkit.decoders.rules.stop import AtEos
from dllm_toolkit.ops.select import ensure_progress
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Region, State

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
        return state.with_part(
            schedule=self.schedule.init(state),
            propose=self.propose.init(state),
            commit=self.commit.init(state),
            revise=self.revise.init(state),
            stop=self.stop.init(state),
        )

    def region(self, state: State) -> Region:
        """The region that the coming step asks for."""
        return self.schedule.region(state)

    def step(self, engine: Engine, state: State) -> State:
        region = self.region(state)
        answer = engine.ask(state, region, self.revise.shadows(region, state))
        return engine.unit(self.decide)(answer, region, state)

    def decide(self, answer: Answer, region: Region, state: State) -> State:
        proposal = self.propose(answer, state)
        if answer.shadow is not None:
            proposal = replace(proposal, shadow=hidden_probability(answer.shadow, state))
        region = self.schedule.refine(region, proposal, state)
        asked = self.commit.select(proposal, region, state) & region.eligible
        chosen = ensure_progress(asked, proposal.score, region.eligible, region.group, region.force)
        chosen = chosen & ~state.done.unsqueeze(1)
        after = state.write(chosen, proposal.tokens)
        parts = replace(
            state.parts,
            propose=self.propose.carry(proposal, region, state),
            commit=self.commit.carry(proposal, region, state),
        )
        after = replace(after, forced=state.forced + (chosen & ~asked).sum(1), parts=parts)
        if not isinstance(self.revise, Keep):
            after = after.revise(self.revise.edit(proposal, region, state, after), proposal.tokens)
        after = after.finish(self.stop.check(proposal, region, after))
        return after.advance(*self.schedule.advance(after))
