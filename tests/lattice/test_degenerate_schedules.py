"""Methods that differ in where they decode, at the limits of their parameters, and what their schedules promise on the way.

E and other letters with numbers are the names of the invariants in the list of the spec. Equal means equal tokens, birth steps, steps,
forwards and lanes, and equal logits in every forward, for four unequal rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.delayed import DelayedBlocksCache
from dllm_toolkit.cache.nested import NestedCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decoders.ada_block import Delimited, ada_block
from dllm_toolkit.decoders.base import Commit, Decoder, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.block_diffusion import ThresholdOrQuota, block_diffusion
from dllm_toolkit.decoders.d3llm import d3llm
from dllm_toolkit.decoders.dparallel import dparallel
from dllm_toolkit.decoders.explore_then_exploit import CrossBlock, Explore, explore_then_exploit
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.fast_dllm_v2 import Nested, fast_dllm_v2
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.decoders.scheduler import NoiseSchedule, scheduler
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.slow_fast import Cycle, Cycles, slow_fast
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.models import Oracle, tiny_transformer
from dllm_toolkit.testing.record import Batch, Recording, difference, record, sharing, unequal

GATE = Gate(0.6)
EVERY = tuple(range(0, 29, 3))
CACHES = (NoCache(), PrefixCache(), DualCache(), BlockCausalCache())


def schedules(rule: Schedule) -> Decoder:
    return BlockDecoder(rule, GATE)


def commits(rule: Commit) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), rule)


def across(rule: Commit) -> Decoder:
    return BlockDecoder(CrossBlock(4, 1), rule)


@dataclass(frozen=True)
class Pair:
    """Two decoders that must be one, wherever both are accepted, or on models with full attention only."""

    name: str
    one: Callable[[], Decoder]
    other: Callable[[], Decoder]
    full_only: bool = False


def pair(name: str, make: Callable[..., Decoder], one: object, other: object, full_only: bool = False) -> Pair:
    return Pair(name, partial(make, one), partial(make, other), full_only)


def sequential() -> BlockDecoder:
    """dParallel that fills what is behind an end-of-text, as d3LLM does."""
    return replace(dparallel(4, 1.0), stop=AtEos(fill=True))


PAIRS = (
    pair("E12 no delimiter is sure enough: fixed blocks", schedules, Delimited(EVERY, 4, 0.3, 1.1), SemiAutoregressive(4)),
    pair("E12 a window without a place: fixed blocks", schedules, Delimited(EVERY, 4, 0.01, 0.0), SemiAutoregressive(4)),
    Pair("E12 as presets", lambda: ada_block(EVERY, 4, 0.6, 1.1), lambda: fast_dllm(4, threshold=0.6)),
    Pair("E13 MB1 opened when full: dParallel in blocks", lambda: d3llm(4, 1.0, add_at=1.0), sequential),
    Pair("E13 MB1 to the end", lambda: d3llm(4, 1.0, add_at=1.0, stop_at_eos=False), lambda: dparallel(4, 1.0, stop_at_eos=False)),
    pair("the first unfinished block is the only one", schedules, Pipelined(4, 0.1, None, max_open=1), SemiAutoregressive(4)),
    Pair("E26 nothing ahead, nothing explored", lambda: explore_then_exploit(4, 0.6, 0, 0), lambda: fast_dllm(4, threshold=0.6)),
    pair("nothing explored is a threshold", across, Explore(0.6, 0, 0.3), GATE),
    pair("an empty band is a threshold", across, Explore(0.6, 1, 0.6), GATE),
    pair("always enough is a threshold", across, Explore(0.6, 1, 0.3, enough=0), GATE),
    pair("nothing ahead is one block", schedules, CrossBlock(4, 0), SemiAutoregressive(4)),
    pair("the whole answer has nothing ahead", schedules, CrossBlock(None, 3), SemiAutoregressive(None)),
    pair("one estimate is a cycle: its own first step", schedules, Cycles(1, 1, memory=1), SemiAutoregressive(1)),
    pair("a part as long as the block is the block", schedules, Nested(4, 4), SemiAutoregressive(4)),
    pair("parts that fit into no block", schedules, Nested(3, 9), SemiAutoregressive(3)),
    pair("parts are blocks where everybody sees everybody", schedules, Nested(8, 4), SemiAutoregressive(4), full_only=True),
    pair("a quota of 1 below a threshold is the threshold", commits, ThresholdOrQuota(0.6), GATE),
    pair("a threshold that nothing passes is the quota", commits, ThresholdOrQuota(1.1, 5), Quota(5)),
    pair("a threshold that everything passes is one step a block", commits, ThresholdOrQuota(0.0, 40), Gate(0.0)),
    Pair("static block diffusion", lambda: block_diffusion(4, 1.1, 6), lambda: semi_ar(4, 6)),
    pair("linear noise, one step a token", commits, NoiseSchedule(), Quota()),
    pair("linear noise, far more steps than tokens: as many as tokens", commits, NoiseSchedule(500), Quota()),
    pair("cosine noise, far more steps than tokens", commits, NoiseSchedule(3000, "cosine"), Quota()),
    pair("one step is one step a block", commits, NoiseSchedule(1, "cosine"), Quota(1)),
    pair("one drawn step is one step a block", commits, NoiseSchedule(1, draw=True), Quota(1)),
    Pair("the scheduler form, as presets", lambda: scheduler(stop_at_eos=False), vanilla),
    pair("stages of one length are blocks of it", schedules, SemiAutoregressive((4, 4, 4)), SemiAutoregressive(4)),
    pair("the last stage goes on", schedules, SemiAutoregressive((3, 2)), SemiAutoregressive((3, 2, 2, 2, 2))),
    pair("a stage of the whole answer", schedules, SemiAutoregressive((40, 1)), SemiAutoregressive(None)),
)


compared = sharing(pair.other() for pair in PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pair(pair: Pair) -> None:
    tried = 0
    for toy in contract.toys()[:3]:
        for cache in CACHES:
            if contract.fits(pair.one(), cache, toy) is not None or (pair.full_only and toy.model.spec.attention != "full"):
                continue
            mine, theirs = record(toy.model, pair.one(), cache, unequal()), compared(toy.model, pair.other(), cache, unequal())
            for row in range(4):
                assert difference(mine, row, theirs, row) is None, (toy.name, cache)
            assert mine.fingerprint() == theirs.fingerprint(), (toy.name, cache)
            tried += 1
    assert tried


GREEDY = (
    d3llm(4, 1.0, 0.25),
    d3llm(4, 1.0, 0.25, stop_at_eos=False),
    ada_block(EVERY, 4, 0.6, 0.2, 0.8),
    slow_fast(None, 0.6, 3, 0.5),
    explore_then_exploit(4, 0.7, 1, 1, 0.2),
    fast_dllm_v2(4, 2, 0.6),
    block_diffusion(4, 0.6, 6),
    scheduler(5, "cosine"),
)


@pytest.mark.parametrize("decoder", GREEDY, ids=lambda one: type(one.schedule).__name__)
def test_the_oracle_is_answered_whatever_the_schedule(decoder: Decoder) -> None:
    """A model that ignores its context is decoded to the same known answer by every greedy decoder."""
    oracle, batch = Oracle(), unequal()
    recording = record(oracle, decoder, NoCache(), batch)
    for row, prompt in enumerate(batch.prompts):
        text = recording.text(row)
        assert text == oracle.answer(len(prompt), len(text))


@pytest.mark.parametrize("decoder", GREEDY, ids=lambda one: type(one.schedule).__name__)
@pytest.mark.parametrize("cache", [NoCache(), DualCache(), DelayedBlocksCache(2, 3)], ids=lambda one: type(one).__name__)
def test_every_forward_commits(decoder: Decoder, cache: NoCache) -> None:
    """ET3, and the known slip of trailing forwards: no forward is spent on a block that the one before has filled."""
    for toy in contract.toys()[:2]:
        for moment in record(toy.model, decoder, cache, unequal()).moments:
            decided = (moment.before.masked & ~moment.after.masked).any(1)
            assert bool((decided | moment.before.done).all())


def spans(recording: Recording, row: int) -> list[tuple[int, int, int]]:
    """(first forward, first position, one past the last) of the runs that a row's schedule opens, as AdaBlock's state tells them."""
    found = []
    for number, moment in enumerate(recording.moments):
        before, after = moment.before.parts.schedule, moment.after.parts.schedule
        if not bool(moment.before.done[row]) and bool(before.opening[row]):
            found.append((number, int(before.start[row]), int(after.stop[row])))
    return found


def test_adaptive_blocks_tile_the_answer_and_end_at_delimiters() -> None:
    """AB1 and AB3: block lengths add up to the answer; what is no default block ends where the opening forward saw a delimiter."""
    batch = Batch(((3, 1), (9, 9, 9), (5,)), ((None,) * 23, (None,) * 16, (None,) * 30), (0, 1, 2))
    longer = shorter = 0
    for seed in range(3):
        model = tiny_transformer(2, "full", 0, seed)
        decoder = replace(ada_block(EVERY, 4, 0.6, 0.2, 0.5), stop=WhenFull())
        recording = record(model, decoder, DualCache(), batch)
        for row, template in enumerate(batch.templates):
            begin, runs = len(batch.prompts[row]), spans(recording, row)
            assert [start for _, start, _ in runs] == [begin, *(stop for _, _, stop in runs[:-1])]
            assert sum(stop - start for _, start, stop in runs) == len(template) and runs[-1][2] == begin + len(template)
            for number, start, stop in runs:
                (ask,) = recording.moments[number].asks
                assert bool(ask.region.read[row, start:stop].all())
                if stop - start != min(4, begin + len(template) - start):
                    shown = ask.logits[row, stop - 1].clone()
                    shown[model.spec.mask_id] = float("-inf")
                    assert int(shown.argmax()) in EVERY and float(shown.softmax(-1).amax()) >= 0.2
                    assert stop - start <= len(template) // 2
                    longer, shorter = longer + (stop - start > 4), shorter + (stop - start < 4)
    assert longer and shorter


def test_the_opening_forward_of_an_adaptive_block_is_its_first_step() -> None:
    recording = record(tiny_transformer(), ada_block(EVERY, 4, 0.0, 0.2, 0.8), NoCache(), unequal())
    for row in range(4):
        assert len(spans(recording, row)) == len(recording.asks_of(row))  # threshold 0: one forward a block


def test_cycles_move_on_and_explore_only_so_long() -> None:
    """SF1, SF2, SF3: ends of cycles rise, a cycle ends full, and its slow phase takes no more than its steps."""
    batch = Batch(((3, 1), (9, 9, 9)), ((None,) * 40, (None,) * 25), (0, 1))
    fast = 0
    for seed, block_length in ((0, None), (1, None), (2, 10)):
        decoder = replace(slow_fast(block_length, 0.8, 4, 0.7), stop=WhenFull())
        recording = record(tiny_transformer(2, "full", 0, seed), decoder, NoCache(), batch)
        for row in range(2):
            starts, slow = [], 0
            for moment in recording.moments:
                own: Cycle = moment.before.parts.schedule
                if bool(moment.before.done[row]):
                    break
                if not starts or int(own.start[row]) != starts[-1]:
                    starts.append(int(own.start[row]))
                    assert not bool(moment.before.masked[row, : starts[-1]].any())
                    slow = 0
                slow += int(own.slow[row])
                fast += int(~own.slow[row])
                assert slow <= 4
            assert starts == sorted(set(starts))
    assert fast


def test_a_converged_cycle_is_cut_at_its_end() -> None:
    """The fast phase reads the cycle and nothing behind it; a dual cache then computes that alone, after one full forward."""
    decoder = slow_fast(None, 0.95, 6, 0.9)
    batch = Batch(((3, 1),), ((None,) * 40,), (0,))
    recording = record(tiny_transformer(2, "full", 0, 3), replace(decoder, stop=WhenFull()), DualCache(), batch)
    narrow = 0
    for earlier, moment in zip(recording.moments, recording.moments[1:], strict=False):
        before: Cycle = earlier.before.parts.schedule
        own: Cycle = moment.before.parts.schedule
        (ask,) = moment.asks
        if not bool(own.slow[0]):
            assert int(torch.where(ask.region.read, ask.state.positions + 1, 0).max()) <= int(own.stop[0])
            if bool(before.slow[0]):
                assert torch.equal(ask.computed, ask.region.visible)
            else:
                where = ask.state.positions
                assert torch.equal(ask.computed, (where >= own.start.unsqueeze(1)) & (where < own.stop.unsqueeze(1)))
                narrow += 1
    assert narrow


def opened(recording: Recording, row: int) -> list[int]:
    return [int(moment.before.parts.schedule.opened[row]) for moment in recording.moments if not bool(moment.before.done[row])]


def test_blocks_open_one_at_a_time_and_stay_open() -> None:
    """MB2: what is opened never closes again before it is full, and a step opens at most one block."""
    several = 0
    for seed in range(3):
        recording = record(tiny_transformer(2, "full", 0, seed), d3llm(2, 0.8, 0.25, stop_at_eos=False), NoCache(), unequal())
        for row in range(4):
            counts = opened(recording, row)
            assert all(0 <= after - before <= 1 for before, after in zip(counts, counts[1:], strict=False))
        for moment in recording.moments:
            several += int(moment.asks[0].region.eligible.sum(1).max() > 2)
    assert several


def test_only_the_first_unfinished_block_is_obliged() -> None:
    for moment in record(tiny_transformer(), d3llm(2, 0.0, 0.0, stop_at_eos=False), NoCache(), unequal()).moments:
        decided = moment.before.masked & ~moment.after.masked
        alive = ~moment.before.done
        first = torch.where(moment.before.masked, moment.asks[0].region.block, 99).amin(1, keepdim=True)
        assert bool((decided.sum(1)[alive] == 1).all())  # no entropy is below 0 nats: only the promise of progress commits
        assert not bool((decided & (moment.asks[0].region.block != first)).any())


def test_masks_before_an_end_of_text_are_still_decoded() -> None:
    """Behind the first end-of-text everything is end-of-text at once, and what is masked before it keeps its forwards."""
    filled_early = 0
    batch = Batch(((3, 1), (9, 9, 9), (5,), (2, 6)), ((None,) * 20, (None,) * 25, (None,) * 16, (None,) * 24), (0, 1, 2, 3))
    for seed in range(3):
        recording = record(tiny_transformer(2, "full", 0, seed), d3llm(4, 0.4, 0.0), NoCache(), batch)
        for moment in recording.moments:
            state = moment.after
            first = torch.where(state.is_eos(), state.positions, 99).amin(1, keepdim=True)
            assert not bool((state.masked & (state.positions > first)).any())
            filled_early += int((state.masked.any(1) & (first.squeeze(1) < 99) & ~state.done).sum())
        for row in range(4):
            text = recording.text(row)
            assert 27 not in text[:-1] and 25 not in text[:-1]
    assert filled_early


@pytest.mark.parametrize("rule", [lambda value: Explore(value, 0, 0.0), Gate, lambda value: ThresholdOrQuota(value, 5)])
def test_thresholds_are_monotone_in_a_step(rule: Callable[[float], Commit]) -> None:
    """The same canvas: a lower threshold commits what a higher one does, and more. Nothing is claimed of whole decodes."""
    _nested([committed(BlockDecoder(CrossBlock(4, 1), rule(value))) for value in (0.9, 0.7, 0.5, 0.3)])


def test_looking_farther_ahead_is_monotone_in_a_step() -> None:
    _nested([committed(BlockDecoder(CrossBlock(2, ahead), Gate(0.4))) for ahead in (0, 1, 2, 5)])


def test_entropy_is_monotone_in_a_step() -> None:
    _nested([committed(d3llm(4, entropy, 0.0, minimum=1)) for entropy in (0.0, 0.5, 1.0, 2.0)])


def committed(decoder: Decoder) -> Tensor:
    moment = record(tiny_transformer(), decoder, NoCache(), unequal(), max_steps=1).moments[0]
    return moment.before.masked & ~moment.after.masked & (moment.after.born >= 0)


def _nested(sets: list[Tensor]) -> None:
    for smaller, larger in zip(sets, sets[1:], strict=False):
        assert not bool((smaller & ~larger).any())
    assert int(sets[0].sum()) < int(sets[-1].sum())


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "decoder", [fast_dllm_v2(4, 2, 0.6), d3llm(4, 1.0, 0.25), block_diffusion(4, 0.6)], ids=["parts", "pipeline", "blocks"]
)
@pytest.mark.parametrize("cache", [DelayedBlocksCache(1), DelayedBlocksCache(2), DelayedBlocksCache(3, 3)], ids=["1", "2", "3 refreshed"])
def test_delayed_blocks_are_exact_if_the_past_never_sees_the_future(shift: int, decoder: Decoder, cache: DelayedBlocksCache) -> None:
    """Two layers, block-causal. With shift 1 the first position of a block is read from the row of its left neighbour, which an earlier
    forward computed: not from its own row, as d3LLM's and other released code does."""
    model = tiny_transformer(2, "block_causal", shift, 3)  # type: ignore[arg-type]
    plain, cached = record(model, decoder, NoCache(), unequal()), record(model, decoder, cache, unequal())
    for row in range(4):
        assert difference(plain, row, cached, row) is None
    if cache.delay < 2:  # the answers of the batch are too short to wait longer
        assert sum(plain.fingerprint()[4]) > sum(cached.fingerprint()[4])


