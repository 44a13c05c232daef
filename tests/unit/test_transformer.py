"""The native transformer: attention rules, cached forwards, alignment of shifted logits, precision, sizes that cannot work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import RMSNorm, Transformer, TransformerConfig, rotate, transformer
from dllm_toolkit.ops import masks

LENGTH = 12
BEGIN = 4
BLOCK = 3
CONFIG = TransformerConfig(
    vocab_size=29, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, mask_id=28, eos_ids=(27,), pad_id=27, max_positions=64
)


def tiny(**changes: Any) -> Transformer:
    """Float64, with weights large enough that every position matters to every other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Transformer(replace(CONFIG, **changes)).double()
        for weight in model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.25)
            else:
                torch.nn.init.normal_(weight, mean=1.0, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 27, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def blocks() -> Tensor:
    return masks.answer_blocks(torch.tensor([BEGIN, BEGIN]), LENGTH, BLOCK)


def influences(model: Transformer, tokens: Tensor, allow: Tensor | None) -> Tensor:
    """[L, L] whether the logits at a position (aligned) change with the token at another."""
    before = model.logits(tokens[:1], allow)
    found = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for place in range(LENGTH):
        other = tokens[:1].clone()
        other[0, place] = (other[0, place] + 1) % 27
        found[:, place] = (model.logits(other, allow) - before).abs().amax(-1)[0] > 1e-9
    return found


def test_it_is_a_model() -> None:
    assert isinstance(tiny(), Model)
    assert tiny().spec == CONFIG.spec


def test_full_attention_sees_everything(tokens: Tensor) -> None:
    assert influences(tiny(), tokens, None).all()


def test_causal_attention_sees_the_past(tokens: Tensor) -> None:
    # With shift 1 the row of position i comes from the hidden row of i - 1, which has seen 0 .. i - 1.
    seen = influences(tiny(attention="causal", shift=1), tokens, None)
    past = torch.ones(LENGTH, LENGTH).tril(-1).bool()
    past[0, 0] = True  # row 0 has no predictor; it repeats row 1
    assert torch.equal(seen, past)


def test_block_causal_mask_sees_earlier_blocks_and_its_own(tokens: Tensor) -> None:
    block = blocks()[:1]
    allow = masks.block_causal(block)
    # One layer, so that influence is exactly what the mask lets through.
    assert torch.equal(influences(tiny(layers=1), tokens, allow), allow[0])


@pytest.mark.parametrize(("attention", "shift"), [("full", 0), ("block_causal", 0), ("block_causal", 1), ("causal", 1)])
def test_piecewise_forwards_equal_one_dense_forward(tokens: Tensor, attention: Any, shift: Any) -> None:
    """K/V (and, shifted, the hidden row) left in the buffer by one forward serve the next."""
    model = tiny(attention=attention, shift=shift, block_size=BLOCK if attention == "block_causal" else None)
    block, visible = blocks(), torch.ones(2, LENGTH, dtype=torch.bool)
    everywhere = torch.arange(LENGTH).expand(2, -1)
    dense = model.logits(tokens, masks.lanes_allow(attention, visible, block, everywhere))
    kv = model.buffer(2, LENGTH + 1)
    # A model with full attention has to run as one piece: its past sees its future.
    pieces = [range(LENGTH)] if attention == "full" else [range(0, 4), range(4, 7), range(7, 12)]
    for piece in pieces:
        positions = torch.tensor(list(piece)).expand(2, -1)
        allow = masks.lanes_allow(attention, visible, block, positions)
        allow = torch.cat((allow, torch.zeros_like(allow[..., :1])), dim=2)
        source = (positions - shift).clamp(min=0)
        ours = model(Query(tokens.gather(1, positions), positions, positions, allow, source), kv)
        first = 1 if piece.start == 0 and shift else 0
        torch.testing.assert_close(ours[:, first:], dense[:, piece.start + first : piece.stop], atol=1e-10, rtol=0)


def test_reading_fewer_lanes_changes_nothing_else(tokens: Tensor) -> None:
    model = tiny()
    positions = torch.arange(LENGTH).expand(2, -1)
    read = torch.tensor([[7, 2], [11, 0]])
    everything = model.logits(tokens)
    ours = model(Query(tokens, positions, None, None, read))
    torch.testing.assert_close(ours, everything.gather(1, read.unsqueeze(-1).expand(-1, -1, 29)))


def test_dead_lanes_write_to_the_trash_slot_only(tokens: Tensor) -> None:
    model = tiny()
    kv = model.buffer(1, LENGTH + 1)
    positions = torch.arange(LENGTH).unsqueeze(0)
    allow = torch.cat((torch.ones(1, LENGTH, LENGTH).bool(), torch.zeros(1, LENGTH, 1).bool()), dim=2)
    model(Query(tokens[:1], positions, positions, allow, positions), kv)
    before = kv.keys[:, :, :LENGTH].clone()
    dead = torch.full((1, 3), LENGTH)
    only_trash = torch.zeros(1, 3, LENGTH + 1, dtype=torch.bool)
    only_trash[..., LENGTH] = True
    out = model(Query(torch.full((1, 3), 5), dead.clamp(max=LENGTH - 1), dead, only_trash, dead), kv)
    assert torch.equal(kv.keys[:, :, :LENGTH], before)
    assert out.isfinite().all()


def test_grouped_heads_equal_repeated_heads(tokens: Tensor) -> None:
    grouped = tiny()
    plain = tiny(kv_heads=4)
    weights = dict(grouped.state_dict())
    for name, value in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = value.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain.logits(tokens), grouped.logits(tokens), atol=1e-10, rtol=0)


