"""Caches and the windowed decoder at the limits of their parameters, and what each promises about a forward.

Equal means equal tokens, birth steps, forwards and lanes, and equal logits in every forward, for four unequal rows and an infill canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as remember

import pytest
import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.delayed import DelayedBlocksCache, DelayedCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.cache.refreshed import RefreshedCache
from dllm_toolkit.cache.window import VicinityCache, WindowCache
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.drawn_order import drawn_order, masks_near
from dllm_toolkit.decoders.dream import dream
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.decoders.window_diffusion import window_diffusion
from dllm_toolkit.engine import Engine
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.contract_cache import fresh_logits
from dllm_toolkit.testing.models import Oracle
from dllm_toolkit.testing.record import Recording, difference, gaps, infill, record, unequal
from dllm_toolkit.testing.rules import Rewrite

FAR = 10_000
TOYS = {toy.name: toy.model for toy in contract.toys()}
DECODERS: dict[str, Callable[[], Decoder]] = {
    "whole": lambda: vanilla(6),
    "blocks": lambda: fast_dllm(4, threshold=0.6),
    "pipeline": lambda: d2f(**cases.D2F),
    "window": lambda: window_diffusion(5, 3, 4),
    "rewriting": lambda: BlockDecoder(SemiAutoregressive(4), Gate(0.4), revise=Rewrite()),
}
EVERY = (PrefixCache(), DualCache(), DelayedCache(), DelayedBlocksCache(), VicinityCache(1, 2, 0), WindowCache())


@remember
def recorded(toy: str, decoder: str, cache: Cache, batch: str) -> Recording:
    """Recordings are shared: most of them stand on one side of several pairs."""
    return record(TOYS[toy], DECODERS[decoder](), cache, infill() if batch == "infill" else unequal())


def same(one: Recording, other: Recording, lanes: bool = True) -> None:
    for row in range(4):
        assert difference(one, row, other, row) is None
    assert torch.equal(one.last.tokens, other.last.tokens) and torch.equal(one.last.born, other.last.born)
    assert not lanes or one.fingerprint() == other.fingerprint()


@dataclass(frozen=True)
class Pair:
    """Two caches that must be one: under these decoders, on these toys, for these batches."""

    name: str
    one: Cache
    other: Cache
    decoders: tuple[str, ...] = tuple(DECODERS)
    toys: tuple[str, ...] = ("full", "full_shifted")
    batches: tuple[str, ...] = ("unequal", "infill")


PAIRS = (
    *(Pair(f"CA1 a refresh in every forward is no cache: {type(one).__name__}", RefreshedCache(one, 1), NoCache()) for one in EVERY),
    *(Pair(f"no refresh is the cache inside: {type(one).__name__}", RefreshedCache(one, None), one) for one in EVERY),
    Pair("a warm-up without end is no cache", RefreshedCache(DualCache(), None, FAR), NoCache()),
    Pair("a warm-up of the first forward is no warm-up", RefreshedCache(DualCache(), None, 1), DualCache()),
    Pair("DK1 delayed, a refresh in every forward", DelayedCache(refresh_every=1), NoCache()),
    Pair(
        "refreshes around it or inside are the same",
        RefreshedCache(DelayedCache(refresh_every=None), 3),
        DelayedCache(refresh_every=3),
        toys=("full",),
    ),
    Pair(
        "a delay without end keeps the prompt",
        DelayedCache(FAR, None),
        DelayedCache(keep="prompt"),
        ("whole",),
        ("full",),
        ("unequal",),
    ),
    Pair("the prompt alone: both, refreshed in every forward", DelayedCache(keep="prompt"), DelayedCache(refresh_every=1, keep="both")),
    Pair("MB4 a block waits without end: no cache", DelayedBlocksCache(FAR), NoCache()),
    Pair(
        "closed blocks at once: the block-causal cache",
        DelayedBlocksCache(1),
        BlockCausalCache(),
        ("blocks", "pipeline", "rewriting"),
        ("block_causal", "block_causal_shifted"),
    ),
    Pair("vicinity of nothing is the dual cache", VicinityCache(0, 0, 0), DualCache()),
    Pair("vicinity of all is no cache", VicinityCache(FAR, FAR, 0), NoCache()),
    Pair("vicinity of all behind is the prefix cache", VicinityCache(0, FAR, 0), PrefixCache()),
    Pair("vicinity that warms up without end is no cache", VicinityCache(0, 0, FAR), NoCache()),
    Pair("vicinity, a refresh in every forward", VicinityCache(0, 0, 0, 1), NoCache()),
    Pair("vicinity's refreshes are those around a dual cache", VicinityCache(0, 0, 2, 3), RefreshedCache(DualCache(), 3, 2)),
    Pair("window, a refresh in every forward", WindowCache(1), NoCache()),
    Pair("the windowed schedule opens what the window cache remembers", WindowCache(), DualCache(), ("window",), ("full",)),
)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pair(pair: Pair) -> None:
    for toy in pair.toys:
        for name in pair.decoders:
            for batch in pair.batches:
                same(recorded(toy, name, pair.one, batch), recorded(toy, name, pair.other, batch))


@pytest.mark.parametrize("cache", [VicinityCache(1, 1, 0), DelayedBlocksCache(1), DelayedBlocksCache(3), RefreshedCache(PrefixCache(), 3)])
@pytest.mark.parametrize("decoder", ["whole", "blocks", "pipeline"])
def test_caches_that_compute_the_open_span_are_exact_if_the_past_never_sees_the_future(cache: Cache, decoder: str) -> None:
    """CA2. A delayed or window cache reuses keys inside the open span, so it is not."""
    for seed in (1, 3):
        model = contract.tiny_transformer(2, "block_causal", 0, seed)
        same(record(model, DECODERS[decoder](), cache, unequal()), record(model, DECODERS[decoder](), NoCache(), unequal()), lanes=False)


@pytest.mark.parametrize("cache", [DelayedCache(refresh_every=None), WindowCache(3)])
def test_and_these_are_not(cache: Cache) -> None:
    apart = 0.0
    for seed in (1, 3):
        model = contract.tiny_transformer(2, "block_causal", 0, seed)
        for ask in record(model, vanilla(), cache, unequal()).asks:
            if bool(ask.read.any()):
                apart = max(apart, float(gaps(ask.logits, fresh_logits(model, ask))[ask.read].max()))
    assert apart > 1e-2


@pytest.mark.parametrize("cache", EVERY, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("decoder", ["whole", "blocks"])
def test_a_cache_costs_no_forwards(cache: Cache, decoder: str) -> None:
    """CA5: as many forwards as steps. CA3 and CA4 are C3 and C5 of the contract."""
    recording = record(TOYS["full"], DECODERS[decoder](), cache, unequal())
    for row in range(4):
        assert len(recording.asks_of(row)) == int(recording.last.step[row])


def test_the_block_caches_refresh_once_a_block() -> None:
    for cache in (PrefixCache(), DualCache()):
        recording = record(TOYS["full"], fast_dllm(4, threshold=0.9, stop_at_eos=False), cache, unequal())
        for row, template in enumerate(unequal().templates):
            whole = [not bool((ask.region.visible[row] & ~ask.computed[row]).any()) for ask in recording.asks_of(row)]
            blocks = -(-len(template) // 4)
            assert sum(whole) >= blocks and (row or sum(whole) == blocks)


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize("toy", ["full", "full_shifted"])
def test_no_token_is_reused_before_it_has_waited(delay: int, toy: str) -> None:
    """DK2, and the other direction: once a token has waited, it is left alone until the next refresh."""
    reused = 0
    for ask in record(TOYS[toy], vanilla(), DelayedCache(delay, None), unequal()).asks:
        state, alive = ask.state, ~ask.state.done.unsqueeze(1)
        decided = state.inside & ~state.masked & alive
        young = decided & (state.step.unsqueeze(1) - state.born <= delay)
        ahead = torch.cat((state.masked[:, 1:], torch.zeros_like(state.masked[:, :1])), dim=1) & (TOYS[toy].spec.shift == 1)
        assert not bool((young & ~ask.computed).any())
        assert torch.equal(decided & ~ask.computed, decided & ~young & ~ahead)
        assert not bool((state.masked & alive & ~ask.computed).any())
        reused += int((decided & ~ask.computed).sum())
    assert reused


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("make", [RefreshedCache, lambda inner, every: DelayedCache(1, every), lambda inner, every: WindowCache(every)])
def test_no_key_is_older_than_the_interval(every: int, make: Callable[..., Cache]) -> None:
    recording = record(TOYS["full"], vanilla(), make(DualCache(), every), unequal())
    for row in range(4):
        whole = [not bool((ask.region.visible[row] & ~ask.computed[row]).any()) for ask in recording.asks_of(row)]
        assert all(whole[::every])
        assert every == 1 or not all(whole) or len(whole) < 3


def test_the_prompt_is_computed_once() -> None:
    """Prefill and PD: whatever is refreshed, the prompt is not. With a shift its last row is: the first answer token is read from it."""
    for toy in ("full", "full_shifted"):
        shift = TOYS[toy].spec.shift
        for cache in (DelayedCache(keep="prompt"), DelayedCache(refresh_every=2, keep="both")):
            recording = record(TOYS[toy], fast_dllm(4, threshold=0.6), cache, unequal())
            prompt = recording.first.positions < (recording.first.begin - shift).unsqueeze(1)
            assert bool((recording.asks[0].computed | ~prompt).all())
            assert not any(bool((ask.computed & prompt).any()) for ask in recording.asks[1:])


# The windowed decoder.


def everything_at_a_refresh() -> Decoder:
    return window_diffusion(3, 2, 1, 5, score="probability", stop_at_eos=False, whole_refresh=True)


BASES: tuple[tuple[str, Callable[[], Decoder], Callable[[], Decoder]], ...] = (
    ("one a step", lambda: window_diffusion(None, FAR, 1, score="probability", stop_at_eos=False), vanilla),
    ("in 5 steps", lambda: window_diffusion(FAR, FAR, 1, 5, score="probability", stop_at_eos=False), lambda: vanilla(5)),
    ("whatever the phases", lambda: window_diffusion(FAR, FAR, 3, 5, score="probability", stop_at_eos=False), lambda: vanilla(5)),
    ("all of it at a refresh", everything_at_a_refresh, lambda: vanilla(5)),
    ("by Dream's times", lambda: window_diffusion(None, FAR, 1, 6, 1e-3, stop_at_eos=False), lambda: dream(6)),
    ("one active mask, sliding or not", lambda: window_diffusion(None, 1, 3), lambda: window_diffusion(None, 1, slide=False)),
)


@pytest.mark.parametrize(("name", "one", "other"), BASES, ids=[name for name, _, _ in BASES])
def test_a_window_of_everything_is_the_base_sampler(name: str, one: Callable[[], Decoder], other: Callable[[], Decoder]) -> None:
    """E24 and WD1."""
    for toy in ("full", "full_shifted", "block_causal"):
        for batch in (unequal(), infill()):
            same(record(TOYS[toy], one(), NoCache(), batch), record(TOYS[toy], other(), NoCache(), batch))


def test_one_active_mask_is_left_to_right() -> None:
    last = record(TOYS["full"], window_diffusion(4, 1, 3, stop_at_eos=False), DualCache(), unequal()).last
    for row in range(4):
        begin, end = int(last.begin[row]), int(last.end[row])
        assert last.born[row, begin:end].tolist() == list(range(end - begin))


@pytest.mark.parametrize("flags", [{}, {"slide": False}, {"contiguous": True}, {"first_at_refresh": True}])
@pytest.mark.parametrize("cache", [NoCache(), DualCache(), WindowCache(), DelayedCache()])
def test_commits_are_active_and_far_masks_are_pruned(flags: dict[str, bool], cache: Cache) -> None:
    """WD2, WD3: what is committed is among the first masks; a mask behind the window is not computed and does not matter."""
    decoder = window_diffusion(5, 3, 4, stop_at_eos=False, **flags)
    pruned = 0
    for moment in record(TOYS["full"], decoder, cache, unequal()).moments:
        before, after, ask = moment.before, moment.after, moment.asks[-1]
        place = before.masked.cumsum(1)
        landed = before.masked & ~after.masked
        assert not bool((landed & (place > 3)).any())
        far = before.masked & (place > 5)
        assert not bool((far & (ask.computed | ask.plan.visible)).any())
        pruned += int(far.sum())
        other = replace(ask, state=replace(before, tokens=torch.where(far, 7, before.tokens)))
        assert torch.equal(fresh_logits(TOYS["full"], ask), fresh_logits(TOYS["full"], other))
    assert pruned


def test_a_quota_beyond_the_active_masks_takes_them_all_and_nothing_else() -> None:
    """Known bug: released code then commits positions at -inf, which overwrites decided ones."""
    recording = record(TOYS["full"], window_diffusion(None, 3, 4, steps=1, stop_at_eos=False), DualCache(), unequal())
    for moment in recording.moments:
        landed = moment.before.masked & ~moment.after.masked
        assert torch.equal(landed.sum(1), moment.before.masked.sum(1).clamp(max=3) * ~moment.before.done)
        assert torch.equal(moment.after.tokens[~moment.before.masked], moment.before.tokens[~moment.before.masked])


@pytest.mark.parametrize("released", [False, True])
def test_an_end_of_text_cuts_the_canvas_and_begins_a_phase(released: bool) -> None:
    """Behind a committed end-of-text nothing is seen. The next forward is full and then a phase goes on; in released code all are full."""
    later = []
    for seed in range(12):
        model = contract.tiny_transformer(2, "full", 0, seed)
        decoder = window_diffusion(8, 6, FAR, refresh_at_end=released)
        recording = record(model, decoder, DualCache(), unequal())
        for row in range(4):
            since = 0
            for ask in recording.asks_of(row):
                ends = ask.state.is_eos()[row].nonzero().flatten().tolist()
                if not ends:
                    continue
                shown = ask.plan.visible[row].nonzero().flatten().tolist()
                assert max(shown) <= ends[0]
                whole = not bool((ask.region.visible[row] & ~ask.computed[row]).any())
                assert whole or (since and not released)
                later += [whole] if since else []
                since += 1
    assert later and (all(later) if released else not all(later))


def test_a_resumed_phase_has_its_window() -> None:
    """The schedule's state holds the phase: a new engine with a new cache shows the same canvas."""
    recording = record(TOYS["full"], window_diffusion(5, 3, 4), DualCache(), unequal())
    moment = recording.moments[2]
    engine = Engine(TOYS["full"], DualCache(), moment.before)
    with torch.inference_mode():
        window_diffusion(5, 3, 4).step(engine, moment.before)
    assert engine.last is not None
    assert torch.equal(engine.last.plan.visible, moment.asks[0].plan.visible)