def test_delayed_for_ever_is_no_cache() -> None:
    """MB4, and C1: a delay longer than the decode, or a refresh in every forward, reuses nothing."""
    for cache in (DelayedBlocksCache(99), DelayedBlocksCache(9, 1)):
        plain = record(tiny_transformer(), d3llm(4, 1.0, 0.25), NoCache(), unequal())
        cached = record(tiny_transformer(), d3llm(4, 1.0, 0.25), cache, unequal())
        assert plain.fingerprint() == cached.fingerprint()


def test_blocks_settle_in_order() -> None:
    """MB3: what is stored is always a prefix of the canvas, and only closed blocks are."""
    model, decoder, cache = tiny_transformer(), d3llm(2, 1.0, 0.25, stop_at_eos=False), DelayedBlocksCache(2)
    reused = 0
    for ask in record(model, decoder, cache, unequal()).asks:
        kept = ask.region.visible & ~ask.plan.compute & ~ask.state.done.unsqueeze(1)
        assert not bool((kept & ~ask.region.closed).any())
        assert torch.equal(kept, kept.cummin(1).values)
        reused += int(kept.sum())
    assert reused


@pytest.mark.parametrize("seed", [3, 4])
def test_the_nested_cache_is_exact_for_whole_blocks(seed: int) -> None:
    model = tiny_transformer(2, "block_causal", 0, seed)
    for decoder in (semi_ar(4), fast_dllm(3, threshold=0.6)):
        plain, cached = record(model, decoder, BlockCausalCache(), unequal()), record(model, decoder, NestedCache(), unequal())
        for row in range(4):
            assert difference(plain, row, cached, row) is None
        assert plain.fingerprint() == cached.fingerprint()


