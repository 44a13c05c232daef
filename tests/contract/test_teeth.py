"""The contract bites: each of these components is wrong in one way, and the check that should say so does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.decoders.base import Commit, Decoder, Revise, Schedule, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos
from dllm_toolkit.models.base import Query
from dllm_toolkit.state import Edit, Proposal, Region, State, Verdict
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.contract_cache import CACHE_CHECKS
from dllm_toolkit.testing.contract_compile import d11_one_graph
from dllm_toolkit.testing.contract_decoder import DECODER_CHECKS, Bench
from dllm_toolkit.testing.record import record, unequal
from dllm_toolkit.testing.rules import Doubt, Rewrite
from dllm_toolkit.types import Canvas, PyTree, Result, Rows

FULL, BLOCK_CAUSAL = contract.toys()[:2]


EVERY = {contract.title(check)[:3]: check for check in (*DECODER_CHECKS, *CACHE_CHECKS, d11_one_graph)}


def failures(place: Bench, *names: str) -> dict[str, str]:
    """Those of the named checks that fail, with their messages."""
    return {result.name[:3]: result.message for result in contract.run_checks(place, [EVERY[name] for name in names]) if not result.passed}


def failing(decoder: Decoder, *names: str, cache: Cache | None = None, toy: contract.Toy = FULL) -> dict[str, str]:
    return failures(contract.bench(decoder, cache or NoCache(), toy), *names)


def semi(commit: Commit, **slots: Any) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(4), commit, **slots)


@dataclass(frozen=True)
class WritesInPlace(Commit):
    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        state.born[:, 0] += 1
        return proposal.score >= 0.6


@dataclass(frozen=True)
class LooksAtNeighbours(Commit):
    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        return proposal.score >= proposal.score.clamp(min=0).amax() - 0.1


@dataclass(frozen=True)
class ThrowsDice(Commit):
    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        return torch.rand_like(proposal.score) > 0.6


@dataclass(frozen=True)
class Remembers(Commit):
    seen: list[int] = field(default_factory=list)

    def init(self, state: State) -> PyTree:
        self.seen.clear()
        return ()

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        self.seen.append(1)
        return proposal.score >= (0.2 if len(self.seen) > 6 else 0.95)


@dataclass(frozen=True)
class ReadsTheHost(Commit):
    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        bound = 0.3 if proposal.score.amax().item() > 0.5 else 0.6
        return proposal.score >= bound


@pytest.mark.parametrize(
    ("commit", "check"),
    [
        (WritesInPlace(), "D00"),
        (LooksAtNeighbours(), "D05"),
        (ThrowsDice(), "D03"),
        (Remembers(), "D13"),
        (ReadsTheHost(), "D11"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_impure_commit_rules(commit: Commit, check: str) -> None:
    assert check in failing(semi(commit), check)


def test_messages_say_where() -> None:
    message = failing(semi(LooksAtNeighbours()), "D05")["D05"]
    assert "row " in message and "forward " in message and "alone" in message


@dataclass(frozen=True)
class Altered(Schedule):
    """SemiAutoregressive with one field of its region replaced."""

    altered: str = "force"
    inner: Schedule = field(default_factory=lambda: SemiAutoregressive(4))

    def max_reads(self, answer_length: int) -> int:
        return self.inner.max_reads(answer_length)

    def init(self, state: State) -> PyTree:
        return self.inner.init(state)

    def region(self, state: State) -> Region:
        region = self.inner.region(state)
        changed = {
            "force": torch.zeros_like(region.force),
            "closed": region.closed | region.read,
            "read": region.read & state.masked & (state.positions % 2 == 0),
            "eligible": region.read,
        }
        return replace(region, **{self.altered: changed[self.altered]})

    def advance(self, state: State) -> tuple[PyTree, Rows]:
        return self.inner.advance(state)


def test_a_schedule_that_forces_nothing_never_ends() -> None:
    found = failing(BlockDecoder(Altered("force"), Gate(0.95)), "D01")
    assert "did not finish" in found["D01"]


def test_a_schedule_that_closes_too_early() -> None:
    found = failing(BlockDecoder(Altered("closed"), Gate(0.4)), "D07", "C01", "C02", cache=BlockCausalCache(), toy=BLOCK_CAUSAL)
    assert "closed" in found["D07"] and "C01" in found and "C02" in found


def test_a_schedule_that_commits_what_it_does_not_read() -> None:
    assert "D09" in failing(BlockDecoder(Altered("read"), Quota()), "D09")
    assert "D09" in failing(BlockDecoder(Altered("eligible"), Quota()), "D09")


@dataclass(frozen=True)
class SaysItIsMonotone(Revise):
    monotone = True

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        return Edit(region.read & ~before.masked, torch.zeros_like(region.read), torch.ones_like(after.done))


@dataclass(frozen=True)
class RewritesThePast(Revise):
    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        return Edit(torch.zeros_like(region.read), (state_age(before) == 5) & ~before.masked, torch.ones_like(after.done))


def state_age(state: State) -> Tensor:
    return torch.where(state.born >= 0, state.step.unsqueeze(1) - state.born, -1)


@dataclass(frozen=True)
class GoesBackByItself(Decoder):
    """A step of its own that masks a token of a closed block again, past the loop that drops such wishes."""

    inner: BlockDecoder = field(default_factory=lambda: semi(Quota()))

    def init(self, state: State) -> State:
        return self.inner.init(state)

    def step(self, engine: Any, state: State) -> State:
        after = self.inner.step(engine, state)
        return after.take_back((state_age(state) == 5) & ~state.masked)


def test_revise_rules_that_break_their_word() -> None:
    assert "monotone" in failing(semi(Quota(), revise=SaysItIsMonotone()), "D07")["D07"]
    assert "D07" in failing(GoesBackByItself(), "D07")


def test_the_loop_drops_changes_where_the_schedule_has_closed() -> None:
    """U2: a rule may wish for anything; what it wishes for outside of the region's changeable positions does not happen."""
    assert failing(semi(Quota(), revise=RewritesThePast()), "D02", "D07") == {}


