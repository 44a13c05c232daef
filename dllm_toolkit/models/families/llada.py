"""LLaDA (arXiv 2502.09992): GSAI-ML/LLaDA-8B-Base and -Instruct, LLaDA-1.5 and models distilled from them.

Plain multi-head attention, no biases, full attention, logits aligned with their positions (shift 0). `ff_out` is the name of both the
head and every block's down projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_toolkit.models.families.base import Family, SpecialIds, insist, mask_of, required
from dllm_toolkit.models.transformer import TransformerConfig


def _configure(config: Mapping[str, Any], special: SpecialIds) -> TransformerConfig:
    width, heads, layers, mlp_width = required(config, "d_model", "n_heads", "n_layers", "mlp_hidden_size")
    insist(
        config, "LLaDA-8B", block_type="llama", layer_norm_type="rms", activation_type="silu", rope=True, alibi=False, scale_logits=False,
        input_emb_norm=False, attention_layer_norm=False, include_bias=False, bias_for_layer_norm=False,
    )  # fmt: skip
    return TransformerConfig(
        vocab_size=config.get("embedding_size") or required(config, "vocab_size")[0],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=config.get("n_kv_heads") or heads,
        mlp_width=mlp_width,
        mask_id=mask_of(special),
        eos_ids=special.eos_ids,
        pad_id=special.pad_id,
        max_positions=config.get("max_sequence_length", 4096),
        rope_theta=config.get("rope_theta", 500000.0),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        qkv_bias=bool(config.get("include_qkv_bias")),
        tie_embeddings=bool(config.get("weight_tying", False)),
    )


_BLOCK = "model.transformer.blocks.{i}."
_LAYER = "layers.{i}."

LLADA = Family(
    name="llada",
    model_types=("llada",),
    names={
        "model.transformer.wte": "embed",
        "model.transformer.ln_f": "norm",
        "model.transformer.ff_out": "lm_head",
        _BLOCK + "attn_norm": _LAYER + "attention_norm",
        _BLOCK + "ff_norm": _LAYER + "mlp_norm",
        _BLOCK + "q_proj": _LAYER + "q_proj",
        _BLOCK + "k_proj": _LAYER + "k_proj",
        _BLOCK + "v_proj": _LAYER + "v_proj",
        _BLOCK + "attn_out": _LAYER + "o_proj",
        _BLOCK + "ff_proj": _LAYER + "gate_proj",
        _BLOCK + "up_proj": _LAYER + "up_proj",
        _BLOCK + "ff_out": _LAYER + "down_proj",
    },
    configure=_configure,
)
