"""How each family's config.json reads: sizes, switches, special ids, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dllm_toolkit.data.stories import build_tokenizer
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.families import FAMILIES, CheckpointError, SpecialIds, family_of
from dllm_toolkit.models.load import load
from dllm_toolkit.models.tokens import special_ids
from dllm_toolkit.models.transformer import RopeScaling, Transformer, TransformerConfig

IDS = SpecialIds(60, (59,), 58)
DECODER_ONLY: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "vocab_size": 61,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "eos_token_id": 59,
    "block_size": 4,
}
LLADA: dict[str, Any] = {
    "model_type": "llada",
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 80,
    "vocab_size": 60,
    "embedding_size": 61,
    "eos_token_id": 59,
    "mask_token_id": 60,
}


def configure(config: Mapping[str, Any], ids: SpecialIds = IDS) -> TransformerConfig:
    return family_of(config).configure(config, ids)


def write(directory: Path, config: Mapping[str, Any], seed: int = 3) -> Path:
    """A random checkpoint with the family's own names."""
    family = family_of(config)
    settings = family.configure(config, IDS)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in Transformer(settings).named_parameters():
        tensors[str(family.original_tensor(name))] = torch.randn(value.shape, generator=generator, dtype=torch.float32) * 0.3
    save_file(tensors, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("kind", "attention", "shift", "bias", "norms", "block"),
    [
        ("llama", "causal", 1, False, False, None),
        ("qwen2", "causal", 1, True, False, None),
        ("qwen3", "causal", 1, False, True, None),
        ("Dream", "full", 1, True, False, None),
        ("sdar", "block_causal", 0, False, True, 4),
        ("Fast_dLLM_Qwen", "block_causal", 1, True, False, 4),
    ],
)
def test_switches(kind: str, attention: str, shift: int, bias: bool, norms: bool, block: int | None) -> None:
    settings = configure({**DECODER_ONLY, "model_type": kind})
    found = (settings.attention, settings.shift, settings.qkv_bias, settings.qk_norm, settings.block_size)
    assert found == (attention, shift, bias, norms, block)
    assert (settings.width, settings.heads, settings.kv_heads, settings.head_dim, settings.mlp_width) == (48, 4, 2, 12, 80)
    assert (settings.mask_id, settings.eos_ids, settings.pad_id) == (60, (59,), 58)


def test_llada() -> None:
    settings = configure(LLADA)
    assert (settings.attention, settings.shift, settings.vocab_size, settings.kv_heads) == ("full", 0, 61, 4)
    assert (settings.rope_theta, settings.norm_eps, settings.max_positions) == (500000.0, 1e-5, 4096)
    # LLaDA-1.5 writes the same file.
    assert configure({**LLADA, "n_kv_heads": 4, "weight_tying": False, "rope": True}) == settings


def test_every_family_names_every_tensor_both_ways() -> None:
    """Ours -> theirs -> ours is the identity on every parameter of a model with every switch on."""
    model = Transformer(configure({**DECODER_ONLY, "model_type": "qwen3"}))
    for family in FAMILIES:
        for name, _ in model.named_parameters():
            if family.name == "llada" and ("q_norm" in name or "k_norm" in name):
                continue
            theirs = family.original_tensor(name)
            assert theirs is not None and family.native_tensor(theirs) == name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "Dream", "sdar", "Fast_dLLM_Qwen"])
