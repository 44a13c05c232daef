"""Single caches: wrong settings, the neighbourhood of a span, the released loop behind delayed blocks, reads of decided positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_toolkit.cache.base import CacheError
from dllm_toolkit.cache.delayed import DelayedBlocksCache, DelayedCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.cache.refreshed import RefreshedCache
from dllm_toolkit.cache.window import VicinityCache, WindowCache, near
from dllm_toolkit.decoders.base import DecodeError, check
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.drawn_order import DrawnOrder
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.decoders.window_diffusion import Paced, Window, window_diffusion
from dllm_toolkit.ops import masks
from dllm_toolkit.state import Region, begin_state
from dllm_toolkit.testing import golden
from dllm_toolkit.testing.golden_plan import Case, plan
from dllm_toolkit.testing.golden_replay import compare, replay
from dllm_toolkit.testing.models import WORDS, tiny_transformer, toy_spec
from dllm_toolkit.testing.record import record, unequal
from dllm_toolkit.testing.rules import Rewrite


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DelayedCache(0), CacheError, "delay must be 1 or more, got 0"),
        (lambda: DelayedCache(refresh_every=0), CacheError, "refresh_every must be 1 or more, got 0"),
        (lambda: DelayedCache(keep="answer"), CacheError, "keep must be"),  # type: ignore[arg-type]
        (lambda: DelayedBlocksCache(0), CacheError, "delay must be 1 or more, got 0"),
        (lambda: DelayedBlocksCache(1, 0), CacheError, "refresh_every must be 1 or more, got 0"),
        (lambda: RefreshedCache(DualCache(), 0), CacheError, "every must be 1 or more, got 0"),
        (lambda: RefreshedCache(DualCache(), 1, -1), CacheError, "warm_up must be 0 or more, got -1"),
        (lambda: VicinityCache(-1), CacheError, "before must be 0 or more, got -1"),
        (lambda: VicinityCache(1, -2), CacheError, "after must be 0 or more, got -2"),
        (lambda: VicinityCache(1, 1, -1), CacheError, "warm_up must be 0 or more, got -1"),
        (lambda: VicinityCache(1, 1, 1, 0), CacheError, "refresh_every must be 1 or more, got 0"),
        (lambda: WindowCache(0), CacheError, "refresh_every must be 1 or more, got 0"),
        (lambda: Window(window=0), DecodeError, "window must be 1 or more, got 0"),
        (lambda: Window(active=0), DecodeError, "active must be 1 or more, got 0"),
        (lambda: Window(refresh_every=0), DecodeError, "refresh_every must be 1 or more, got 0"),
        (lambda: Window(hold=0), DecodeError, "hold must be 1 or more, got 0"),
        (lambda: Window(8, 9), DecodeError, "window must hold the active masks, got window=8 and active=9"),
        (lambda: Window(truncate=False, refresh_at_end=True), DecodeError, "refresh_at_end goes with truncate"),
        (lambda: Paced(0), DecodeError, "steps must be 1 or more, got 0"),
        (lambda: Paced(4, 1.0), DecodeError, r"eps must be in \[0, 1\), got 1.0"),
        (lambda: Paced(None, 0.1), DecodeError, "eps goes with a number of steps"),
        (lambda: DrawnOrder(per_step=0), DecodeError, "per_step must be 1 or more, got 0"),
        (lambda: DrawnOrder(window=-1), DecodeError, "window must be 0 or more, got -1"),
        (lambda: window_diffusion(idle_steps=True), DecodeError, "idle_steps needs a number of steps"),
    ],
)
def test_wrong_settings(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_refreshed_cache_asks_what_the_cache_inside_asks() -> None:
    full, causal = toy_spec("full"), toy_spec("block_causal")
    check(causal, vanilla(), RefreshedCache(BlockCausalCache()))
    check(full, vanilla(), RefreshedCache(DualCache()))
    assert RefreshedCache(BlockCausalCache()).exact and not RefreshedCache(DualCache()).exact and RefreshedCache(NoCache()).exact
    with pytest.raises(DecodeError, match="the cache refreshed does not fit the model"):
        check(full, vanilla(), RefreshedCache(BlockCausalCache()))


def test_refreshing_an_exact_cache_leaves_it_exact() -> None:
    model = tiny_transformer(2, "block_causal", 0, 4)
    one = record(model, fast_dllm(4, threshold=0.6), RefreshedCache(BlockCausalCache(), 2), unequal())
    other = record(model, fast_dllm(4, threshold=0.6), NoCache(), unequal())
    for mine, theirs in zip(one.asks, other.asks, strict=True):
        assert torch.allclose(mine.logits, theirs.logits, rtol=0, atol=1e-10)
    assert sum(int(ask.computed.sum()) for ask in one.asks) < sum(int(ask.computed.sum()) for ask in other.asks)


def test_near() -> None:
    span = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]]).bool()

    def places(before: int, after: int) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in near(span, before, after)]

    assert places(0, 0) == [[3, 4, 7], [], [0, 9]]
    assert places(2, 0) == [[1, 2, 3, 4, 5, 6, 7], [], [0, 7, 8, 9]]
    assert places(0, 1) == [[3, 4, 5, 7, 8], [], [0, 1, 9]]
    assert places(99, 99) == [list(range(10)), [], list(range(10))]


# d3LLM's loop with a cache, without its decoder: when a position was decided is in the recording, and says which blocks were closed then.

CACHED = [
    case
    for family in ("llada", "dream")
    for case in golden.load_cases(golden.SHIPPED / "cases" / f"d3llm_{family}.json")
    if "cache_delay_iter" in case["args"]
]


@pytest.mark.parametrize("case", CACHED, ids=lambda case: case["name"])
def test_delayed_blocks_computes_what_the_released_loop_computes(case: Case) -> None:
    arguments, prompt, commits = case["args"], case["prompt_ids"], case["commit_forward"]
    cache = DelayedBlocksCache(arguments["cache_delay_iter"] + 1, arguments["refresh_interval"])
    length = len(prompt) + len(commits)
    state = begin_state(toy_spec(), [([one % WORDS for one in prompt], [None] * len(commits))], [0], length=length, device="cpu")
    block = masks.answer_blocks(state.begin, length, arguments["block_size"])
    own, written, computed = cache.init(state), torch.full_like(state.tokens, -1), []
    for forward in range(case["nfe"]):
        first = torch.where(state.masked, block, length).amin(1, keepdim=True)
        whole = torch.ones_like(state.masked)
        region = Region(state.masked, state.masked, block, state.masked, whole, block < first, block, first.squeeze(1))
        dirty = written != state.tokens
        planned = cache.plan(region, state, own, dirty)
        own = cache.update(planned, region, state, own, dirty)
        written = torch.where(planned.compute, state.tokens, written)
        computed.append(int(planned.compute.sum()))
        now = torch.tensor([[-1] * len(prompt) + commits]) == forward
        state = state.write(now, torch.full_like(state.tokens, 3)).advance((), torch.zeros_like(state.done))
    assert computed == case["query_lens"]


@pytest.mark.parametrize("case", golden.load_cases(golden.SHIPPED / "cases" / "window_diffusion_llada.json"), ids=lambda case: case["name"])
def test_the_window_cache_repeats_the_released_loop(case: Case) -> None:
    """These recordings are replayed with the dual cache, which computes the open span; the window cache remembers it by itself."""
    planned = replace(plan(case, golden.SHIPPED), cache=WindowCache())
    assert compare(case, replay(case, planned), planned) == {}


# What the template reads.


def test_decided_positions_are_read_only_for_a_part_that_looks_back() -> None:
    for revise, looks in ((None, False), (Rewrite(), True)):
        decoder = BlockDecoder(SemiAutoregressive(4), Gate(0.4), **({} if revise is None else {"revise": revise}))
        assert decoder.looks_back is looks
        back = 0
        for ask in record(tiny_transformer(), decoder, DualCache(), unequal()).asks:
            alive = ~ask.state.done.unsqueeze(1)
            back += int((ask.read & ~ask.state.masked & alive).sum())
            # The dual cache computes the whole block either way.
            block = (ask.region.block == ask.region.epoch.unsqueeze(1)) & ask.state.inside & alive
            assert torch.equal(ask.region.span & alive, block)
            assert not bool((block & ~ask.computed).any())
        assert (back > 0) is looks


def test_a_delayed_cache_reuses_nothing_that_is_read() -> None:
    """A rule that looks back gets what it looks at: decided positions of the open block are then computed."""
    model = tiny_transformer()
    lanes = {}
    for name, decoder in (
        ("back", BlockDecoder(SemiAutoregressive(None), Gate(1.1), revise=Rewrite(1.1))),
        ("not back", BlockDecoder(SemiAutoregressive(None), Gate(1.1))),
    ):
        lanes[name] = sum(int(ask.computed.sum()) for ask in record(model, decoder, DelayedCache(refresh_every=None), unequal()).asks)
    assert lanes["back"] > lanes["not back"]