def test_biases_and_tied_embeddings(tokens: Tensor) -> None:
    model = tiny(qkv_bias=True, tie_embeddings=True)
    assert model.layers[0].q_proj.bias is not None
    assert model.lm_head.weight is model.embed.weight
    assert model.logits(tokens).shape == (2, LENGTH, 29)


def test_shifted_rows_are_aligned(tokens: Tensor) -> None:
    positions = torch.arange(LENGTH).expand(2, -1)
    model = tiny(attention="causal", shift=1)
    raw = model(Query(tokens, positions))
    aligned = model.logits(tokens)
    assert torch.equal(aligned[:, 1:], raw[:, :-1])
    assert torch.equal(aligned[:, 0], aligned[:, 1])


def test_the_same_weights_under_another_attention_rule() -> None:
    model = tiny().with_attention("block_causal", 16)
    assert (model.spec.attention, model.spec.block_size) == ("block_causal", 16)


def test_rotary_tables_never_lose_precision() -> None:
    model = Transformer(CONFIG)
    reference = model.cos.clone()
    half = model.to(torch.bfloat16)
    assert half.cos.dtype == torch.float32
    assert torch.equal(half.cos, reference)
    assert half.double().cos.dtype == torch.float64
    assert not torch.equal(half.cos.float().double(), half.cos)  # computed in float64, not cast up to it


def test_rotation_depends_on_distance_only() -> None:
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(place: int, other: int) -> float:
        at = [model.cos[[index]].view(1, 1, 1, 8) for index in (place, other)]
        around = [model.sin[[index]].view(1, 1, 1, 8) for index in (place, other)]
        return float((rotate(q, at[0], around[0]) * rotate(k, at[1], around[1])).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-12)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-6)


def test_norm_statistics_are_float32_in_low_precision() -> None:
    norm = RMSNorm(8, 1e-5).to(torch.bfloat16)
    x = torch.linspace(-3, 3, 8).to(torch.bfloat16)
    wide = x.float()
    expected = (wide / (wide.pow(2).mean() + 1e-5).sqrt()).to(torch.bfloat16)
    assert torch.equal(norm(x), expected)


def test_a_fresh_model_depends_on_its_seed_only() -> None:
    def build(seed: int) -> Tensor:
        return transformer(vocab_size=29, mask_id=28, eos_ids=[27], pad_id=27, width=32, layers=1, heads=4, seed=seed).embed.weight

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, build(0))
    assert not torch.equal(first, build(1))


def test_buffer_has_one_slot_more_than_it_is_asked_to_show() -> None:
    kv = tiny(shift=1, attention="causal").buffer(3, LENGTH + 1)
    assert kv.keys.shape == kv.values.shape == (2, 3, LENGTH + 1, 2, 8)
    assert kv.hidden is not None and kv.hidden.shape == (3, LENGTH + 1, 32)
    assert tiny().buffer(3, LENGTH + 1).hidden is None
    assert kv.keys.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got heads=4 and kv_heads=3"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"mask_id": 29}, "mask_id must be a row of the vocabulary, got 29 with vocab_size=29"),
        ({"pad_id": -1}, "pad_id must be a row of the vocabulary, got -1"),
    ],
)
def test_sizes_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        replace(CONFIG, **changes)