def test_the_nested_cache_computes_the_open_part_alone() -> None:
    model = tiny_transformer(2, "block_causal", 0, 4)
    batch = Batch(((3, 1, 4),), ((None,) * 16,), (0,))
    asks = record(model, replace(fast_dllm_v2(8, 2, 0.95), stop=WhenFull()), NestedCache(), batch).asks
    wide = [ask for ask, before in zip(asks[1:], asks, strict=False) if not torch.equal(ask.region.epoch, before.region.epoch)]
    narrow = [ask for ask, before in zip(asks[1:], asks, strict=False) if torch.equal(ask.region.epoch, before.region.epoch)]
    assert wide and narrow
    assert all(int(ask.computed.sum()) >= 8 for ask in wide)
    for ask in narrow:
        own = ask.state.parts.schedule
        assert not bool((ask.computed & (own.part != own.open.unsqueeze(1))).any())
        assert not bool((ask.region.read & ~ask.computed).any())


@pytest.mark.parametrize("noise", ["linear", "cosine"])
def test_a_noise_schedule_decides_everything_in_as_many_steps_or_fewer(noise: str) -> None:
    lengths = (1, 2, 5, 16, 31, 45)
    batch = Batch(tuple((3, 1) for _ in lengths), tuple((None,) * length for length in lengths), tuple(range(len(lengths))))
    for steps in (3, 8, 40):
        for draw in (False, True):
            last = record(Oracle(), scheduler(steps, noise, draw, stop_at_eos=False), NoCache(), batch).last  # type: ignore[arg-type]
            for row, length in enumerate(lengths):
                counts = torch.bincount(last.born[row, 2 : 2 + length])
                assert int(counts.sum()) == length and int(counts.min()) > 0  # steps that decide nothing are left out
                assert len(counts) <= min(steps, length)


