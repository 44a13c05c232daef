"""PEFT LoRA directories: merged into the weights, or kept apart for further training.

Checked against the model's module names and shapes before any weight is read. Adapters of the original checkpoints (`attn_out`,
`self_attn.q_proj`, ...) and adapters that were trained here (our own names) are both understood.

Reference: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_toolkit.models.families.base import CheckpointError, Family
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.models.weights import Stored, read, read_json, stored_tensors


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits: for each of our module paths its two halves on disk and its scale."""

    directory: Path
    config: Mapping[str, Any]
    student: Mapping[str, Any]
    halves: Mapping[str, tuple[Stored, Stored]]  # module -> (A [rank, in], B [out, rank])
    scales: Mapping[str, float]


def student_rule(directory: Path) -> dict[str, Any]:
    """The attention rule that the adapter was trained for (student.json beside it): {} if it does not say."""
    file = directory / "student.json"
    return read_json(file) if file.exists() else {}


def open_adapter(directory: Path, model: nn.Module, family: Family) -> Adapter:
    """Read an adapter's headers and check that every part of it fits the model (which may be on the meta device)."""
    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise CheckpointError(
            f"{directory / 'adapter_config.json'} is no plain LoRA adapter, got peft_type={config.get('peft_type')!r}, "
            f"use_dora={config.get('use_dora')}, bias={config.get('bias')!r}, modules_to_save={config.get('modules_to_save')}. "
            "Only W + scale * B A can be merged. Train with LoRA, bias none."
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _check_targets(config.get("target_modules"), linear, family)
    pairs: dict[str, dict[str, Stored]] = {}
    for key, stored in stored_tensors(directory, "adapter_model").items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        pairs.setdefault(module, {})[half] = stored
    if not pairs:
        raise CheckpointError(f"{directory} holds no LoRA tensors. Nothing would change. Point `adapter` at a trained adapter.")
    halves, scales = {}, {}
    for module, pair in pairs.items():
        # The package's own adapters use our names whatever family the base model came from.
        name = module if module in linear else family.native_module(module)
        if name is None or name not in linear or set(pair) != {"lora_A", "lora_B"}:
            raise CheckpointError(
                f"the adapter's module {module!r} ({', '.join(sorted(pair))}) matches nothing in the model. It belongs to another base "
                f"model. Modules here: {', '.join(_known(linear, family))}."
            )
        weight, down, up = linear[name].weight, pair["lora_A"], pair["lora_B"]
        if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1] or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"the adapter's {module} has shape {up.shape[0]} x {down.shape[1]}, the model's {tuple(weight.shape)}. It belongs to "
                "another base model. Use the adapter's own base model."
            )
        halves[name] = (down, up)
        scales[name] = _scale(config, module, down.shape[0])
    return Adapter(directory, config, student_rule(directory), halves, scales)


def merge(model: nn.Module, adapter: Adapter) -> None:
    """W += alpha / r * B A for every pair, accumulated in float32 (or wider), then cast to the weight's dtype."""
    for name, (down, up) in adapter.halves.items():
        weight = model.get_parameter(f"{name}.weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = read(up).to(weight.device, wide) @ read(down).to(weight.device, wide) * adapter.scales[name]
        weight.data.copy_(weight.to(wide) + delta)


def attach(model: Transformer, adapter: Adapter, base: str) -> None:
    """Inject the adapter beside the frozen weights, trainable; training.lora.adapter_off and save_adapter work on the result."""
    from peft import LoraConfig, inject_adapter_in_model

    config, ranks = adapter.config, {down.shape[0] for down, _ in adapter.halves.values()}
    if len(ranks) != 1 or config.get("alpha_pattern"):
        raise CheckpointError(
            f"the adapter mixes ranks or scales, got ranks {sorted(ranks)} and alpha_pattern {config.get('alpha_pattern')}. "
            "Training goes on with one rank and one scale. Write merge_adapter: true."
        )
    leaves = {name.rpartition(".")[2] for name in adapter.halves}
    everywhere = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    settings = LoraConfig(
        r=ranks.pop(),
        lora_alpha=config.get("lora_alpha", 8),
        lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=sorted(leaves if everywhere == set(adapter.halves) else adapter.halves),
        bias="none",
        base_model_name_or_path=base,
        inference_mode=False,
    )
    inject_adapter_in_model(settings, model)
    for name, (down, up) in adapter.halves.items():
        module: Any = model.get_submodule(name)
        for half, stored in ((module.lora_A, down), (module.lora_B, up)):
            half["default"].weight.data.copy_(_finite(read(stored), stored))
    model._lora = settings  # type: ignore[assignment]  # where training.lora looks for it


def _finite(value: Tensor, stored: Stored) -> Tensor:
    if not value.isfinite().all():
        raise CheckpointError(
            f"{stored.name} in {stored.file} holds NaN or infinity. Training cannot go on from it. Use an earlier adapter."
        )
    return value


def _known(linear: Mapping[str, nn.Module], family: Family) -> list[str]:
    """Last parts of the module paths that a target may name: the checkpoint's and, where they differ, ours."""
    theirs = [str(family.original_module(name)) for name in linear]
    return sorted({name.rpartition(".")[2] for name in (*theirs, *linear)})


def _check_targets(targets: Any, linear: Mapping[str, nn.Module], family: Family) -> None:
    """PEFT drops target names that match nothing without a word, and the adapter is then less than its config says."""
    if not isinstance(targets, list):  # a regular expression, or absent: the tensors say what is adapted
        return
    modules = [*linear, *(str(family.original_module(name)) for name in linear)]
    missing = [target for target in targets if not any(name == target or name.endswith("." + target) for name in modules)]
    if missing:
        raise CheckpointError(
            f"the adapter's target_modules match nothing in the model, got {missing}. It belongs to another base model. "
            f"Modules here: {', '.join(_known(linear, family))}."
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith("." + pattern):
            alpha = value
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
