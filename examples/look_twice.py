"""A decoder with a step of its own: fill tentatively, look again, keep what the second look still agrees with.

    dllm-toolkit check look_twice.LookTwice

It costs two forwards a step and needs no change anywhere else: engine, caches, counters and tests are those of every other decoder.
"""

from dataclasses import dataclass, field

from dllm_toolkit import Decoder, Propose, Schedule, State
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.engine import Engine
from dllm_toolkit.ops.select import ensure_progress


@dataclass(frozen=True)
class LookTwice(Decoder):
    """Commit what is proposed with probability `agree` and proposed again once the other such tokens are in place."""

    schedule: Schedule = field(default_factory=lambda: SemiAutoregressive(16))
    propose: Propose = field(default_factory=Sample)
    agree: float = 0.3

    def init(self, state: State) -> State:
        return state.with_part(schedule=self.schedule.init(state))

    def step(self, engine: Engine, state: State) -> State:
        region = self.schedule.region(state)
        first = self.propose(engine.ask(state, region), state)
        tried = region.eligible & (first.confidence >= self.agree)
        second = self.propose(engine.ask(state.write(tried, first.tokens), region), state)
        keep = tried & (second.tokens == first.tokens)
        keep = ensure_progress(keep, first.score, region.eligible, region.group, region.force)
        after = state.write(keep, first.tokens)
        return after.advance(*self.schedule.advance(after))
