"""Checkpoint families as data: how a config.json reads, and what its tensors are called here.

A family is a key table and a function from its config.json to a TransformerConfig; the transformer is one for all.

    native   the files that Transformer.save_pretrained writes
    llada    GSAI-ML/LLaDA-8B-Base and -Instruct, LLaDA-1.5: MHA, no biases, aligned logits (shift 0)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import TransformerConfig


class CheckpointError(ToolkitError):
    """A checkpoint or adapter that is missing, damaged, or of an unknown kind."""


@dataclass(frozen=True)
class Family:
    """One layout of checkpoints. `names`: checkpoint module path -> ours, with {i} for the layer number."""

    name: str
    model_types: tuple[str, ...]
    names: Mapping[str, str]
    configure: Callable[[Mapping[str, Any]], TransformerConfig]

    def native_module(self, module: str) -> str | None:
        """Our path of a checkpoint's module ('model.transformer.blocks.3.q_proj' -> 'layers.3.q_proj'); None if it has none."""
        for theirs, ours in self.names.items():
            pattern = re.escape(theirs).replace(r"\{i\}", r"(\d+)")
            if found := re.fullmatch(pattern, module):
                return ours.replace("{i}", found.group(1)) if found.groups() else ours
        return None

    def native_tensor(self, key: str) -> str | None:
        """Our name of a checkpoint's tensor."""
        module, _, leaf = key.rpartition(".")
        ours = self.native_module(module)
        return None if ours is None else f"{ours}.{leaf}"


def _required(config: Mapping[str, Any], *names: str) -> list[Any]:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise CheckpointError(
            f"config.json lacks {', '.join(missing)}. Without them the model cannot be built. Copy the file from the original checkpoint."
        )
    return [config[name] for name in names]


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _native_config(config: Mapping[str, Any]) -> TransformerConfig:
    known = {item.name for item in fields(TransformerConfig)}
    _required(config, "vocab_size", "width", "layers", "heads", "mlp_width", "mask_id", "eos_ids", "pad_id")
    return TransformerConfig(**{name: value for name, value in config.items() if name in known})


def _llada_config(config: Mapping[str, Any]) -> TransformerConfig:
    width, heads, layers, mlp_width, mask_id, eos_id = _required(
        config, "d_model", "n_heads", "n_layers", "mlp_hidden_size", "mask_token_id", "eos_token_id"
    )
    for name, wanted in (("block_type", "llama"), ("layer_norm_type", "rms"), ("activation_type", "silu"), ("rope", True)):
        if config.get(name, wanted) != wanted:
            raise CheckpointError(
                f"config.json says {name}: {config[name]!r}, supported is {wanted!r}. This is not the LLaDA-8B layout. "
                "Use a checkpoint of the LLaDA-8B family."
            )
    eos_ids = _ids(eos_id)
    return TransformerConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=config.get("n_kv_heads") or heads,
        mlp_width=mlp_width,
        mask_id=mask_id,
        eos_ids=eos_ids,
        pad_id=int(eos_ids[0] if config.get("pad_token_id") is None else config["pad_token_id"]),
        max_positions=config.get("max_sequence_length", 4096),
        rope_theta=config.get("rope_theta", 500000.0),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        qkv_bias=bool(config.get("include_qkv_bias") or config.get("include_bias")),
        tie_embeddings=bool(config.get("weight_tying", False)),
    )


_LAYER = "layers.{i}."
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

NATIVE = Family(
    name="native",
    model_types=("dllm_toolkit",),
    names={
        "embed": "embed",
        "norm": "norm",
        "lm_head": "lm_head",
        **{_LAYER + name: _LAYER + name for name in (*_LINEARS, "attention_norm", "mlp_norm")},
    },
    configure=_native_config,
)

_BLOCK = "model.transformer.blocks.{i}."

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
    configure=_llada_config,
)

FAMILIES = (NATIVE, LLADA)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to; raises CheckpointError listing the known ones."""
    kind = str(config.get("model_type", "")).lower()
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"unknown model_type {kind!r} in config.json; known: {known}. The key map and the sizes depend on it. "
        "Add a Family to dllm_toolkit/models/families.py."
    )
