"""The files that Transformer.save_pretrained writes: our own names, and a config.json that is a TransformerConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dllm_toolkit.models.families.base import Family, SpecialIds, required
from dllm_toolkit.models.transformer import RopeScaling, TransformerConfig


def _configure(config: Mapping[str, Any], special: SpecialIds) -> TransformerConfig:
    known = {item.name for item in fields(TransformerConfig)}
    required(config, "vocab_size", "width", "layers", "heads", "mlp_width", "mask_id", "eos_ids", "pad_id")
    settings = {name: value for name, value in config.items() if name in known}
    if settings.get("rope_scaling") is not None:
        settings["rope_scaling"] = RopeScaling(**settings["rope_scaling"])
    if special.mask_id is not None:
        settings["mask_id"] = special.mask_id
    return TransformerConfig(**settings)


_LAYER = "layers.{i}."
_PARTS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "attention_norm", "mlp_norm", "q_norm", "k_norm",
)  # fmt: skip

NATIVE = Family(
    name="native",
    model_types=("dllm_toolkit",),
    names={"embed": "embed", "norm": "norm", "lm_head": "lm_head", **{_LAYER + name: _LAYER + name for name in _PARTS}},
    configure=_configure,
)