def test_even_noise_is_even_and_cosine_noise_starts_slowly() -> None:
    batch = Batch(((3, 1),), ((None,) * 40,), (0,))
    counts = {
        noise: torch.bincount(record(Oracle(), scheduler(8, noise, stop_at_eos=False), NoCache(), batch).last.born[0, 2:42]).tolist()
        for noise in ("linear", "cosine")
    }
    assert counts["linear"] == [5] * 8
    # 40 (1 - cos(pi/2 j/8)) tokens are decided after j steps.
    assert counts["cosine"] == [1, 2, 4, 5, 6, 7, 7, 8] and sum(counts["cosine"]) == 40


def test_drawn_counts_are_binomial() -> None:
    """Linear noise in 4 steps: every mask leaves in each of them with probability 1/4, so 12 masks give counts of mean 3, variance 9/4."""
    rows = 600
    batch = Batch(((3, 1),) * rows, ((None,) * 12,) * rows, tuple(range(rows)))
    decoder = BlockDecoder(SemiAutoregressive(None), NoiseSchedule(4, draw=True), stop=WhenFull())
    moment = record(Oracle(), decoder, NoCache(), batch, max_steps=1).moments[0]
    first = (moment.before.masked & ~moment.after.masked).sum(1).double()
    # The first step that has any: P(none) = 0.75^12, 3 %, moves to the next one.
    assert abs(float(first.mean()) - 3.0) < 0.25 and abs(float(first.var()) - 2.25) < 0.5
    assert len(first.unique()) > 5