@dataclass(frozen=True)
class Wavers(Revise):
    """Takes back what was just committed, for as long as it likes."""

    promises: bool = False
    steps: int = 3

    @property
    def net_progress(self) -> bool:
        return self.promises

    def extra_steps(self, answer_length: int) -> int:
        return 0

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        early = (before.step < self.steps).unsqueeze(1)
        return Edit(torch.zeros_like(region.read), early & before.masked & ~after.masked, torch.ones_like(after.done))


def test_rules_that_take_longer_than_they_say() -> None:
    """U6: a promise of net progress is kept in every step, and no row takes more steps than its parts declare."""
    assert "net progress" in failing(semi(Quota(), revise=Wavers(promises=True)), "D04")["D04"]
    assert "extra_steps" in failing(semi(Quota(), revise=Wavers()), "D04")["D04"]
    assert "did not finish" in failing(semi(Quota(), revise=Wavers(steps=1 << 30)), "D01")["D01"]


@dataclass(frozen=True)
class ReopensEverything(Revise):
    @property
    def net_progress(self) -> bool:
        return True

    def extra_steps(self, answer_length: int) -> int:
        return 0

    def reopen(self, proposal: Proposal, region: Region, state: State) -> Canvas | None:
        return torch.ones_like(state.masked)

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        nothing = torch.zeros_like(region.read)
        return Edit(nothing, nothing, torch.ones_like(after.done))


@pytest.mark.parametrize("schedule", [SemiAutoregressive(4), Pipelined(4, add_at=0.5, activate_at=0.75)], ids=["blocks", "pipeline"])
def test_whatever_is_reopened_a_step_progresses(schedule: Schedule) -> None:
    """The loop commits one more than a rule takes back first, and takes nothing back outside of the region."""
    decoder = BlockDecoder(schedule, Quota(), revise=ReopensEverything())
    assert failing(decoder, "D01", "D02", "D04", "D07", "D09", "D11", "D13", "D14") == {}


@dataclass(frozen=True)
class EditsTheFill(Revise):
    """Names every decided position of the row, the ones behind an end-of-text too."""

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        often = (before.step % 2 == 0).unsqueeze(1)
        return Edit(often & ~before.masked, torch.zeros_like(region.read), torch.ones_like(after.done))


def test_what_a_stop_rule_has_filled_stays() -> None:
    """With fill, the end-of-text that the fill stands behind is not edited either, so no row ends in text that nobody committed."""
    rows = 0
    for seed in range(4):
        model = contract.tiny_transformer(2, "full", 0, seed)
        place = Bench(semi(Quota(), revise=EditsTheFill(), stop=AtEos(fill=True)), NoCache(), model, batch=unequal(seed))
        assert failures(place, "D01", "D07", "D08", "D10") == {}
        rows += sum(
            bool(moment.after.filled[row].any()) and not bool(moment.after.done[row])
            for moment in place.recording.moments
            for row in range(4)
        )
    assert rows, "nothing was filled while a row went on"


@dataclass(frozen=True)
class StopsTooSoon(Stop):
    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        return Verdict(state.is_eos().any(1) | (state.step > 2), state.end, Result.END_OF_TEXT)


def test_a_stop_rule_that_leaves_masks_before_the_end() -> None:
    assert "D10" in failing(semi(Quota(), stop=StopsTooSoon()), "D10")


@dataclass(frozen=True)
class Overwrites(Decoder):
    """A step of its own that forgets what is fixed."""

    inner: BlockDecoder = field(default_factory=lambda: semi(Quota()))

    def init(self, state: State) -> State:
        return self.inner.init(state)

    def step(self, engine: Any, state: State) -> State:
        after = self.inner.step(engine, state)
        return replace(after, tokens=after.tokens.clone().index_fill(1, torch.tensor([0]), 4))


