"""Checkpoints that are named and laid out like Llama and Qwen: autoregressive baselines and the diffusion models made from them.

    family         layout                          attention      shift
    llama          Llama (2, 3, SmolLM2)           causal         1
    qwen2          Qwen2, Qwen2.5: q/k/v biases    causal         1
    qwen3          Qwen3: RMSNorm on every head    causal         1
    dream          Qwen2 (arXiv 2508.15487)        full           1       Dream v0, Dream-Coder, DiffuCoder
    fast_dllm_v2   Qwen2.5 (arXiv 2509.26328)      block-causal   1       blocks of `bd_size`, counted from position 0
    sdar           Qwen3 (arXiv 2510.06303)        block-causal   0       blocks of `block_size`, counted from position 0

One table of names serves all six; they differ in the switches below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dllm_toolkit.models.families.base import CheckpointError, Family, SpecialIds, insist, mask_of, required, rope
from dllm_toolkit.models.transformer import TransformerConfig
from dllm_toolkit.types import Attention

_THEIRS, _OURS = "model.layers.{i}.", "layers.{i}."

NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "lm_head",
    _THEIRS + "input_layernorm": _OURS + "attention_norm",
    _THEIRS + "post_attention_layernorm": _OURS + "mlp_norm",
    **{_THEIRS + "self_attn." + name: _OURS + name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{_THEIRS + "mlp." + name: _OURS + name for name in ("gate_proj", "up_proj", "down_proj")},
}


@dataclass(frozen=True)
class _Switches:
    """What one family is: called with a config.json, it gives the TransformerConfig.

    block_keys: entries of config.json that may hold the block size of a block-causal model, the first one present counts.
    """

    attention: Attention
    shift: Literal[0, 1]
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    block_keys: tuple[str, ...] = ()

    def __call__(self, config: Mapping[str, Any], special: SpecialIds) -> TransformerConfig:
        width, heads, layers, mlp_width, vocabulary = required(
            config, "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"
        )
        insist(config, "Llama and Qwen", hidden_act="silu", mlp_bias=False, use_sliding_window=False)
        if not self.qkv_bias:
            insist(config, "Llama and Qwen3", attention_bias=False)
        theta, scaling = rope(config)
        return TransformerConfig(
            vocab_size=vocabulary,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            mlp_width=mlp_width,
            mask_id=self._mask(special, vocabulary),
            eos_ids=special.eos_ids,
            pad_id=special.pad_id,
            max_positions=config.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.get("rms_norm_eps", self.norm_eps),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention=self.attention,
            block_size=self._block(config),
            block_anchor="absolute" if self.attention == "block_causal" else "prompt",
            shift=self.shift,
        )

    def _mask(self, special: SpecialIds, vocabulary: int) -> int:
        if self.attention == "causal" and special.mask_id is None:
            return vocabulary  # one past the vocabulary: nobody may propose it, and no word is lost to it
        return mask_of(special)

    def _block(self, config: Mapping[str, Any]) -> int | None:
        if self.attention != "block_causal":
            return None
        for key in self.block_keys:
            if config.get(key) is not None:
                return int(config[key])
        raise CheckpointError(
            f"config.json names no block size ({' or '.join(self.block_keys)}). A block-causal model sees whole blocks of the length it "
            f'was trained with. Add "{self.block_keys[0]}" to config.json: the number is on the model\'s card.'
        )


def _family(name: str, model_types: tuple[str, ...], switches: _Switches) -> Family:
    return Family(name, model_types, NAMES, switches)


LLAMA = _family("llama", ("llama",), _Switches("causal", 1))
QWEN2 = _family("qwen2", ("qwen2",), _Switches("causal", 1, qkv_bias=True))
QWEN3 = _family("qwen3", ("qwen3",), _Switches("causal", 1, qk_norm=True))
DREAM = _family("dream", ("dream",), _Switches("full", 1, qkv_bias=True))
FAST_DLLM_V2 = _family(
    "fast_dllm_v2", ("fast_dllm_qwen",), _Switches("block_causal", 1, qkv_bias=True, block_keys=("bd_size", "block_size"))
)
SDAR = _family("sdar", ("sdar",), _Switches("block_causal", 0, qk_norm=True, block_keys=("block_size", "block_length")))
