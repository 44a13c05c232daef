"""Writing a checkpoint directory: our own names, or those of the checkpoint that the model came from. One shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dllm_toolkit.models.eight_bit import format_of
from dllm_toolkit.models.families.base import Family
from dllm_toolkit.models.transformer import ModelError, TransformerConfig

if TYPE_CHECKING:
    from dllm_toolkit.models.transformer import Transformer

OVERRIDES = "dllm_toolkit"
"""Key in an original-style config.json under which we keep what the original format cannot say; other tools ignore it."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint a model was loaded from: its family, its JSON files (without our overrides), and what they amount to."""

    family: Family
    config: Mapping[str, Any]
    settings: TransformerConfig
    generation: Mapping[str, Any] = field(default_factory=dict)


def save(
    model: Transformer, directory: Path, dtype: torch.dtype | None, names: Literal["native", "original"], shard_bytes: int
) -> None:
    """See Transformer.save_pretrained."""
    if names not in ("native", "original"):
        raise ModelError(f"names must be native or original, got {names!r}. Write names: native.")
    tensors = _tensors(model)
    written = dtype or model.dtype
    if names == "original":
        origin = model.origin
        if origin is None:
            raise ModelError(
                "there are no original names, got a model that was not loaded from a checkpoint of another family. Original names and "
                "config.json come from that checkpoint. Write names: native."
            )
        tensors = {str(origin.family.original_tensor(name)): value for name, value in tensors.items()}
        config = _original_config(origin, model.config, written)
    else:
        config = {"model_type": "dllm_toolkit", "architectures": ["Transformer"], **asdict(model.config)}
    directory.mkdir(parents=True, exist_ok=True)
    _write_shards(tensors, directory, written, shard_bytes)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if names == "original" and model.origin is not None and model.origin.generation:
        (directory / "generation_config.json").write_text(json.dumps(model.origin.generation, indent=2) + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(directory))


def _tensors(model: Transformer) -> dict[str, Tensor]:
    format = format_of(model)
    if format is not None:
        raise ModelError(
            f"a model in 8 bits is not saved, got {format} weights. Rounding is for good, and the checkpoint would look exact. Save the "
            "model before, or keep the checkpoint that it came from and load it with weights: again."
        )
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    if any("lora_" in name for name in tensors):
        raise ModelError(
            "the model carries an adapter that is not merged, got LoRA tensors beside the weights. A checkpoint holds plain weights. Save "
            "the adapter with training.lora.save_adapter, or load it with merge_adapter: true first."
        )
    return tensors


def _original_config(origin: Origin, settings: TransformerConfig, dtype: torch.dtype) -> dict[str, Any]:
    config = dict(origin.config)
    if origin.family.name == "native":
        return {**config, **asdict(settings)}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    if settings.mask_id < settings.vocab_size:  # it may have come from the tokenizer, or from `mask_id=` of load
        config["mask_token_id"] = settings.mask_id
    changed = {
        name: getattr(settings, name)
        for name in ("attention", "block_size")
        if getattr(settings, name) != getattr(origin.settings, name)
    }
    return {**config, OVERRIDES: changed} if changed else config


def _write_shards(tensors: Mapping[str, Tensor], directory: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, value in tensors.items():
        size = value.numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A copy of each: maps that share one product are views of one tensor, which safetensors refuses.
        part = {name: tensors[name].detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        save_file(part, str(directory / file), metadata={"format": "pt"})
        files.update(dict.fromkeys(names, file))
    _remove_leftovers(directory, set(files.values()))
    if len(shards) > 1:
        total = sum(value.numel() * dtype.itemsize for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _remove_leftovers(directory: Path, written: set[str]) -> None:
    """Weights of an earlier save in other shards: the loader would prefer a stale index to the new file."""
    for old in (*directory.glob("model-*-of-*.safetensors"), directory / "model.safetensors"):
        if old.name not in written:
            old.unlink(missing_ok=True)
    if len(written) == 1:
        (directory / "model.safetensors.index.json").unlink(missing_ok=True)