def test_a_step_that_changes_the_prompt() -> None:
    assert "D02" in failing(Overwrites(), "D02")


@dataclass(frozen=True)
class NeverRefreshes(Cache):
    """Dual cache without the refresh: keys of the block before are those of its masks."""

    def init(self, state: State) -> PyTree:
        return torch.zeros_like(state.masked)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible & (region.read | ~own), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return own | plan.compute


@dataclass(frozen=True)
class StoresEarly(Cache):
    """Block-causal cache that keeps what is decided, not what is closed."""

    exact = True
    needs = BlockCausalCache.needs

    def init(self, state: State) -> PyTree:
        return torch.zeros_like(state.masked)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible & (region.eligible | ~own), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return own | (plan.compute & ~state.masked)


@dataclass(frozen=True)
class HidesTheFuture(Cache):
    exact = True

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        past = region.visible & (region.closed | region.read | state.fixed)
        return Plan(past, past)


@dataclass(frozen=True)
class ComputesTooLittle(Cache):
    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible & (dirty | (region.read & (state.positions % 3 > 0))), region.visible)


@dataclass(frozen=True)
class SavesNothing(Cache):
    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible, region.visible)


@pytest.mark.parametrize(
    ("cache", "checks", "toy"),
    [
        (NeverRefreshes(), {"C01"}, FULL),
        (StoresEarly(), {"C02"}, BLOCK_CAUSAL),
        (HidesTheFuture(), {"C01", "C02"}, FULL),
        (ComputesTooLittle(), {"C05", "D09"}, FULL),
        (SavesNothing(), {"C05"}, FULL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Cache) else "",
)
def test_wrong_caches(cache: Cache, checks: set[str], toy: contract.Toy) -> None:
    assert checks == set(failing(semi(Gate(0.6)), *checks, cache=cache, toy=toy))


@dataclass(frozen=True)
class Rewired:
    """A model whose queries are tampered with on the way in."""

    model: Any
    fault: str

    @property
    def spec(self) -> Any:
        return self.model.spec

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return self.model.buffer(rows, slots)

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Tensor:
        assert kv is not None and query.slots is not None and query.allow is not None
        if self.fault == "dead lanes write slot 0":
            # The first row keeps its own lane for slot 0; what other rows pad with must not land there.
            slots = torch.where(query.slots == kv.slots - 1, 0, query.slots)
            return self.model(query._replace(slots=slots), kv)
        return self.model(query._replace(allow=torch.ones_like(query.allow)), kv)


def test_a_mutant_that_lets_dead_lanes_write() -> None:
    """Logits of a row then depend on how wide its neighbours are."""
    place = Bench(semi(Gate(0.6)), DualCache(), Rewired(FULL.model, "dead lanes write slot 0"))
    assert "D05" in failures(place, "D05")


def test_a_model_that_ignores_its_mask() -> None:
    place = Bench(semi(Gate(0.6)), BlockCausalCache(), Rewired(BLOCK_CAUSAL.model, "sees everything"))
    assert "C04" in failures(place, "C04")


@pytest.mark.parametrize("revise", [Rewrite(), Doubt()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("schedule", [SemiAutoregressive(4), Pipelined(4, add_at=0.5, activate_at=0.75)], ids=["blocks", "pipeline"])
def test_the_rules_that_look_back_do(revise: Revise, schedule: Schedule) -> None:
    edits = 0
    for toy in (FULL, BLOCK_CAUSAL):
        decoder = BlockDecoder(schedule, Gate(0.4), revise=revise)
        edits += int(record(toy.model, decoder, NoCache(), unequal()).last.edits.sum())
    assert edits > 2


def test_check_component_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    two = contract.toys()[:2]  # reports look alike on every toy
    monkeypatch.setattr(contract, "toys", lambda: two)
    results = contract.check_component(LooksAtNeighbours)
    failed = {result.name.partition(" ")[0] for result in results if not result.passed}
    assert "D05_rows_alone" in failed and "D02_fixed" not in failed
    assert {result.name for result in results} >= {
        "D02_fixed [SemiAutoregressive + LooksAtNeighbours, cache dual, full attention]",
        "C02_exact [Pipelined + LooksAtNeighbours, cache block_causal, block_causal attention]",
    }
    (built,) = contract.check_component(Gate)
    assert not built.passed and "at_least" in built.message
    (odd,) = contract.check_component(object())
    assert not odd.passed and "nothing to check" in odd.message


def test_check_component_survives_what_a_rule_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    two = contract.toys()[:2]
    monkeypatch.setattr(contract, "toys", lambda: two)

    @dataclass(frozen=True)
    class Breaks(Stop):
        def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
            raise KeyError("my mistake")

    results = contract.check_component(Breaks())
    decoding = [result for result in results if result.name.startswith("D") and "cache none" in result.name]
    assert decoding and not any(result.passed for result in decoding)
    assert all("KeyError: 'my mistake'" in result.message and "test_teeth.py" in result.message for result in decoding)
