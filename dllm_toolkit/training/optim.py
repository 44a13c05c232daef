"""Optimisers and learning-rate schedules as recipe components.

An optimiser needs parameters and a schedule needs to know how far the run is, so both are frozen descriptions that are asked later.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.registry import declare, register


class OptimizerRecipe(abc.ABC):
    """Builds a torch optimiser for named parameters."""

    @abc.abstractmethod
    def build(self, parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device) -> torch.optim.Optimizer:
        """The optimiser over the trainable ones of `parameters`."""

    def begin(self, parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device) -> torch.optim.Optimizer:
        """`build`, with each group's rate kept where `LearningRate.set` finds it."""
        optimizer = self.build(parameters, device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer


class LearningRate(abc.ABC):
    """A factor on the optimiser's learning rate."""

    @abc.abstractmethod
    def factor(self, step: int, progress: float) -> float:
        """Factor for optimiser step `step` (from 0) when a share `progress` in [0, 1] of the run is over."""

    def set(self, optimizer: Any, step: int, progress: float) -> None:
        """Give the groups of an optimiser their rates for this step."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(step, progress)


declare("optimizer", OptimizerRecipe)
declare("lr_schedule", LearningRate)


@register("optimizer", "adamw")
@dataclass(frozen=True)
class AdamW(OptimizerRecipe):
    """AdamW; weight decay on matrices only (not on norms and biases), fused on CUDA."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ToolkitError(
                f"learning_rate must be above 0, got {self.learning_rate}. Nothing would be learned. Write learning_rate: 1e-3."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ToolkitError(f"betas must lie in [0, 1), got {list(self.betas)}. They are shares. Write betas: [0.9, 0.95].")
        for name, example in (("weight_decay", 0.0), ("eps", 1e-8)):
            if getattr(self, name) < 0:
                raise ToolkitError(f"{name} must be 0 or more, got {getattr(self, name)}. Write {name}: {example}.")

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device) -> torch.optim.Optimizer:
        trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=device.type == "cuda",
        )


def _check_warmup(steps: int) -> None:
    if steps < 0:
        raise ToolkitError(f"warmup_steps must be 0 or more, got {steps}. It counts optimiser steps. Write warmup_steps: 0.")


def _warm(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


@register("lr_schedule", "constant")
@dataclass(frozen=True)
class Constant(LearningRate):
    """Linear warm-up, then 1."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def factor(self, step: int, progress: float) -> float:
        return _warm(step, self.warmup_steps)


@register("lr_schedule", "cosine")
@dataclass(frozen=True)
class Cosine(LearningRate):
    """Linear warm-up, then half a cosine from 1 to `final` over the run's progress (steps or time, whichever is further)."""

    warmup_steps: int = 200
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        if self.final < 0:
            raise ToolkitError(f"final must be 0 or more, got {self.final}. It is a share of the learning rate. Write final: 0.0.")

    def factor(self, step: int, progress: float) -> float:
        curve = self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return _warm(step, self.warmup_steps) * curve
