"""LoRA through PEFT: inject adapters, switch them off for the teacher, save them as PEFT does.

The adapter is injected into the Transformer itself (no wrapper), so `model.logits`, decoding and `model.spec` stay what they are. One
set of weights serves as teacher (adapter off) and student (adapter on).

Reference: LoRA (arXiv 2106.09685); D2F trains r = alpha = 32 on the attention projections.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer


class LoraError(ToolkitError):
    """An adapter that does not fit the model."""


@dataclass(frozen=True)
class Lora:
    """Rank, scale (alpha / rank), dropout, and the names of the linear modules to adapt (last part of their path).

    frozen: precision of the weights that are not trained, teacher's and student's; 8B weights are 32 GB in float32 and 16 in bfloat16.
    The adapter is float32 in either case: its updates are below what bfloat16 can add.
    """

    rank: int = 32
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    frozen: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraError(f"rank must be at least 1, got {self.rank}. It is the inner width of the adapter. Write rank: 32.")
        if not 0 <= self.dropout < 1:
            raise LoraError(f"dropout must lie in [0, 1), got {self.dropout}. It is a probability. Write dropout: 0.0.")
        if not self.alpha > 0:
            raise LoraError(f"alpha must be above 0, got {self.alpha}. The adapter is scaled by alpha / rank. Write alpha: {self.rank}.")
        if not self.targets:
            raise LoraError("targets is empty, so nothing would be trained. Write targets: [q_proj, k_proj, v_proj, o_proj].")


def inject(model: Transformer, lora: Lora, base: str = "") -> Transformer:
    """Freeze `model`, add adapters to the linear modules named by `lora.targets`, and return it. Changes in place.

    The adapters are float32, or wider where the model is; the model's own weights stay in the precision that they have.
    `base`: path or name of the frozen checkpoint, for adapter_config.json. Raises LoraError for a target that matches no linear module.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    missing = [target for target in lora.targets if target not in linear]
    if missing:
        raise LoraError(
            f"LoRA targets match no linear module, got {missing}. An adapter must sit on modules that exist. Write targets out of {linear}."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it; fractions are fine
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        base_model_name_or_path=base,
        inference_mode=False,
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    model._lora = config  # type: ignore[assignment]  # read back by save_adapter
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether `inject` was called on `model`."""
    return getattr(model, "_lora", None) is not None


def _adapted(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the frozen base: the teacher. Raises LoraError if there is no adapter to switch off."""
    if not has_adapter(model):
        raise LoraError(
            "distillation needs a teacher and a student in one model, got a model without an adapter. The teacher is the model with its "
            "adapter off. Write lora: {rank: 32} in the recipe, or self_align: false to train on the true tokens."
        )
    layers = _adapted(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: Transformer, directory: str | Path, *, attention: str, block_size: int | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does, and student.json with the student's attention rule.

    Keys are base_model.model.<module path>.lora_A.weight and .lora_B.weight, float32.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not has_adapter(model):
        raise LoraError("there is no adapter to save, got a model without one. Call inject(model, Lora(...)) before training.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": value.detach().float().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = model._lora.to_dict()  # type: ignore[union-attr,operator]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain["inference_mode"] = True
    (directory / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")
    student = {"attention": attention, "block_size": block_size}
    (directory / "student.json").write_text(json.dumps(student, indent=2) + "\n", encoding="utf-8")
