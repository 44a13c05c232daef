"""Methods at the limits of their parameters are other methods: each line of `PAIRS` is one such identity.

Equal means equal tokens, birth steps, steps, forwards and lanes, and equal logits in every forward, for four unequal rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dllm_toolkit.cache.delayed import DelayedCache
from dllm_toolkit.decoders.base import Commit, Decoder, Propose, Revise, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.confidence_adaptive import Adaptive, confidence_adaptive
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.dparallel import dparallel
from dllm_toolkit.decoders.dream import Timetable, dream
from dllm_toolkit.decoders.fast_dllm import Allowance, FirstOfBlock, fast_dllm
from dllm_toolkit.decoders.rules.commit import Factor, Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.contract import Toy
from dllm_toolkit.testing.pairs import Pair, pair
from dllm_toolkit.testing.record import difference, difference_where_both_read, record, sharing, unequal
from dllm_toolkit.testing.rules import Doubt, Rewrite

LONGEST = 11  # of the answers of `unequal()`
GATE = Gate(0.6)


def commits(rule: Commit) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), rule)


def schedules(rule: Schedule) -> Decoder:
    return BlockDecoder(rule, GATE)


def proposes(rule: Propose) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), GATE, propose=rule)


def revises(rule: Revise) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), GATE, revise=rule)


PAIRS = (
    pair("a gate that nothing passes is one token a step", commits, Gate(1.1), Quota()),
    pair("a factor of 0 is one token a step", commits, Factor(0.0), Quota()),
    pair("a quota of more steps than tokens is one token a step", commits, Quota(40), Quota()),
    pair("adaptive from 1 to 1 is one token a step", commits, Adaptive(0.5, 1, 1, 0.0, max_steps=1 << 30), Quota()),
    pair("at most one token above any gate is one token a step", commits, Gate(0.2, minimum=1, maximum=1), Quota()),
    pair("a gate that everything passes is one step a block", commits, Gate(0.0), Quota(1)),
    pair("a huge factor is a gate that everything passes", commits, Factor(1e9), Gate(0.0)),
    pair("a timetable of far more steps than tokens is one token a step", commits, Timetable(10_000), Quota()),
    pair("a timetable of one step is one step a block", commits, Timetable(1), Quota(1)),
    pair("an allowance that everything passes is a quota", commits, Allowance(0.0, 5), Quota(5)),
    pair("an allowance that nothing passes is one token a step", commits, Allowance(1.1, 5), Quota()),
    pair("an allowance of one step is a gate", commits, Allowance(0.6, 1), GATE),
    pair(
        "a pipeline that waits for full blocks is semi-autoregressive",
        schedules,
        Pipelined(4, add_at=1.0, activate_at=1.0),
        SemiAutoregressive(4),
    ),
    pair(
        "a pipeline of one open block waits for full blocks",
        schedules,
        Pipelined(4, add_at=0.1, activate_at=0.1, max_open=1),
        Pipelined(4, add_at=1.0, activate_at=1.0),
    ),
    pair("one block as long as the answer is the whole answer", schedules, SemiAutoregressive(LONGEST), SemiAutoregressive(None)),
    pair("holding for one step is not holding", schedules, SemiAutoregressive(4, hold=1), SemiAutoregressive(4)),
    pair("one step is the least a block can have", schedules, SemiAutoregressive(4, least_steps=1), SemiAutoregressive(4)),
    pair("a cold order is the plain order", proposes, Sample(order_temperature=1e-9), Sample()),
    pair("sampling from the best one is greedy", proposes, Sample(temperature=1.0, top_k=1), Sample()),
    pair("sampling from a tiny nucleus is greedy", proposes, Sample(temperature=1.0, top_p=1e-9), Sample()),
    pair("top_p = 1 and top_k = V are off", proposes, Sample(temperature=0.7, top_k=29), Sample(temperature=0.7)),
    pair("evidence is the same if nothing is filtered", proposes, Sample(temperature=1.0, evidence="filtered"), Sample(temperature=1.0)),
    pair("rewriting above certainty keeps", revises, Rewrite(1.1), Keep()),
    pair("rewriting never keeps", revises, Rewrite(0.1, limit=0), Keep()),
    pair("doubting above certainty keeps", revises, Doubt(1.1), Keep()),
    Pair("no threshold is passed: vanilla", lambda: fast_dllm(None, threshold=1.1, stop_at_eos=False), vanilla),
    Pair(
        "confidence-adaptive with one token a step: vanilla in blocks",
        lambda: confidence_adaptive(4, minimum=1, maximum=1, eos_share=0.0, stop_at_eos=False),
        lambda: vanilla(block_length=4),
    ),
    Pair(
        "the first of a block of one is the block",
        lambda: BlockDecoder(SemiAutoregressive(1), FirstOfBlock(GATE)),
        lambda: BlockDecoder(SemiAutoregressive(1), GATE),
    ),
    Pair("dream with far more steps than tokens: vanilla", lambda: dream(10_000, "maskgit_plus"), vanilla),
    Pair("dream in one step: vanilla in one step", lambda: dream(1, "topk_margin"), lambda: vanilla(1)),
    Pair(
        "dparallel without entropy: the surest one a step",
        lambda: dparallel(4, entropy=0.0),
        lambda: BlockDecoder(SemiAutoregressive(4), Quota(), propose=Sample(score="negative_entropy")),
    ),
    Pair("d2f that waits and commits one: semi_ar", lambda: d2f(4, 1.1, add_at=1.0, activate_at=1.0), lambda: semi_ar(4)),
)


def fitting(one: Decoder) -> list[tuple[cases.Case, Toy]]:
    """A shifted model differs in where a position is read from: two caches show that, one computes all and one a block."""
    few = [cache for cache in cases.CACHES if cache.name in contract.FEW]
    return [
        (cache, toy)
        for toy in contract.toys()
        for cache in few
        if contract.fits(one, cache.build(), toy) is None and (toy.model.spec.shift == 0 or cache.name in ("none", "dual"))
    ]


compared = sharing(pair.other() for pair in PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pair(pair: Pair) -> None:
    places = fitting(pair.one())
    assert places
    one, other = pair.one(), pair.other()
    # A rule that looks back reads decided positions too; a cache that computes what is read then computes more.
    more = getattr(one, "looks_back", False) and not getattr(other, "looks_back", False)
    for cache, toy in places:
        if more and isinstance(cache.build(), DelayedCache):
            continue
        mine = record(toy.model, one, cache.build(), unequal())
        theirs = compared(toy.model, other, cache.build(), unequal())
        if more:
            assert difference_where_both_read(mine, theirs) is None, (toy.name, cache.name)
            continue
        for row in range(4):
            assert difference(mine, row, theirs, row) is None, (toy.name, cache.name)
        assert mine.fingerprint() == theirs.fingerprint(), (toy.name, cache.name)


def test_stopping_at_the_end_is_all_that_semi_ar_adds() -> None:
    """Where no end-of-text is committed, semi_ar and vanilla in blocks are one decoder; elsewhere the text agrees up to it."""
    free = ended = 0
    for toy in contract.toys()[:4]:
        mine = record(toy.model, semi_ar(4), cases.CACHES[0].build(), unequal())
        theirs = record(toy.model, vanilla(block_length=4), cases.CACHES[0].build(), unequal())
        for row in range(4):
            text = mine.text(row)
            assert theirs.text(row)[: len(text)] == text
            if int(mine.last.result[row]) == 1:
                assert difference(mine, row, theirs, row) is None
                free += 1
            else:
                ended += 1
    assert free and ended


def test_one_position_a_block_is_left_to_right() -> None:
    for toy in contract.toys()[:4]:
        state = record(toy.model, semi_ar(1), cases.CACHES[0].build(), unequal()).last
        for row in range(4):
            begin, end = int(state.begin[row]), int(state.end[row])
            assert state.born[row, begin:end].tolist() == list(range(end - begin))


@pytest.mark.parametrize("decoder", [lambda: semi_ar(4), lambda: fast_dllm(3, threshold=0.6), lambda: d2f(**cases.D2F)])
@pytest.mark.parametrize("cache", ["prefix", "dual", "block_causal"])
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_every_cache_is_exact_if_the_past_never_sees_the_future(decoder: Callable[[], Decoder], cache: str, seed: int) -> None:
    """Two layers, block-causal: prefix and dual caches reuse closed blocks only, so they give the logits of no cache."""
    model = contract.tiny_transformer(2, "block_causal", 0, seed)
    chosen = next(case for case in cases.CACHES if case.name == cache)
    plain = record(model, decoder(), cases.CACHES[0].build(), unequal())
    cached = record(model, decoder(), chosen.build(), unequal())
    for row in range(4):
        assert difference(plain, row, cached, row) is None
    assert torch.equal(plain.last.tokens, cached.last.tokens)


def test_the_oracle_is_answered_whatever_the_method() -> None:
    """A model that ignores its context is decoded to the same known answer by every greedy decoder."""
    from dllm_toolkit.testing.models import Oracle

    oracle = Oracle()
    batch = unequal()
    for decoder in (vanilla(), semi_ar(4), fast_dllm(4, threshold=0.5), d2f(**cases.D2F, official_loop=False), confidence_adaptive(4)):
        recording = record(oracle, decoder, cases.CACHES[0].build(), batch)
        for row, prompt in enumerate(batch.prompts):
            text = recording.text(row)
            assert text == oracle.answer(len(prompt), len(text))
