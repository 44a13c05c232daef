"""What a training checkpoint holds: what is trained, and a digest of what it was trained on.

Weights that stay frozen (everything but a LoRA adapter) are the same in every checkpoint of a run, 16 GB of an 8B model in bfloat16. They
are left out: the run builds them from its recipe, as it did at first, and is refused if they are not the same. A checkpoint that holds
them, written before they were left out, still loads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dllm_toolkit.training.shared import TrainError


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are not trained, by name; under each of their names, where layers share them."""
    return {name: one.detach() for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}


def digest(weights: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over names, types, shapes and bytes; None of no weights. Cores share the work: 16 GB are read once."""

    def one(name: str) -> bytes:
        value = weights[name]
        data = value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        return hashlib.sha256(f"{name} {value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()}".encode()).digest()

    if not weights:
        return None
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        return hashlib.sha256(b"".join(pool.map(one, sorted(weights)))).hexdigest()


def keep_what_is_trained(module: pl.LightningModule) -> None:
    """Leave the frozen weights of `module.model` out of checkpoints of `module`, under every strategy, and before shards are gathered."""
    assert isinstance(module.model, nn.Module)
    names = [f"model.{name}" for name in frozen(module.model)]

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in names:
            state.pop(prefix + name, None)

    if names:
        module.register_state_dict_post_hook(leave_out)
        module.strict_loading = False  # `resumed` has looked at the names


def resumed(path: Path | None, model: nn.Module, base: str | None) -> int | None:
    """The step at which a run of `model`, whose frozen weights have the digest `base`, resumes from `path`; None without a checkpoint.

    Raises TrainError if the file is no checkpoint, holds other weights than are trained, or was trained on another base.
    """
    if path is None:
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, weights, own = int(found["global_step"]), found["state_dict"], found["dllm_toolkit"]
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, UnpicklingError) as error:
        raise TrainError(
            f"{path} cannot be resumed from, got {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}. "
            "It is no checkpoint of a training run, or one that was cut off. Write another output:, or delete the file."
        ) from error
    fixed, shown = frozen(model), {name.removeprefix("model."): value for name, value in weights.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - shown.keys()):
        raise TrainError(
            f"{path} does not hold what is trained, got {len(shown)} weights without {missing[0]} ({len(missing)} are missing). Another "
            "version of the code, or of PEFT, named them otherwise. Write another output:, or delete the file."
        )
    # Before frozen weights were left out there was no digest, and the file itself says what they were.
    held = own.get("base") or digest({name: shown[name] for name in fixed if name in shown})
    if held != base:
        raise TrainError(
            f"{path} was trained on another base, got digest {str(base)[:12]} where it has {str(held)[:12]}. The adapter fits the frozen "
            "weights that it was trained with, and only those. Give the recipe's model the weights of before, or write another output:."
        )
    return step + 1