def test_rotary_settings_of_transformers_4_and_5(kind: str) -> None:
    base = {**DECODER_ONLY, "model_type": kind}
    stretch = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    scaling = RopeScaling(8.0, 1.0, 4.0, 32)
    four = configure({**base, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **stretch}})
    five = configure({**base, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **stretch}})
    assert four == five
    assert (four.rope_theta, four.rope_scaling) == (5e5, scaling)
    plain = configure({**base, "rope_theta": 1e6, "rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling) == (1e6, None)
    assert configure({**base, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}) == plain


def test_stretched_frequencies() -> None:
    """Fast ones kept, slow ones divided, in between a blend that meets both ends."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    turns = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    frequency = turns * 2 * torch.pi / 64
    ratio = scaling(frequency) / frequency
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1.0, 1 / 3 + 2 / 3 / 8, 1 / 8, 1 / 8]))


def test_head_size_need_not_be_width_over_heads() -> None:
    assert configure({**DECODER_ONLY, "model_type": "qwen3", "head_dim": 20}).head_dim == 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**DECODER_ONLY, "model_type": "gpt2"}, "unknown model_type 'gpt2' in config.json; known: dllm_toolkit, llada, dream, sdar"),
        ({**DECODER_ONLY, "model_type": "llama", "hidden_size": None}, "config.json lacks hidden_size"),
        ({**DECODER_ONLY, "model_type": "llama", "hidden_act": "gelu"}, "config.json says hidden_act: 'gelu', supported is 'silu'"),
        ({**DECODER_ONLY, "model_type": "llama", "attention_bias": True}, "config.json says attention_bias: True"),
        ({**DECODER_ONLY, "model_type": "qwen2", "use_sliding_window": True}, "config.json says use_sliding_window: True"),
        ({**DECODER_ONLY, "model_type": "llama", "rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'; known: default, llama3"),
        ({**DECODER_ONLY, "model_type": "llama", "rope_scaling": {"type": "llama3"}}, "config.json lacks factor, low_freq_factor"),
        ({**DECODER_ONLY, "model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({**DECODER_ONLY, "model_type": "sdar", "block_size": None}, r"names no block size \(block_size or block_length\)"),
        ({**LLADA, "block_type": "sequential"}, "config.json says block_type: 'sequential', supported is 'llama'"),
        ({**LLADA, "mlp_hidden_size": None}, "config.json lacks mlp_hidden_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        configure(config)


# --- special ids ---------------------------------------------------------------------------------------------------------------------


def test_generation_config_counts_before_config_for_what_ends_a_text() -> None:
    ids = special_ids({"eos_token_id": 1, "pad_token_id": 3, "mask_token_id": 5}, {"eos_token_id": [1, 2]}, None)
    assert ids == SpecialIds(5, (1, 2), 3)


def test_the_tokenizer_fills_in_what_the_files_leave_out() -> None:
    tokenizer = build_tokenizer()
    ids = special_ids({}, {}, tokenizer)
    assert ids.mask_id == tokenizer.mask_token_id
    assert ids.eos_ids == (tokenizer.eos_token_id,)


def test_an_added_token_that_says_mask_is_the_mask() -> None:
    """Fast-dLLM v2's tokenizer holds |<MASK>| without naming it its mask token."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["|<MASK>|"], special_tokens=True)
    ours = tokenizer.mask_token_id
    tokenizer.mask_token = None
    ids = special_ids({"eos_token_id": 1}, {}, tokenizer)
    assert ids.mask_id in (None, len(tokenizer) - 1)  # two candidates are no answer
    assert special_ids({"eos_token_id": 1}, {}, tokenizer, mask_id=ours).mask_id == ours


def test_no_end_of_text_token() -> None:
    with pytest.raises(CheckpointError, match="names no end-of-text token"):
        special_ids({"mask_token_id": 5}, {}, None)


def test_a_diffusion_model_without_a_mask_token(tmp_path: Path) -> None:
    config = {**DECODER_ONLY, "model_type": "Dream"}
    write(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"names no mask token: .* Write mask_id: with the id from the model's card"):
        load(str(tmp_path))
    assert load(str(tmp_path), mask_id=60).spec.mask_id == 60
    (tmp_path / "generation_config.json").write_text(json.dumps({"mask_token_id": 57, "pad_token_id": 56}))
    assert (load(str(tmp_path)).spec.mask_id, load(str(tmp_path)).spec.pad_id) == (57, 56)


def test_a_mask_id_outside_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, {**DECODER_ONLY, "model_type": "Dream", "mask_token_id": 61})
    with pytest.raises(CheckpointError, match="mask_id must be a row of the vocabulary, got 61 with vocab_size=61. Only a causal model"):
        load(str(tmp_path))


def test_an_autoregressive_model_loses_no_word_to_a_mask(tmp_path: Path) -> None:
    """The last word of the vocabulary can be generated: the mask id is one past it, and only causal attention allows that."""
    write(tmp_path, {**DECODER_ONLY, "model_type": "qwen2"})
    model = load(str(tmp_path))
    assert model.spec.mask_id == model.spec.vocab_size == 61
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.embed.weight.fill_(1.0)
        model.norm.weight.fill_(1.0)
        for layer in model.layers:
            layer.o_proj.weight.zero_()
            layer.down_proj.weight.zero_()
        model.lm_head.weight[60] = 1.0
    output = decode(model, autoregressive(), [[1, 2, 3], [4]], max_new_tokens=3)
    assert output.tokens == [[60, 60, 60], [60, 60, 60]]
    with pytest.raises(CheckpointError, match="Only a causal model does without a mask token"):
        load(str(tmp_path), attention="full")
    # A diffusion model made from it names one.
    other = load(str(tmp_path), attention="full", mask_id=57)
    assert (other.spec.attention, other.spec.mask_id, other.spec.shift) == ("full", 57, 1)


# --- tokenizers ----------------------------------------------------------------------------------------------------------------------


def test_a_byte_level_tokenizer_of_vocabulary_and_merges(tmp_path: Path) -> None:
    """Dream ships no tokenizer.json, only Qwen2's two files; its own class would be remote code."""
    write(tmp_path, {**DECODER_ONLY, "model_type": "Dream"})
    words = ["a", "b", "c", "ab", "abc", "\u0120", "<|endoftext|>", "<|mask|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    added = {"6": {"content": "<|endoftext|>", "special": True}, "7": {"content": "<|mask|>", "special": True}}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load(str(tmp_path))
    assert model.tokenizer is not None
    assert model.spec.mask_id == 7
    assert model.tokenizer("abcab<|mask|>")["input_ids"] == [4, 3, 7]
    assert model.tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"


def test_a_sentencepiece_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**DECODER_ONLY, "model_type": "llama"})
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ToolkitError, match="has a tokenizer.model and no tokenizer.json"):
        load(str(tmp_path))


def test_rotary_tables_stored_by_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path, {**DECODER_ONLY, "model_type": "llama"})
    tensors = load_file(str(tmp_path / "model.safetensors"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6, dtype=torch.float32)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    assert load(str(tmp_path)).spec.layers == 2
