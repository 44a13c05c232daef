"""What a family of checkpoints is: a table of tensor names and a function from config.json to a TransformerConfig.

Families are data. The transformer is one for all of them, so a new family is a new table and a few switches, never new code that
computes something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import RopeScaling, TransformerConfig


class CheckpointError(ToolkitError):
    """A checkpoint or adapter that is missing, damaged, of an unknown kind, or too large for the device."""


@dataclass(frozen=True)
class SpecialIds:
    """Special ids as the checkpoint's own files name them. mask_id None: they name no mask token."""

    mask_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Family:
    """One layout of checkpoints.

    names: checkpoint module path -> ours, with {i} for the layer number. ignored: patterns of tensors that hold nothing of their own
    (rotary tables that old checkpoints stored). configure: config.json and the special ids -> TransformerConfig.
    """

    name: str
    model_types: tuple[str, ...]
    names: Mapping[str, str]
    configure: Callable[[Mapping[str, Any], SpecialIds], TransformerConfig]
    ignored: tuple[str, ...] = field(default=(r".*\.rotary_emb\.inv_freq",))

    def native_module(self, module: str) -> str | None:
        """Our path of a checkpoint's module ('model.transformer.blocks.3.q_proj' -> 'layers.3.q_proj'); None if it has none."""
        return _translate(self.names.items(), module)

    def original_module(self, module: str) -> str | None:
        """The checkpoint's path of one of our modules; None if it has none."""
        return _translate(((ours, theirs) for theirs, ours in self.names.items()), module)

    def native_tensor(self, key: str) -> str | None:
        """Our name of a checkpoint's tensor."""
        module, _, leaf = key.rpartition(".")
        ours = self.native_module(module)
        return None if ours is None else f"{ours}.{leaf}"

    def original_tensor(self, key: str) -> str | None:
        """The checkpoint's name of one of our tensors."""
        module, _, leaf = key.rpartition(".")
        theirs = self.original_module(module)
        return None if theirs is None else f"{theirs}.{leaf}"

    def ignores(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def _translate(names: Any, module: str) -> str | None:
    for one, other in names:
        pattern = re.escape(one).replace(r"\{i\}", r"(\d+)")
        if found := re.fullmatch(pattern, module):
            return other.replace("{i}", found.group(1)) if found.groups() else other
    return None


def required(config: Mapping[str, Any], *names: str) -> list[Any]:
    """These entries of config.json, or a CheckpointError that names the missing ones."""
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise CheckpointError(
            f"config.json lacks {', '.join(missing)}. Without them the model cannot be built. Copy the file from the original checkpoint."
        )
    return [config[name] for name in names]


def insist(config: Mapping[str, Any], layout: str, **wanted: Any) -> None:
    """Refuse a config.json that asks for something this layout does not compute; an absent entry is as wanted."""
    for name, value in wanted.items():
        if config.get(name) is not None and config[name] != value:
            raise CheckpointError(
                f"config.json says {name}: {config[name]!r}, supported is {value!r}. This is not the {layout} layout, and the logits "
                f"would be wrong. Use a checkpoint with {name}: {value!r}."
            )


def mask_of(special: SpecialIds) -> int:
    """The mask id of a model that fills masks; CheckpointError if no file of the checkpoint names one."""
    if special.mask_id is None:
        raise CheckpointError(
            "the checkpoint names no mask token: config.json and generation_config.json have no mask_token_id, and the tokenizer has no "
            "mask token. A diffusion model fills masks. Write mask_id: with the id from the model's card."
        )
    return special.mask_id


def rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from a config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.get("rope_theta") or config.get("rope_theta") or default_theta
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    insist(parameters, "plain rotary", partial_rotary_factor=1.0)
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise CheckpointError(
            f"config.json asks for rotary scaling {kind!r}; known: default, llama3. The angles would be wrong. Remove the entry if you "
            "stay within the length that the model was trained on without it."
        )
    factor, low, high, length = required(
        parameters, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    )
    return float(theta), RopeScaling(float(factor), float(low), float(high), int(length))
