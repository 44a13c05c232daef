"""The published commit rules at the limits of their parameters: each line of `PAIRS` is one identity, named after the list of the spec.

Equal means equal tokens, birth steps, steps, forwards and lanes, and equal logits in every forward, for four unequal rows, under every
cache and on every kind of toy model that a rule can tell apart.
"""

from __future__ import annotations

from math import inf

import pytest
import torch

from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.ascending_steps import Ascending, ascending_steps
from dllm_toolkit.decoders.bacd import BoundedAdaptive, bacd
from dllm_toolkit.decoders.base import Commit, Decoder, Propose
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.credit import Credit, credit
from dllm_toolkit.decoders.entropy_bounded import EntropyBudget, entropy_bounded
from dllm_toolkit.decoders.eoser import RejectEarly, eoser
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.hierarchy import Hierarchy, hierarchy
from dllm_toolkit.decoders.klass import Stable, klass
from dllm_toolkit.decoders.local_leap import LocalLeap, local_leap
from dllm_toolkit.decoders.pc_sampler import PositionAndCorpus, pc_sampler
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.models import Oracle
from dllm_toolkit.testing.pairs import Pair, pair
from dllm_toolkit.testing.record import Batch, difference, record, sharing, unequal


def commits(rule: Commit) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), rule)


def pipelines(rule: Commit) -> Decoder:
    return BlockDecoder(Pipelined(4, add_at=0.5, activate_at=0.75), rule)


def by_entropy(rule: Commit) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), rule, propose=Sample(score="negative_entropy"))


def short_blocks(rule: Commit) -> Decoder:
    return BlockDecoder(SemiAutoregressive(3), rule)


def proposes(rule: Propose) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), Gate(0.6), propose=rule)


def in_quotas(rule: Propose) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), Quota(5), propose=rule)


PAIRS = (
    pair("E4 no entropy to spend is one token a step", by_entropy, EntropyBudget(0.0), Quota()),
    pair("E4 no entropy to spend, by probability", commits, EntropyBudget(0.0), Quota()),
    pair("a boundless budget is one step a block", commits, EntropyBudget(inf), Gate(0.0)),
    Pair("E4 as presets", lambda: entropy_bounded(4, 0.0, "probability"), lambda: semi_ar(4)),
    pair("E6 a leap of no distance is a threshold", commits, LocalLeap(0.6, 0.3, 0), Gate(0.6)),
    pair("E6 a leap that relaxes nothing is a threshold", commits, LocalLeap(0.6, 0.6, 4), Gate(0.6)),
    pair("without an anchor a leap is one token a step", commits, LocalLeap(1.1, 0.0, 4), Quota()),
    pair("the same in a pipeline", pipelines, LocalLeap(0.6, 0.6, 4), Gate(0.6)),
    Pair("E6 as presets", lambda: local_leap(4, 0.6, 0.2, 0), lambda: fast_dllm(4, threshold=0.6)),
    pair("E7 stable for no step is a threshold", commits, Stable(0.6, inf, 0), Gate(0.6)),
    pair("E7 nothing sure enough is the fallback", commits, Stable(1.1, inf, 0, fallback=Quota(5)), Quota(5)),
    pair("E7 nothing ever stable is the fallback", commits, Stable(0.0, 0.0, 1, fallback=Quota(5)), Quota(5)),
    pair("remembering the block is remembering all", commits, Stable(0.5, 1.0, 1, memory=4), Stable(0.5, 1.0, 1)),
    pair("stable for more steps than there are is the fallback", commits, Stable(0.0, inf, 40), Quota()),
    Pair("E7 as presets", lambda: klass(4, 0.6, inf, 0), lambda: fast_dllm(4, threshold=0.6)),
    pair("E8 equal bounds are a threshold", commits, BoundedAdaptive(0.6, 0.6), Gate(0.6)),
    pair("E8 the same in a pipeline", pipelines, BoundedAdaptive(0.6, 0.6), Gate(0.6)),
    Pair("E8 as presets", lambda: bacd(4, 0.6, 0.6), lambda: fast_dllm(4, threshold=0.6)),
    pair("E9 rejecting nothing is the quota", commits, RejectEarly(Quota(5), 1.0, 1.0), Quota(5)),
    pair("E9 rejecting nothing is the threshold", commits, RejectEarly(Gate(0.6), 1.0, 1.0), Gate(0.6)),
    pair("E9 rejecting nothing is the ascent", commits, RejectEarly(Ascending(2), 1.0, 1.0, "doubling"), Ascending(2)),
    pair("E9 rejecting no token is the quota", commits, RejectEarly(Quota(5), 0.0, 0.0, late=()), Quota(5)),
    Pair("E9 as presets", lambda: eoser(4, low=1.0, stop_at_eos=False), lambda: vanilla(4)),
    Pair("E9 with ASS, as presets", lambda: eoser(low=1.0, ascending=True, stages=2), lambda: ascending_steps(stages=2)),
    pair("E10 credit of no weight is plain", proposes, Credit(weight=0.0), Sample()),
    pair("credit that is gone in a step needs one place", proposes, Credit(1.5, 0.0, 0.5, memory=1), Credit(1.5, 0.0, 0.5, memory=8)),
    Pair("E10 as presets", lambda: credit(4, 0.6, weight=0.0), lambda: fast_dllm(4, threshold=0.6)),
    pair("H2 equal bounds are a threshold", commits, Hierarchy(0.6, 0.6), Gate(0.6)),
    pair("H2 nothing passes: one token a step", commits, Hierarchy(1.1, 1.1), Quota()),
    pair("everything passes: one step a block", commits, Hierarchy(0.0, 0.0), Gate(0.0)),
    pair("the same in a pipeline", pipelines, Hierarchy(0.6, 0.6), Gate(0.6)),
    Pair("H2 as presets", lambda: hierarchy(4, 0.6, 0.6), lambda: fast_dllm(4, threshold=0.6)),
    pair("E20 no decay, no corpus: by probability", in_quotas, PositionAndCorpus(0.0, inf), Sample()),
    Pair("E20 as presets", lambda: pc_sampler(4, decay=0.0), lambda: semi_ar(4)),
    pair("E27 blocks of up to three masks take one step", short_blocks, Ascending(), Gate(0.0)),
    pair("as many stages as steps or more", commits, Ascending(2), Ascending(40)),
)