def test_stages_are_read_from_the_left() -> None:
    """A row's blocks have the given lengths; the last one repeats."""
    batch = Batch(((3, 1), (9,)), ((None,) * 11, (None,) * 4), (0, 1))
    state = record(Oracle(), BlockDecoder(SemiAutoregressive((2, 3, 4)), Gate(0.0), stop=WhenFull()), NoCache(), batch).last
    assert state.born[0, 2:13].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert state.born[1, 1:5].tolist() == [0, 0, 1, 1]


def test_stages_count_from_position_0_where_the_model_does() -> None:
    model = tiny_transformer(2, "block_causal", 0, 4)
    model.config = replace(model.config, block_anchor="absolute")
    batch = Batch(((3, 1, 4),), ((None,) * 6,), (0,))
    state = record(model, BlockDecoder(SemiAutoregressive((2, 4)), Gate(0.0), stop=WhenFull()), NoCache(), batch).last
    assert state.born[0, 3:9].tolist() == [0, 0, 0, 1, 1, 1]


def test_the_explored_position_is_the_leftmost_or_the_most_uncertain_of_the_band() -> None:
    for order in ("leftmost", "uncertain"):
        decoder = BlockDecoder(CrossBlock(6, 1), Explore(0.99, 1, 0.3, enough=99, order=order), stop=WhenFull())  # type: ignore[arg-type]
        checked = 0
        for moment in record(tiny_transformer(), decoder, NoCache(), unequal()).moments:
            (ask,) = moment.asks
            logits = ask.logits.clone()
            logits[..., 28] = float("-inf")
            sure = logits.softmax(-1).amax(-1)
            band = ask.region.eligible & ask.region.force & (sure >= 0.3) & (sure < 0.99)
            decided = moment.before.masked & ~moment.after.masked
            for row in range(4):
                if bool(band[row].any()) and not bool(moment.before.done[row]):
                    places = band[row].nonzero().flatten()
                    best = places[0] if order == "leftmost" else places[sure[row, places].argmin()]
                    assert (decided & band)[row].nonzero().flatten().tolist() == [int(best)]
                    checked += 1
        assert checked