# The order drawn beforehand (dKV-Cache-Greedy).


def test_a_drawn_order_keeps_to_its_order_and_computes_what_comes_next() -> None:
    """A step computes the next position, the masks around it and the last token; refreshes aside, and whatever the logits are."""
    first = record(TOYS["full"], drawn_order(None, window=2), NoCache(), unequal())
    other = record(Oracle(), drawn_order(None, window=2), NoCache(), unequal())
    for row in range(4):
        inside = slice(int(first.first.begin[row]), min(int(first.last.end[row]), int(other.last.end[row])))
        assert first.last.born[row, inside].tolist() == other.last.born[row, inside].tolist()
    cached = record(TOYS["full"], drawn_order(None, window=2), DualCache(), unequal())
    for row in range(4):
        lanes = [int(ask.computed[row].sum()) for ask in cached.asks_of(row)]
        assert all(count <= 4 for count in lanes[1:])


def test_a_drawn_order_of_whole_blocks_is_one_step_a_block() -> None:
    for toy in ("full", "full_shifted", "block_causal"):
        for batch in (unequal(), infill()):
            one = record(TOYS[toy], drawn_order(4, per_step=4), NoCache(), batch)
            same(one, record(TOYS[toy], fast_dllm(4, threshold=0.0), NoCache(), batch))


def test_masks_near() -> None:
    among = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    chosen = torch.zeros_like(among)
    chosen[0, 4] = True
    places = [masks_near(chosen, among, window)[0].nonzero().flatten().tolist() for window in (0, 1, 2, 3, 99)]
    assert places == [[4], [3, 4], [3, 4, 6], [1, 3, 4, 6], [0, 1, 3, 4, 6, 7, 8]]
