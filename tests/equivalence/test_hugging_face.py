"""Checkpoints written by transformers, read by our `load`: the same logits, the same greedy text.

Llama, Qwen2 and Qwen3 pin down what the golden vectors cannot: causal attention, grouped heads, heads wider than width / heads, q/k/v
biases, norms on heads, tied embeddings, stretched rotary angles, the shift by one; from one dense forward to whole decodes through the
engine and the cache. SDAR and Fast-dLLM v2 have no class in transformers: they are the same weights under another mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import masks

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
EOS = 59
RELATIVE = 1e-5  # of the largest logit, float32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so short that a toy's angles differ
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "initializer_range": 0.25,  # far above the default, so that logits spread and every position matters
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "bos_token_id": None,
    "attn_implementation": "sdpa",
}
FAMILIES = {
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama3_gqa": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama_tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2_gqa": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2_tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3_wide_heads": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 20}),
    "qwen3_tied": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 12, "tie_word_embeddings": True}),
}


def build(name: str) -> Any:
    """A random model of transformers, with nothing left at a value where dropping it would go unseen."""
    kind, changes = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.float32).eval().requires_grad_(False)
        for key, weight in theirs.named_parameters():
            if key.endswith("bias"):
                weight.normal_(std=0.5)
            elif "norm" in key:
                weight.uniform_(0.6, 1.4)
    return theirs


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Transformer]:
    """A random model of transformers, and ours loaded from the directory that it wrote."""
    theirs = build(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    # Small enough that some of the models come in shards.
    theirs.save_pretrained(str(directory), max_shard_size="100KB")
    return theirs, load(str(directory))


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, EOS, (rows, length), generator=torch.Generator().manual_seed(length))


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 4, "the toy's logits are too flat to tell anything"
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < RELATIVE


def test_spec(pair: tuple[Any, Transformer]) -> None:
    theirs, ours = pair
    assert (ours.spec.attention, ours.spec.shift, ours.spec.eos_ids, ours.spec.pad_id) == ("causal", 1, (EOS,), EOS)
    assert ours.spec.mask_id == VOCABULARY  # no mask token: one past the vocabulary
    assert ours.spec.head_dim == (getattr(theirs.config, "head_dim", None) or 48 // 4)


def test_causal_logits(pair: tuple[Any, Transformer]) -> None:
    theirs, ours = pair
    tokens = random_tokens(2, 100)
    positions = torch.arange(100).expand(2, -1)
    agree(ours(Query(tokens, positions)), theirs(tokens).logits)


def test_logits_are_aligned_with_what_they_predict(pair: tuple[Any, Transformer]) -> None:
    """`model.logits` row i speaks of the token AT i; transformers' row i - 1 does."""
    theirs, ours = pair
    tokens = random_tokens(2, 21)
    agree(ours.logits(tokens)[:, 1:], theirs(tokens).logits[:, :-1])
    # The next-token loss written both ways.
    expected = theirs(tokens, labels=tokens).loss
    log_p = ours.logits(tokens)[:, 1:].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(-log_p.mean(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["full", "block_causal"])
def test_other_attention_rules(pair: tuple[Any, Transformer], rule: str) -> None:
    """The same weights under a bidirectional or a block-causal mask, given to transformers as a dense mask."""
    theirs, ours = pair
    tokens = random_tokens(2, 24)
    block = masks.answer_blocks(torch.tensor([7, 10]), 24, 4)
    allow = torch.ones(2, 24, 24, dtype=torch.bool) if rule == "full" else masks.block_causal(block)
    agree(ours.logits(tokens, allow)[:, 1:], theirs(tokens, attention_mask=dense(allow)).logits[:, :-1])


def dense(allow: Tensor) -> Tensor:
    """transformers' form of a mask: 0 where allowed, the least number elsewhere."""
    return torch.zeros(allow.shape).masked_fill(~allow, torch.finfo(torch.float32).min).unsqueeze(1)


@pytest.mark.parametrize("cache", [NoCache(), BlockCausalCache()], ids=["none", "block_causal"])
def test_autoregressive_decoding_is_greedy_generate(pair: tuple[Any, Transformer], cache: Cache) -> None:
    """Three prompts of unequal length in one batch against transformers' generate on each alone; no word is banned."""
    theirs, ours = pair
    prompts = [random_tokens(1, length)[0].tolist() for length in (3, 17, 8)]
    output = decode(ours, autoregressive(), prompts, max_new_tokens=24, cache=cache)
    for row, prompt in enumerate(prompts):
        generated = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False, max_new_tokens=24
        )[0, len(prompt) :].tolist()
        assert output.tokens[row] == generated + [EOS] * (24 - len(generated))
        assert output.stats.nfe[row] == len(generated)
        # With the cache a row runs its prompt once and then one token a forward.
        if isinstance(cache, BlockCausalCache):
            assert output.stats.lanes[row] == len(prompt) + len(generated) - 1


@pytest.mark.parametrize(
    ("base", "changes", "shift"),
    [
        ("qwen3_wide_heads", {"model_type": "sdar", "block_size": 4, "mask_token_id": 60}, 0),
        ("qwen2_tied", {"model_type": "Fast_dLLM_Qwen", "bd_size": 8, "mask_token_id": 60}, 1),
    ],
    ids=["sdar", "fast_dllm_v2"],
)
def test_block_diffusion_layouts(tmp_path: Path, base: str, changes: dict[str, Any], shift: int) -> None:
    """SDAR is Qwen3 and Fast-dLLM v2 is Qwen2.5 under a mask of blocks that are counted from position 0."""
    theirs = build(base)
    theirs.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    # As these projects write it, in transformers 4's way.
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes, "rope_scaling": None}))
    ours = load(str(tmp_path))
    size = changes.get("block_size") or changes["bd_size"]
    assert (ours.spec.attention, ours.spec.block_size, ours.spec.shift, ours.spec.mask_id) == ("block_causal", size, shift, 60)
    tokens = random_tokens(2, 22)
    block = (torch.arange(22) // size).expand(2, -1)
    positions = torch.arange(22).expand(2, -1)
    for allow in (masks.block_causal(block), torch.ones(2, 22, 22, dtype=torch.bool)):
        agree(ours(Query(tokens, positions, None, allow)), theirs(tokens, attention_mask=dense(allow)).logits)
