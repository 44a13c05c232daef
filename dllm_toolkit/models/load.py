"""Loading checkpoints: a directory, a hub id, a GGUF file, or a model that ships with the package; LoRA adapters merged or beside it.

    load("asset:teacher")                                    the shipped tiny bidirectional model
    load("asset:teacher", adapter="asset:d2f")               its D2F student: adapter merged, block-causal attention
    load("GSAI-ML/LLaDA-8B-Instruct", adapter="...", attention="block_causal", dtype="bfloat16", device="cuda")

Everything that can be wrong is found before anything is allocated: files, names and shapes from the headers, the adapter, the device, the
memory. Then the model is built empty on the device and every byte is read once, straight into it (models/weights.py). Nothing but
safetensors and JSON is read and no code of a checkpoint ever runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dllm_toolkit.models import adapters
from dllm_toolkit.models.eight_bit import Weights, check_weights, quantise
from dllm_toolkit.models.families import CheckpointError, Family, family_of
from dllm_toolkit.models.gguf import gguf_file, read_gguf
from dllm_toolkit.models.hub import resolve
from dllm_toolkit.models.memory import check_device, check_dtype, check_memory, staging
from dllm_toolkit.models.save import OVERRIDES, Origin
from dllm_toolkit.models.tokens import load_tokenizer, special_ids
from dllm_toolkit.models.transformer import ModelError, Transformer, TransformerConfig
from dllm_toolkit.models.weights import Stored, read_into, read_json, stored_tensors
from dllm_toolkit.registry import register
from dllm_toolkit.types import Attention

__all__ = ["CheckpointError", "load", "resolve"]

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]


@register("model", "load")
def load(
    path: str,
    adapter: str | None = None,
    attention: Attention | None = None,
    block_size: int | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    revision: str | None = None,
    merge_adapter: bool = True,
    mask_id: int | None = None,
    weights: Weights | None = None,
    quantise_head: bool = True,
) -> Transformer:
    """A pretrained model, ready to decode.

    path: a directory, a hub id, a .gguf file, or `asset:NAME`. revision: branch, tag or commit of the hub id.
    adapter: the same for a PEFT LoRA adapter; merged in float32, or with merge_adapter false kept apart and trainable.
    attention, block_size: decode under another attention rule than the checkpoint's own; an adapter's student.json sets them too.
    dtype: `auto` is the one that most of the weights are stored in. device: `auto` takes CUDA when there is one.
    mask_id: the mask token, for a checkpoint whose files name none.
    weights: keep the linear maps in 8 bits, `fp8` or `int8` (models/eight_bit.py), and everything else in dtype; for decoding only.
    quantise_head: the LM head too. Raises CheckpointError, and EightBitError for what 8 bits do not go with.
    """
    check_weights(weights, quantise_head, adapter is None or merge_adapter)
    where = check_device(device)
    checkpoint = _open(path, revision, mask_id)
    adapter_directory = None if adapter is None else resolve(adapter, None, "adapter")
    rule = {} if adapter_directory is None else adapters.student_rule(adapter_directory)
    attention = attention if attention is not None else rule.get("attention")
    block_size = block_size if block_size is not None else rule.get("block_size")
    model = _empty_model(checkpoint, attention, block_size)
    pairs = _match(checkpoint, model)
    lora = None if adapter_directory is None else adapters.open_adapter(adapter_directory, model, checkpoint.family)

    wanted = _stored_dtype(checkpoint) if dtype == "auto" else getattr(torch, dtype)
    check_dtype(wanted, where)
    filled = where if weights is None else staging(model, wanted, where, quantise_head)
    check_memory(model, wanted, filled)
    model.allocate(wanted, filled)
    _fill(checkpoint, model, pairs)

    model.tokenizer = checkpoint.tokenizer
    model.origin = Origin(checkpoint.family, checkpoint.config, checkpoint.settings, checkpoint.generation)
    model.requires_grad_(False)
    if lora is not None and merge_adapter:
        adapters.merge(model, lora)
    elif lora is not None:
        adapters.attach(model, lora, path)
    if weights is not None:
        quantise(model, weights, head=quantise_head, device=where)
    return model.eval()


@dataclass(frozen=True)
class _Checkpoint:
    """What is known of a checkpoint before its weights are read. tensors: by their names in the files; still on disk, but for GGUF."""

    where: Path
    family: Family
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    generation: Mapping[str, Any]
    settings: TransformerConfig
    tensors: Mapping[str, Stored] | Mapping[str, Tensor]
    tokenizer: Any


def _open(path: str, revision: str | None, mask_id: int | None) -> _Checkpoint:
    file = gguf_file(path)
    if file is not None:
        config, tensors, tokenizer = read_gguf(file)
        where, generation, overrides, family = file, {}, {}, family_of(config)
    else:
        where = resolve(path, revision)
        config = read_json(where / "config.json")
        overrides = config.pop(OVERRIDES, {})
        family = family_of(config)
        _refuse_quantised(where, config)
        tensors = stored_tensors(where)
        generation = read_json(where / "generation_config.json") if (where / "generation_config.json").exists() else {}
        tokenizer = load_tokenizer(where)
    with _building(where):
        if family.name == "native":  # its config.json holds the ids itself
            special = special_ids({"eos_token_id": config.get("eos_ids", 0)}, {}, None, mask_id)
        else:
            special = special_ids(config, generation, tokenizer, mask_id)
        settings = family.configure(config, special)
    return _Checkpoint(where, family, config, overrides, generation, settings, tensors, tokenizer)


def _refuse_quantised(where: Path, config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where} is quantised, got quantization_config {str(config['quantization_config']):.80}. Its weights need code of their own. "
            "Use the checkpoint that is not quantised."
        )


@contextmanager
def _building(where: Path) -> Iterator[None]:
    """Whatever a damaged config.json makes the builders stumble over becomes one message."""
    try:
        yield
    except CheckpointError:
        raise
    except (ModelError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            f"{where / 'config.json'} describes no model that can be built, got: {error} "
            "Use the config.json that came with the weights."
        ) from error


def _empty_model(checkpoint: _Checkpoint, attention: Attention | None, block_size: int | None) -> Transformer:
    """The model on the meta device: names and shapes, no memory."""
    settings = checkpoint.settings
    asked = {"attention": attention, "block_size": block_size}
    changes = {**checkpoint.overrides, **{name: value for name, value in asked.items() if value is not None}}
    with _building(checkpoint.where), torch.device("meta"), _Uninitialised():
        return Transformer(replace(settings, **changes))


class _Uninitialised(TorchFunctionMode):
    """Skips torch.nn.init: there is nothing to initialise on the meta device, and its random functions import half of torch.compile."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _match(checkpoint: _Checkpoint, model: Transformer) -> dict[str, str]:
    """Our name of every parameter -> its key in the files; CheckpointError unless names and shapes fit one to one."""
    wanted = dict(model.named_parameters())
    pairs: dict[str, str] = {}
    unknown = []
    for key, stored in checkpoint.tensors.items():
        name = checkpoint.family.native_tensor(key)
        if checkpoint.family.ignores(key) or (name == "lm_head.weight" and model.config.tie_embeddings):
            continue
        if name is None or name not in wanted:
            unknown.append(key)
            continue
        if tuple(wanted[name].shape) != tuple(stored.shape):
            raise CheckpointError(
                f"{key} has shape {tuple(stored.shape)}, config.json asks for {tuple(wanted[name].shape)}. Weights and config belong to "
                "different models. Use the config.json that came with the weights."
            )
        pairs[name] = key
    waiting = sorted(wanted.keys() - pairs.keys())
    if unknown or waiting:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.where} does not fit its config.json, got {len(unknown)} unknown tensors "
            f"({', '.join(unknown[:3])}) and {len(waiting)} missing ones ({', '.join(waiting[:3])}). "
            "Use the config.json that came with the weights."
        )
    return pairs


def _stored_dtype(checkpoint: _Checkpoint) -> torch.dtype:
    """The dtype of most of the weights."""
    share: dict[torch.dtype, int] = {}
    for stored in checkpoint.tensors.values():
        share[stored.dtype] = share.get(stored.dtype, 0) + math.prod(stored.shape)
    return max(share, key=lambda dtype: share[dtype])


def _fill(checkpoint: _Checkpoint, model: Transformer, pairs: Mapping[str, str]) -> None:
    jobs = []
    for name, parameter in model.named_parameters():
        source = checkpoint.tensors[pairs[name]]
        if isinstance(source, Tensor):
            parameter.data.copy_(source)
        else:
            jobs.append((source, parameter.data))
    read_into(jobs)