compared = sharing(pair.other() for pair in PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pair(pair: Pair) -> None:
    tried = 0
    for toy in contract.toys():
        for cache in contract.few_caches():
            # Where a position is read from is no business of a commit rule: a shifted model is met once.
            if contract.fits(pair.one(), cache, toy) is not None or (toy.model.spec.shift == 1 and not isinstance(cache, NoCache)):
                continue
            mine = record(toy.model, pair.one(), cache, unequal())
            theirs = compared(toy.model, pair.other(), cache, unequal())
            for row in range(4):
                assert difference(mine, row, theirs, row) is None, (toy.name, cache)
            assert mine.fingerprint() == theirs.fingerprint(), (toy.name, cache)
            tried += 1
    assert tried


@pytest.mark.parametrize("pair", [one for one in PAIRS if "preset" not in one.name], ids=lambda pair: pair.name)
def test_pair_with_end_of_text_inside(pair: Pair) -> None:
    """To the end of the budget, where end-of-text tokens stand among the others and nothing is cut short."""
    toy = contract.toys()[0]
    whole = [replaced(made()) for made in (pair.one, pair.other)]
    assert (
        record(toy.model, whole[0], NoCache(), unequal(5)).fingerprint() == record(toy.model, whole[1], NoCache(), unequal(5)).fingerprint()
    )


def replaced(decoder: Decoder) -> BlockDecoder:
    assert isinstance(decoder, BlockDecoder)
    return BlockDecoder(decoder.schedule, decoder.commit, decoder.propose, stop=WhenFull())


def test_a_strong_decay_is_left_to_right() -> None:
    """E20, the other end: with a large decay PC-sampler decodes from left to right."""
    for toy in contract.toys()[:4]:
        state = record(toy.model, pc_sampler(decay=100.0), NoCache(), unequal()).last
        for row in range(4):
            begin, end = int(state.begin[row]), int(state.end[row])
            assert state.born[row, begin:end].tolist() == list(range(end - begin))


@pytest.mark.parametrize("stages", [1, 2, 3, 9])
def test_steps_double(stages: int) -> None:
    """E27 and the quotas of ASS: floor(log2 n) steps of 1, 2, 4, ... and the rest, whatever the stages and the other rows."""
    lengths = (1, 2, 3, 4, 16, 31, 45)
    batch = Batch(tuple((3, 1) for _ in lengths), tuple((None,) * length for length in lengths), tuple(range(len(lengths))))
    last = record(contract.toys()[0].model, ascending_steps(stages=stages, stop_at_eos=False), NoCache(), batch).last
    for row, length in enumerate(lengths):
        born = last.born[row, 2 : 2 + length]
        steps = max(1, length.bit_length() - 1)
        expected = [1 << step for step in range(steps - 1)]
        expected.append(length - sum(expected))
        assert torch.bincount(born).tolist() == expected
        if stages > 1:  # the last stages - 1 steps fill a part each, from left to right
            shared = max(steps - stages + 1, 1)
            parts = born.clamp(min=shared - 1)
            assert torch.equal(parts, parts.sort().values)


def test_klass_of_a_model_that_does_not_change() -> None:
    """K2 and K3: nothing is ready before history + 1 looks; if logits do not depend on the canvas, everything sure is ready then."""
    oracle, batch = Oracle(), unequal()
    for history in (1, 2, 3):
        decoder = BlockDecoder(SemiAutoregressive(None), Stable(0.0, 1e-6, history), stop=WhenFull())
        last = record(oracle, decoder, NoCache(), batch).last
        for row, prompt in enumerate(batch.prompts):
            length = len(batch.templates[row])
            born = torch.bincount(last.born[row, len(prompt) : len(prompt) + length]).tolist()
            expected = [1] * min(history, length)
            assert born == expected + [length - len(expected)] * (length > len(expected))


@pytest.mark.parametrize(
    "decoder",
    [
        entropy_bounded(4, 0.5),
        local_leap(4, 0.6, 0.4, 2),
        klass(4, 0.5, 0.5, 1),
        pc_sampler(4),
        bacd(4),
        ascending_steps(),
        eoser(),
        eoser(ascending=True),
        hierarchy(4),
        credit(4),
    ],
)
def test_the_oracle_is_answered_whatever_the_rule(decoder: Decoder) -> None:
    """A model that ignores its context is decoded to the same known answer by every greedy decoder."""
    oracle, batch = Oracle(), unequal()
    recording = record(oracle, decoder, NoCache(), batch)
    for row, prompt in enumerate(batch.prompts):
        text = recording.text(row)
        assert text == oracle.answer(len(prompt), len(text))
