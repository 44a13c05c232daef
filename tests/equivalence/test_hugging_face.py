"""The native transformer against transformers' Llama and Qwen2: the same weights, the same logits, the same greedy text.

Two foreign architectures pin down what the golden vectors cannot: causal attention, grouped heads, q/k/v biases, and the shift by
one, from a single dense forward up to whole decodes through the engine and the cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Transformer, TransformerConfig
from dllm_toolkit.ops import masks

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
EOS, MASK = 59, 60
TOLERANCE = 2e-4  # float32; logits reach +-20
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
    "llama_mha": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama_gqa": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "qwen2_gqa": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen2_tied": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def native_name(name: str) -> str:
    """transformers' tensor name in our words: model.layers.1.self_attn.q_proj.weight -> layers.1.q_proj.weight."""
    renames = {
        "model.": "",
        "embed_tokens": "embed",
        "self_attn.": "",
        "mlp.": "",
        "post_attention_layernorm": "mlp_norm",
        "input_layernorm": "attention_norm",
    }
    for theirs, ours in renames.items():
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Transformer]:
    """A random model of transformers and ours with its weights."""
    config_name, model_name, changes = FAMILIES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**SIZES, **changes}))
        theirs = theirs.to(torch.float32).eval().requires_grad_(False)
        for name, weight in theirs.named_parameters():
            if name.endswith("bias"):  # transformers starts them at 0, where a dropped bias would go unseen
                weight.normal_(std=0.5)
    ours = Transformer(
        TransformerConfig(
            vocab_size=VOCABULARY,
            width=48,
            layers=3,
            heads=4,
            kv_heads=theirs.config.num_key_value_heads,
            mlp_width=80,
            mask_id=MASK,
            eos_ids=(EOS,),
            pad_id=EOS,
            max_positions=128,
            rope_theta=50000.0,
            norm_eps=1e-6,
            qkv_bias=request.param.startswith("qwen2"),
            tie_embeddings=bool(changes.get("tie_word_embeddings")),
            attention="causal",
            shift=1,
        )
    ).to(torch.float32)
    ours.load_state_dict({native_name(name): value for name, value in theirs.state_dict().items()})
    return theirs, ours.eval().requires_grad_(False)


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, EOS, (rows, length), generator=torch.Generator().manual_seed(length))


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 5, "the toy's logits are too flat to tell anything"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_causal_logits(pair: tuple[Any, Transformer]) -> None:
    theirs, ours = pair
    tokens = random_tokens(2, 33)
    positions = torch.arange(33).expand(2, -1)
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
    dense = torch.zeros(2, 1, 24, 24).masked_fill(~allow.unsqueeze(1), torch.finfo(torch.float32).min).to(torch.float32)
    agree(ours.logits(tokens, allow)[:, 1:], theirs(tokens, attention_mask=dense).logits[:, :-1])


@pytest.mark.parametrize("cache", [NoCache(), BlockCausalCache()], ids=["none", "block_causal"])
def test_autoregressive_decoding_is_greedy_generate(pair: tuple[Any, Transformer], cache: Cache) -> None:
    """Three prompts of unequal length in one batch against transformers' generate on each alone."""
    theirs, ours = pair
    prompts = [random_tokens(1, length)[0].tolist() for length in (3, 17, 8)]
    output = decode(ours, autoregressive(), prompts, max_new_tokens=24, cache=cache)
    for row, prompt in enumerate(prompts):
        generated = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=[MASK],  # our decoders never propose the mask
        )[0, len(prompt) :].tolist()
        assert output.tokens[row] == generated + [EOS] * (24 - len(generated))
        assert output.stats.nfe[row] == len(generated)
        # With the cache a row runs its prompt once and then one token a forward.
        if isinstance(cache, BlockCausalCache):
            assert output.stats.lanes[row] == len(prompt) + len(generated) - 1
