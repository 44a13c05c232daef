"""Checkpoint families as data: how a config.json reads, and what its tensors are called here. See the table in decoder_only.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_toolkit.models.families.base import CheckpointError, Family, SpecialIds
from dllm_toolkit.models.families.decoder_only import DREAM, FAST_DLLM_V2, LLAMA, QWEN2, QWEN3, SDAR
from dllm_toolkit.models.families.llada import LLADA
from dllm_toolkit.models.families.native import NATIVE

__all__ = ["FAMILIES", "CheckpointError", "Family", "SpecialIds", "family_of"]

FAMILIES = (NATIVE, LLADA, DREAM, SDAR, FAST_DLLM_V2, LLAMA, QWEN2, QWEN3)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to; raises CheckpointError listing the known ones."""
    kind = str(config.get("model_type", "")).lower()
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"unknown model_type {kind!r} in config.json; known: {known}. The key map and the sizes depend on it. "
        "Add a Family to dllm_toolkit/models/families/."
    )
