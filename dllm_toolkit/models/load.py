"""Loading checkpoints: a directory, a hub id, or a model that ships with the package; LoRA adapters are merged.

    load("asset:teacher")                                    the shipped tiny bidirectional model
    load("asset:teacher", adapter="asset:d2f")               its D2F student: adapter merged, block-causal attention
    load("GSAI-ML/LLaDA-8B-Instruct", adapter="...", attention="block_causal", dtype="bfloat16", device="cuda")

Tensors stream one by one from safetensors files into a model that was built empty on the target device, so host memory never holds a
second copy. Nothing but safetensors and JSON is read and no code of a checkpoint ever runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dllm_toolkit.models.families import CheckpointError, Family, family_of
from dllm_toolkit.models.transformer import ModelError, Transformer
from dllm_toolkit.registry import register
from dllm_toolkit.types import Attention

Dtype = Literal["float32", "float64", "bfloat16", "float16"]


@register("model", "load")
def load(
    path: str,
    adapter: str | None = None,
    attention: Attention | None = None,
    block_size: int | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    revision: str | None = None,
) -> Transformer:
    """A pretrained model, ready to decode.

    path: a directory, a hub id, or `asset:NAME`. adapter: the same for a PEFT LoRA adapter, merged in float32.
    attention, block_size: decode under another attention rule than the checkpoint's own; an adapter's student.json sets them too.
    device: `auto` takes CUDA when there is one. Raises CheckpointError.
    """
    where = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    directory = resolve(path, revision)
    config = read_json(directory / "config.json")
    family = family_of(config)
    try:
        settings = family.configure(config)
        with torch.device("meta"):
            model = Transformer(settings)
    except (ModelError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} describes no model that can be built, got: {error} "
            "Use the config.json that came with the weights."
        ) from error
    model = model.to(dtype=getattr(torch, dtype)).to_empty(device=where)
    model.rebuild_rotary_tables()
    _fill(model, directory, family)
    if adapter is not None:
        adapter_directory = resolve(adapter, None)
        merge_adapter(model, adapter_directory, family)
        student = adapter_directory / "student.json"
        if student.exists():
            rule = read_json(student)
            attention = attention or rule.get("attention")
            block_size = block_size or rule.get("block_size")
    if attention is not None or block_size is not None:
        model.with_attention(attention or model.config.attention, block_size or model.config.block_size)
    model.tokenizer = _tokenizer(directory)
    return model.eval().requires_grad_(False)


def resolve(path: str, revision: str | None) -> Path:
    """The local directory of a path, an `asset:NAME`, or a hub id (downloaded: safetensors, JSON and tokenizer files only)."""
    if path.startswith("asset:"):
        assets = Path(str(resources.files("dllm_toolkit") / "assets"))
        shipped = sorted(item.name for item in assets.iterdir() if item.is_dir() and item.name != "__pycache__")
        directory = assets / path.removeprefix("asset:")
        if directory.name not in shipped or directory.parent != assets:
            raise CheckpointError(
                f"no shipped model is called {path!r}. Shipped: {', '.join(f'asset:{name}' for name in shipped)}. Write one of these."
            )
        return directory
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    looks_like_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not local.exists()
    if not looks_like_hub_id:
        raise CheckpointError(
            f"no checkpoint directory at {path!r}. A directory with config.json and model.safetensors is expected. "
            "Write an existing directory, a hub id such as GSAI-ML/LLaDA-8B-Instruct, or asset:teacher."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the hub id {path!r} could not be fetched, got {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Check the name and the connection, or write the path of a local copy."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint; CheckpointError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. A checkpoint needs it. Point `path` at the directory that holds it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON, got {error}. Copy the file again from its source.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}. Copy the file again from its source.")
    return value


def tensor_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) and Path(name).name == name for name in weights.values()):
            raise CheckpointError(
                f"{index} must map tensors to file names beside it, got {str(weights):.80}. Copy the file again from its source."
            )
        return [directory / name for name in sorted(set(weights.values()))]
    return [directory / f"{stem}.safetensors"]


def stream(directory: Path, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, one at a time."""
    for file in tensor_files(directory, stem):
        if not file.exists():
            raise CheckpointError(
                f"{file} is missing. The weights are expected there as safetensors (pickled weights are never read). "
                "Copy the file, or convert the checkpoint to safetensors."
            )
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged, got {error}. The download may be incomplete. Copy the file again.") from error


def _fill(model: nn.Module, directory: Path, family: Family) -> None:
    targets = dict(model.named_parameters())
    waiting = set(targets)
    unknown = []
    for key, value in stream(directory):
        name = family.native_tensor(key)
        if name is None or name not in targets:
            unknown.append(key)
            continue
        target = targets[name]
        if target.shape != value.shape:
            raise CheckpointError(
                f"{key} has shape {tuple(value.shape)}, config.json asks for {tuple(target.shape)}. Weights and config belong to different "
                "models. Use the config.json that came with the weights."
            )
        target.data.copy_(value)
        waiting.discard(name)
    if unknown or waiting:
        raise CheckpointError(
            f"the checkpoint in {directory} does not fit its config.json, got {len(unknown)} unknown tensors ({', '.join(unknown[:3])}) "
            f"and {len(waiting)} missing ones ({', '.join(sorted(waiting)[:3])}). Use the config.json that came with the weights."
        )


def merge_adapter(model: Transformer, directory: Path, family: Family) -> None:
    """W += alpha / r * B A for every LoRA pair of a PEFT directory, accumulated in float32 (or wider), then cast."""
    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise CheckpointError(
            f"{directory / 'adapter_config.json'} is no plain LoRA adapter, got peft_type={config.get('peft_type')!r}, "
            f"use_dora={config.get('use_dora')}, bias={config.get('bias')!r}, modules_to_save={config.get('modules_to_save')}. "
            "Only W + scale * B A can be merged. Train with LoRA, bias none."
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in stream(directory, "adapter_model"):
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        halves.setdefault(module, {})[half] = value
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not halves:
        raise CheckpointError(f"{directory} holds no LoRA tensors. Nothing would change. Point `adapter` at a trained adapter.")
    for module, pair in halves.items():
        # The package's own adapters use our names whatever family the base model came from.
        name = module if module in modules else family.native_module(module)
        if name is None or name not in modules or set(pair) != {"lora_A", "lora_B"}:
            raise CheckpointError(
                f"the adapter's module {module!r} ({', '.join(sorted(pair))}) matches nothing in the model. It belongs to another base "
                f"model. Modules here: {', '.join(sorted({key.rpartition('.')[2] for key in modules}))}."
            )
        weight = modules[name].weight
        down, up = pair["lora_A"], pair["lora_B"]
        if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1]:
            raise CheckpointError(
                f"the adapter's {module} has shape {up.shape[0]} x {down.shape[1]}, the model's {tuple(weight.shape)}. It belongs to "
                "another base model. Use the adapter's own base model."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = up.to(weight.device, wide) @ down.to(weight.device, wide) * _scale(config, module, down.shape[0])
        weight.data.copy_(weight.to(wide) + delta)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith("." + pattern):
            alpha = value
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _tokenizer(directory: Path) -> Any:
    if not (directory / "tokenizer.json").exists():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory))
