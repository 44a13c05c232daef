"""Stop rules, early commits and the trained filter at the limits of their parameters, and what they promise in between.

Equal in `PAIRS` means equal tokens, birth steps, steps, forwards and lanes, and equal logits in every forward. A rule that reads the whole
answer asks for more logits (and the dual cache computes more), so there tokens, birth steps, steps and forwards must agree, and the
logits of what both have read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest
import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.delayed import DelayedCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decoders.base import Commit, Decoder, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.learn2pd import Filter, LearnedFilter, learn2pd
from dllm_toolkit.decoders.prophet import PhasedMargin, prophet
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AnyOf, AtEos, CutAtEos, StepLimit, WhenFull
from dllm_toolkit.decoders.sched import ScheduledMargin, sched
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.cases_stops import toy_filter
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.testing.pairs import Pair, pair
from dllm_toolkit.testing.record import Batch, difference_where_both_read, infill, record, unequal
from dllm_toolkit.types import Result

SIZE = 4
EYE = torch.eye(SIZE)
SURE = Filter(((0 * EYE, torch.full((SIZE,), inf)),), SIZE)
UNSURE = Filter(((0 * EYE, torch.full((SIZE,), -inf)),), SIZE)
BOUND = Filter(((64 * EYE, torch.full((SIZE,), -64 * 0.6)),), SIZE)
"""A filter that is a threshold of 0.6 when 0.5 is enough."""


def stops(rule: Stop) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), Gate(0.6), stop=rule)


def stops_whole(rule: Stop) -> Decoder:
    return BlockDecoder(SemiAutoregressive(None), Quota(6), stop=rule)


def stops_pipelines(rule: Stop) -> Decoder:
    return BlockDecoder(Pipelined(4, add_at=0.5, activate_at=0.75), Gate(0.6), stop=rule)


def commits(rule: Commit) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), rule)


def pipelines(rule: Commit) -> Decoder:
    return BlockDecoder(Pipelined(4, add_at=0.5, activate_at=0.75), rule)


def endless(rule: Stop) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), Gate(0.6), Sample(suppress=("eos",)), stop=rule)


PAIRS = (
    pair("E25 a filter that accepts nothing is the quota", commits, LearnedFilter(toy_filter(), 1.01), Quota()),
    pair("E25 with steps", commits, LearnedFilter(toy_filter(), 1.01, Quota(5)), Quota(5)),
    pair("a filter that is never sure is the quota", commits, LearnedFilter(UNSURE), Quota()),
    pair("a filter that is always sure fills a block in one step", commits, LearnedFilter(SURE), Gate(0.0)),
    pair("a filter that accepts all fills a block in one step", commits, LearnedFilter(toy_filter(), 0.0), Gate(0.0)),
    pair("a filter can be a threshold", commits, LearnedFilter(BOUND, 0.5), Gate(0.6)),
    pair("a filter can be a threshold in a pipeline", pipelines, LearnedFilter(BOUND, 0.5, Gate(1.1)), Gate(0.6)),
    Pair("E25 as presets", lambda: learn2pd(toy_filter(), accept=2.0, cut="never"), lambda: semi_ar(4)),
    Pair(
        "E25 as presets, without end",
        lambda: learn2pd(toy_filter(), accept=2.0, cut="never", stop_at_eos=False),
        lambda: vanilla(block_length=4),
    ),
    Pair("a threshold as presets", lambda: learn2pd(BOUND, accept=0.5, cut="never"), lambda: fast_dllm(4, threshold=0.6)),
    pair("any of one is that one", stops, AnyOf((AtEos(),)), AtEos()),
    pair("any of one, with a state", stops_whole, AnyOf((AtEos(fill=True, skip_first=True),)), AtEos(fill=True, skip_first=True)),
    pair("any of a rule and never is the rule", stops, AnyOf((WhenFull(), AtEos())), AtEos()),
    pair("any of a rule and itself is the rule", stops_whole, AnyOf((AtEos(fill=True), AtEos(fill=True))), AtEos(fill=True)),
    pair("any of in any of", stops_whole, AnyOf((AnyOf((WhenFull(),)), AnyOf((AtEos(), WhenFull())))), AtEos()),
    pair("without end-of-text nothing is cut", endless, CutAtEos(), WhenFull()),
    pair("without end-of-text nothing is predicted", endless, CutAtEos(predicted=True), WhenFull()),
)

# Here one decoder reads the whole answer and the other does not.
READING = (
    Pair("E23 Prophet without bound is LLaDA", lambda: prophet(None, None, inf, inf, inf), vanilla),
    Pair("E23 in blocks", lambda: prophet(6, 4, inf, inf, inf), lambda: vanilla(6, 4)),
    Pair("E23 stopping at end-of-text", lambda: prophet(None, 4, inf, inf, inf, stop_at_eos=True), lambda: semi_ar(4)),
    Pair("E23 for SchED", lambda: sched(None, None, inf, inf), vanilla),
    Pair("E23 for SchED, in blocks", lambda: sched(6, 4, inf, inf, stop_at_eos=True), lambda: semi_ar(4, 6)),
    pair("a limit that is never reached", stops, AnyOf((AtEos(), StepLimit(99))), AtEos()),
    pair("E23 in a pipeline", stops_pipelines, AnyOf((AtEos(), PhasedMargin(inf, inf, inf))), AtEos()),
)

# Both read it.
MARGINS = (
    pair(
        "a flat bound has no phases and no shape",
        stops_whole,
        PhasedMargin(3.0, 3.0, 3.0, region="answer"),
        ScheduledMargin(3.0, 3.0, "exponential"),
    ),
    pair("without pinned tokens the region is the answer", stops, PhasedMargin(3.0, 2.0, 1.0), PhasedMargin(3.0, 2.0, 1.0, "answer")),
    pair("more last positions than there are: the answer", stops, PhasedMargin(3, 2, 1, "last", 99), PhasedMargin(3, 2, 1, "answer")),
    pair("an exponential that falls at once is its end", stops, ScheduledMargin(9.0, 2.0, "exponential", 1e6), ScheduledMargin(2.0, 2.0)),
)


def tried(one: Callable[[], Decoder], *, but: tuple[type[Cache], ...] = ()) -> list[tuple[contract.Toy, Cache]]:
    found = []
    for toy in contract.toys():
        for cache in contract.few_caches():
            # Where a position is read from is no business of a stop rule: a shifted model is met once.
            if isinstance(cache, but) or contract.fits(one(), cache, toy) is not None:
                continue
            if toy.model.spec.shift == 0 or isinstance(cache, NoCache):
                found.append((toy, cache))
    assert found
    return found


@pytest.mark.parametrize("pair", [*PAIRS, *MARGINS], ids=lambda pair: pair.name)
def test_pair(pair: Pair) -> None:
    for toy, cache in tried(pair.one, but=(DelayedCache,)):  # a filter looks back, and what is read is computed
        mine, theirs = (record(toy.model, make(), cache, unequal()) for make in (pair.one, pair.other))
        assert difference_where_both_read(mine, theirs) is None, (toy.name, cache)
        assert torch.equal(mine.last.result, theirs.last.result)


@pytest.mark.parametrize("pair", READING, ids=lambda pair: pair.name)
@pytest.mark.parametrize("batch", [unequal(), infill()], ids=["unequal", "infill"])
def test_pair_of_which_one_reads_more(pair: Pair, batch: Batch) -> None:
    for toy, cache in tried(pair.one, but=(DualCache, DelayedCache)):
        mine, theirs = (record(toy.model, make(), cache, batch) for make in (pair.one, pair.other))
        assert difference_where_both_read(mine, theirs) is None, (toy.name, cache)


@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(), BlockCausalCache()], ids=lambda cache: type(cache).__name__)
@pytest.mark.parametrize("block_length", [None, 4])
def test_an_early_commit_takes_no_more_forwards_and_says_the_same_before(cache: Cache, block_length: int | None) -> None:
    """E23 in between: up to the step of the early commit a row is decoded as without; NFE never grows; such commits are not forced."""
    early = 0
    for seed in range(3):
        for kind in ("full", "block_causal"):
            model = tiny_transformer(2, kind, 0, seed)
            decoder = prophet(None, block_length, 3.0, 2.5, 2.0)
            if contract.fits(decoder, cache, contract.Toy(kind, model, model)) is not None:
                continue
            fast, slow = record(model, decoder, cache, unequal()), record(model, vanilla(None, block_length), cache, unequal())
            state, plain = fast.last, slow.last
            assert bool((state.step <= plain.step).all()) and state.forced.tolist() == [0] * 4
            exits = state.result == Result.EARLY_COMMIT
            early += int(exits.sum())
            last = (state.step - 1).unsqueeze(1)
            assert torch.equal(state.born < last, plain.born < last)
            kept = (plain.born >= 0) & (plain.born < last)
            assert torch.equal(state.tokens[kept], plain.tokens[kept])
            # The budget stays whole: everything that was masked was committed, in the last step.
            assert torch.equal(state.end, plain.end) and not bool(state.masked.any() | state.filled.any())
            assert bool((state.born.amax(1) == state.step - 1).all())
    assert early, "no toy committed early: the test shows nothing"


def test_with_a_bound_that_everything_passes_one_forward_decides_all() -> None:
    """Every token is the argmax of the first forward; with blocks too, because the rule reads the whole answer."""
    for block_length in (None, 4):
        recording = record(contract.toys()[0].model, prophet(None, block_length, -inf, -inf, -inf), DualCache(), unequal())
        state = recording.last
        assert len(recording.asks) == 1 and (state.step == 1).all()
        # A row of one token is full after its commit: there is no rest.
        assert state.result.tolist() == [Result.EARLY_COMMIT, Result.EARLY_COMMIT, Result.FULL, Result.EARLY_COMMIT]
        logits = recording.asks[0].logits.clone()
        logits[..., state.spec.mask_id] = -inf
        text = state.inside & ~state.fixed
        assert torch.equal(state.tokens[text], logits.argmax(-1)[text])


def test_a_block_causal_model_commits_the_rest_only_where_it_sees_it() -> None:
    """Later blocks are not visible, so they have no proposal: nothing is committed, and nothing cut, before the last block is open."""
    model, batch = contract.toys()[1].model, unequal()
    recording = record(model, prophet(None, 4, -inf, -inf, -inf), BlockCausalCache(), batch)
    state = recording.last
    assert torch.equal(state.end - state.begin, torch.tensor([len(one) for one in batch.templates]))
    before_last = torch.tensor([4, 4, 0, 8])  # tokens in blocks before the last one
    assert state.step.tolist() == [int(count) + 1 for count in before_last]


def test_waiting_for_the_block_changes_no_text() -> None:
    """7.1: block by block, the text is the same whether the rest of the last block is decoded or not; it only costs steps."""
    more = 0
    for seed in range(6):
        model = tiny_transformer(2, "full", 0, seed)
        soon, later = (record(model, replace(semi_ar(4), stop=AtEos(wait_for=how)), NoCache(), unequal()) for how in ("prefix", "block"))
        for row in range(4):
            assert soon.text(row) == later.text(row)
        assert bool((soon.last.step <= later.last.step).all())
        assert torch.equal(soon.last.result, later.last.result)
        more += int((soon.last.step < later.last.step).sum())
    assert more, "no row had a mask behind its end-of-text in the block"


def ending_models() -> list[object]:
    """Toys that say end-of-text more often than usual."""
    made = []
    for seed in range(8):
        model = tiny_transformer(2, "full", 0, seed)
        for token in model.spec.eos_ids:
            model.lm_head.weight[token] *= 1.5
        made.append(model)
    return made


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("block_length", [None, 4])
def test_a_cut_moves_the_end_to_the_left_and_drops_nothing_that_was_said(predicted: bool, alone: bool, block_length: int | None) -> None:
    """Length never grows; no committed token but end-of-text, and no pinned one, is ever behind the end of a row that goes on."""
    cuts = guarded = 0
    rule = CutAtEos(predicted) if alone else AnyOf((AtEos(), CutAtEos(predicted)))
    decoder = BlockDecoder(SemiAutoregressive(block_length), Quota(7), stop=rule)
    for model in ending_models():
        for batch in (unequal(), infill()):
            for cache in (NoCache(), DualCache()):
                for moment in record(model, decoder, cache, batch).moments:
                    before, after = moment.before, moment.after
                    assert bool((after.end <= before.end).all())
                    on = ~after.done.unsqueeze(1)
                    dropped = on & before.inside & ~after.inside
                    cuts += int(dropped.any(1).sum())
                    said = (before.inside & ~before.masked & ~before.is_eos()) | (before.inside & before.fixed)
                    assert not bool((dropped & said).any()), "a decided token was cut away"
                    assert bool((after.tokens == after.spec.eos_ids[0])[dropped].all()) and bool((after.born[dropped] == -1).all())
                    # Behind the end nothing is masked, seen or asked again.
                    behind = (after.positions >= after.end.unsqueeze(1)) & on
                    assert not bool((after.masked & behind).any())
                    for ask in moment.asks:
                        assert not bool((ask.computed & (ask.state.positions >= ask.state.end.unsqueeze(1))).any())
                    first = torch.where(after.is_eos() & after.inside, after.positions, 99).amin(1)
                    guarded += int(((first + 1 < after.end) & ~after.done).sum())
    assert cuts
    if block_length is None:
        assert guarded, "no token stood behind a committed end-of-text: the guard was not needed"


def test_cutting_changes_no_text_where_the_future_is_not_seen() -> None:
    """Under block-causal attention in whole blocks the cut canvas looks the same to what is left of it."""
    model = contract.toys()[1].model
    for seed in range(3):
        cut, plain = (
            record(model, BlockDecoder(SemiAutoregressive(4), Gate(0.6), stop=stop), BlockCausalCache(), unequal(seed))
            for stop in (AnyOf((AtEos(wait_for="block"), CutAtEos())), AtEos())
        )
        for row in range(4):
            assert cut.text(row) == plain.text(row)


def test_cutting_saves_lanes() -> None:
    """The reason for End-of-Text Prediction: a shorter canvas costs less, at no more steps."""
    spent: dict[bool, int] = {}
    for cutting in (False, True):
        stop = AnyOf((AtEos(), CutAtEos())) if cutting else AtEos()
        decoder = BlockDecoder(SemiAutoregressive(None), Quota(), stop=stop)
        spent[cutting] = sum(sum(record(model, decoder, NoCache(), unequal()).fingerprint()[4]) for model in ending_models())
    assert spent[True] < spent[False]


def test_the_step_promise_of_every_block() -> None:
    """7.4: a monotone decoder takes at most one step a token in every block, also with these rules."""
    for decoder in (prophet(None, 4, 4.0, 3.0, 2.0), sched(None, 4), learn2pd(toy_filter()), learn2pd(toy_filter(), cut="predicted")):
        for model in ending_models()[:3]:
            recording = record(model, decoder, NoCache(), unequal())
            for row in range(4):
                spent: dict[int, int] = {}
                for ask in recording.asks_of(row):
                    block = int(ask.region.epoch[row])
                    spent[block] = spent.get(block, 0) + 1
                assert max(spent.values()) <= 4
