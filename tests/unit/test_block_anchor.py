"""Models whose blocks count from position 0 (SDAR, Fast-dLLM v2): the prompt's tail shares a block with the first answer tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, NoCache
from dllm_toolkit.decode import decode, trace
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import lanes, masks
from dllm_toolkit.testing.models import tiny_transformer

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 8], [9]]
BUDGETS = [9, 8, 6]


def absolute(shift: int = 0) -> Transformer:
    model = tiny_transformer(layers=2, attention="block_causal", shift=shift)
    model.config = replace(model.config, block_size=4, block_anchor="absolute")
    return model


def test_the_first_block_is_shortened_by_the_prompts_tail() -> None:
    steps = list(trace(absolute(), semi_ar(4), PROMPTS, max_new_tokens=BUDGETS))
    eligible = steps[0].asked.region.eligible
    assert [row.nonzero().flatten().tolist() for row in eligible] == [[5, 6, 7], [4, 5, 6, 7], [1, 2, 3]]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("decoder", [semi_ar(4), d2f(4, threshold=0.6, add_at=0.5, activate_at=0.75)], ids=["semi_ar", "d2f"])
@pytest.mark.parametrize("cache", [NoCache(), BlockCausalCache()], ids=["none", "block_causal"])
def test_logits_are_those_of_a_dense_forward_under_absolute_blocks(shift: int, decoder: Decoder, cache: Cache) -> None:
    model = absolute(shift)
    for step in trace(model, decoder, PROMPTS, max_new_tokens=BUDGETS, cache=cache):
        state, answer = step.before, step.asked.answer
        length = state.tokens.shape[1]
        allow = masks.block_causal(masks.absolute_blocks(3, length, 4, state.tokens.device))
        dense = model.logits(state.tokens, allow & step.asked.region.visible.unsqueeze(1))  # [B, L, V]
        where = answer.positions.clamp(max=length - 1).unsqueeze(-1).expand(-1, -1, dense.shape[-1])
        live = lanes.to_lanes(step.asked.region.read & ~state.done.unsqueeze(1), answer.positions, False)
        assert torch.allclose(answer.logits[live], dense.gather(1, where)[live], atol=1e-10)


def test_one_text_with_and_without_cache() -> None:
    plain = decode(absolute(), d2f(4, threshold=0.6), PROMPTS, max_new_tokens=BUDGETS)
    cached = decode(absolute(), d2f(4, threshold=0.6), PROMPTS, max_new_tokens=BUDGETS, cache=BlockCausalCache())
    assert plain.tokens == cached.tokens
