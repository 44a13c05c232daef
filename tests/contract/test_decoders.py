"""Every decoder of the catalogue keeps the contract under every cache that accepts it, on every kind of model."""

from __future__ import annotations

import pytest

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.contract import Toy
from dllm_toolkit.testing.contract_cache import CACHE_CHECKS
from dllm_toolkit.testing.contract_decoder import DECODER_CHECKS, check_same_text
from dllm_toolkit.testing.record import Batch, unequal
from dllm_toolkit.types import Need

CHECKS = (*DECODER_CHECKS, *CACHE_CHECKS)
# A shifted model differs in one thing, where a position is read from, so a few decoders cover it.
SHIFTED = {"vanilla in blocks", "fast_dllm", "fast_dllm first release", "dream", "d2f", "block rewriting"}
# Every method meets every cache where reuse is approximate (full attention; causal for the autoregressive one), and so do the rules that
# look back. Variants of a method meet the cache that saves most.
METHODS = {case.maker: case.name for case in reversed(cases.DECODERS)}
EVERYWHERE = {*METHODS.values(), "block rewriting", "block doubting", "pipeline rewriting"}
VARIANTS = {("dual", "full"), ("block_causal", "block_causal"), ("block_causal", "causal")}
# Where the past never sees the future, keys of closed blocks are right whatever the cache; what can go wrong is what is closed.
BLOCKWISE = {"none", "block_causal", "nested"}
# What needs a past that never sees its future.
UNSEEING = {case.name for case in cases.CACHES if Need.BLOCK_CAUSAL in case.build().needs}
# These meet every cache on every model that accepts it.
ALL_ROUND = {"fast_dllm", "d2f", "block rewriting"}


def meets(case: str, cache: str, toy: str) -> bool:
    """Is this combination run, if the needs allow it?"""
    if toy.endswith("shifted") and case not in SHIFTED:
        return False
    if case in ALL_ROUND:
        return True
    if case not in EVERYWHERE | SHIFTED:
        return (cache, toy) in VARIANTS
    return cache in (BLOCKWISE if toy.startswith("block_causal") else {one.name for one in cases.CACHES})


def fitting() -> list[tuple[cases.Case, cases.Case, Toy]]:
    """The combinations that are run: all that the needs allow, without those that say the same again."""
    return [
        (case, cache, toy)
        for toy in contract.toys()
        for case in cases.DECODERS
        for cache in cases.CACHES
        if meets(case.name, cache.name, toy.name) and contract.fits(case.build(), cache.build(), toy) is None
    ]


def alone(case: cases.Case, cache: cases.Case, toy: Toy) -> tuple[int, ...] | None:
    """Which rows are also decoded alone: all without a cache, for variants, for decoders that go all round and the causal one; else half.

    A decoder that lets rows see each other does so under any cache, a cache does so under any decoder, and neighbouring caches of the
    catalogue get different halves.
    """
    if cache.name == "none" or toy.name == "causal" or case.name in ALL_ROUND or case.name not in EVERYWHERE | SHIFTED:
        return None
    return ((0, 2), (1, 3))[cases.CACHES.index(cache) % 2]


@pytest.mark.parametrize(("case", "cache", "toy"), [pytest.param(*one, id=f"{one[0]}-{one[1]}-{one[2].name}") for one in fitting()])
def test_contract(case: cases.Case, cache: cases.Case, toy: Toy) -> None:
    place = contract.bench(case.build(), cache.build(), toy, idle=case.idle, alone=alone(case, cache, toy))
    failed = [str(result) for result in contract.run_checks(place, CHECKS) if not result.passed]
    assert not failed, "\n".join(failed)


def test_every_decoder_meets_every_cache_that_its_needs_allow() -> None:
    """No combination is lost by accident: each method with each cache on the kind of model where the cache is approximate."""
    pairs = {(case.name, cache.name, toy.name) for case, cache, toy in fitting()}
    names = {cache.name for cache in cases.CACHES}
    for case in (case for case in cases.DECODERS if case.name in EVERYWHERE):
        own = {(cache, toy) for name, cache, toy in pairs if name == case.name}
        if case.build().leaps:  # skips forwards, so it goes only with caches whose keys do not depend on them
            assert {cache for cache, _ in own} == {one.name for one in cases.CACHES if one.build().exact or one.build().path_free}
        elif case.name.startswith("autoregressive"):
            assert own == {(cache, "causal") for cache in names}
        else:
            assert {cache for cache, toy in own if toy == "full"} == names - UNSEEING
            assert {cache for cache, toy in own if toy == "block_causal"} >= BLOCKWISE
    for case in SHIFTED:
        assert {cache for name, cache, toy in pairs if name == case and toy == "full_shifted"} == names - UNSEEING
    for cache in names:
        assert {toy for name, other, toy in pairs if name in ALL_ROUND and other == cache} >= {"block_causal", "block_causal_shifted"}


def test_every_row_of_every_decoder_and_of_every_cache_is_decoded_alone() -> None:
    """On each kind of model that a decoder meets under several caches, and for each cache over its decoders."""
    rows: dict[tuple[str, str], set[int]] = {}
    for case, cache, toy in fitting():
        for key in (("decoder", f"{case} {toy.name}"), ("cache", f"{cache} {toy.name}")):
            rows.setdefault(key, set()).update(alone(case, cache, toy) or range(4))
    assert all(found == {0, 1, 2, 3} for found in rows.values())


def blocks(seed: int) -> Batch:
    """Answers that are multiples of four: where a loop that drops the last, shorter block still decodes everything."""
    batch = unequal(seed)
    lengths = (8, 4, 12, 16)
    return Batch(batch.prompts, tuple((None,) * length for length in lengths), batch.seeds)


def same_text(fast: Decoder, slow: Decoder, cache: Cache, toy: Toy) -> None:
    places = [contract.Bench(decoder, cache, toy.model, batch=blocks(0)) for decoder in (fast, slow)]
    check_same_text(*places)


@pytest.mark.parametrize("case", [case for case in cases.DECODERS if case.slow is not None], ids=str)
def test_stopping_early_changes_no_text(case: cases.Case) -> None:
    """D12 on both kinds of attention."""
    assert case.slow is not None
    for toy in contract.toys()[:2]:
        same_text(case.build(), case.slow(), cases.CACHES[0].build(), toy)


@pytest.mark.parametrize("cache", ["none", "block_causal"])
def test_d2f_drops_only_what_cannot_be_seen(cache: str) -> None:
    """D12 for D2F: without the released loop's forwards after an end-of-text, the text is the same (block-causal models only)."""
    chosen = next(case for case in cases.CACHES if case.name == cache)
    ended = 0
    for seed in range(4):
        model = contract.tiny_transformer(2, "block_causal", 0, seed)
        toy = Toy("block_causal", model, model)
        fast, slow = (cases.d2f(**{**cases.D2F, "official_loop": official}) for official in (False, True))
        same_text(fast, slow, chosen.build(), toy)
        ended += int((contract.Bench(fast, chosen.build(), model, batch=blocks(0)).recording.last.result == 2).sum())
    assert ended > 2, "no row ended early: the toys show nothing"
