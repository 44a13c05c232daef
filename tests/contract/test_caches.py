"""Every cache of the catalogue passes its own check, and the toys are sharp enough for that to mean something."""

from __future__ import annotations

import pytest
import torch

from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.ops import masks
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.contract_cache import fresh_logits
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.testing.record import gaps, infill, record, unequal


def cache(name: str) -> cases.Case:
    return next(case for case in cases.CACHES if case.name == name)


@pytest.mark.parametrize("name", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_toys_show_what_an_approximate_cache_does(name: str, shift: int, seed: int) -> None:
    """Two layers of full attention: stale keys change logits visibly, otherwise every cache test would be vacuous."""
    model = tiny_transformer(2, "full", shift, seed)  # type: ignore[arg-type]
    recording = record(model, semi_ar(4), cache(name).build(), unequal())
    apart = [gaps(ask.logits, fresh_logits(model, ask))[ask.read].max() for ask in recording.asks if bool(ask.read.any())]
    assert max(apart) > 1e-2


def test_toys_are_spread_and_end() -> None:
    """Thresholds from 0.3 to 0.9 separate positions, and end-of-text is committed in some rows but not in all."""
    passed = {0.3: 0, 0.6: 0, 0.9: 0}
    seen = ended = rows = 0
    for toy in contract.toys():
        if toy.name == "causal":
            continue
        recording = record(toy.model, semi_ar(4), cache("none").build(), unequal())
        for ask in recording.asks:
            probability = ask.logits.softmax(-1).amax(-1)[ask.read]
            seen += len(probability)
            passed = {bound: count + int((probability >= bound).sum()) for bound, count in passed.items()}
        rows += 4
        ended += int((recording.last.result == 2).sum())
    shares = [count / seen for count in passed.values()]
    assert 0.99 > shares[0] > shares[1] + 0.2 > shares[2] + 0.4 > 0.5, shares
    assert 0 < ended < rows


@pytest.mark.parametrize("seed", [3, 5])
@pytest.mark.parametrize("build", [lambda: d2f(4, threshold=0.6, add_at=0.5, activate_at=0.75), lambda: semi_ar(3), lambda: d2f(2, 0.9)])
def test_training_mask_and_decoding_agree(build: object, seed: int) -> None:
    """C6: dense logits under the training mask are the logits that the engine saw under the block-causal cache, at every step."""
    model = tiny_transformer(2, "block_causal", 0, seed)
    reused = False
    for batch in (unequal(), infill()):
        recording = record(model, build(), cache("block_causal").build(), batch)  # type: ignore[operator]
        reused |= any(bool((ask.plan.visible & ~ask.computed).any()) for ask in recording.asks)
        for ask in recording.asks:
            block, state = ask.region.block, ask.state
            inside = state.positions < state.end.unsqueeze(1)
            dense = model.logits(state.tokens, masks.block_causal(block) & inside.unsqueeze(1))
            alive = ask.read & ~state.done.unsqueeze(1)
            assert bool((gaps(ask.logits, dense)[alive] < 1e-10).all())
            # The blocks are those that training uses.
            size = build().schedule.block_length  # type: ignore[operator]
            assert torch.equal(block, masks.answer_blocks(state.begin, block.shape[1], size))
    assert reused, "nothing came from the cache"


@pytest.mark.parametrize("name", ["prefix", "dual"])
def test_an_approximate_cache_saves_lanes_and_not_forwards_of_the_first_step(name: str) -> None:
    toy = contract.toys()[0]
    decoder = fast_dllm(4, threshold=0.9)
    lanes = {}
    for chosen in ("none", name):
        recording = record(toy.model, decoder, cache(chosen).build(), unequal())
        lanes[chosen] = int(sum(ask.computed.sum() for ask in recording.asks)) / len(recording.asks)
        assert torch.equal(recording.asks[0].computed, recording.asks[0].region.visible)
    assert lanes[name] < 0.9 * lanes["none"]
