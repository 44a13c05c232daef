"""The policy as rollouts are decoded by it: the model itself, or a copy in another precision whose weights follow it.

Rollouts are forwards without gradients, most of the cost of a small model's iteration, and bfloat16 halves them. The copy's weights are
written in place, so graphs that a compiled decode recorded on it stay valid. An adapter is merged into the copy: one product a map.

A copy rounds (by up to 2^-9 of a weight), so answers are sampled from a policy close to the one that learns, not equal to it. Old, current
and reference scores all come from the model itself: ratios are exact, 1 before the first update, and so is the gradient of the surrogate.
What is left out is the weight p(token | model) / p(token | copy) of a sampled token, which is 1 on average.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.training.lora import has_adapter

Precision = Literal["float32", "bfloat16"]


class Sampler:
    """What decodes for `model`. precision None: the model itself, beside its adapter where it has one.

    A copy is made only where it differs: in another precision, or with an adapter to merge.
    """

    def __init__(self, model: Transformer, precision: Precision | None) -> None:
        self.model = model
        self.dtype = model.dtype if precision is None else getattr(torch, precision)
        self.copies = precision is not None and (self.dtype != model.dtype or has_adapter(model))
        self._copy: Transformer | None = None

    @torch.no_grad()
    def follow(self) -> Transformer:
        """The model that decodes, with the present weights. The same object each time, its weights where they were."""
        if not self.copies:
            return self.model
        if self._copy is None or self._copy.device != self.model.device:
            self._copy = twin(self.model, self.dtype)
        for name, target in self._copy.named_parameters():
            target.copy_(merged(self.model, name))
        return self._copy


def twin(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A model of the same form without adapters, its weights not yet filled. Embedding and head are apart: one of them may be adapted."""
    with torch.device("meta"):
        made = Transformer(replace(model.config, tie_embeddings=False))
    made.tokenizer = model.tokenizer
    return made.allocate(dtype, model.device).eval().requires_grad_(False)


def merged(model: Transformer, name: str) -> Tensor:
    """The parameter of this name, with what adapters add to it."""
    path, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(path)
    value = getattr(module, kind)
    if kind == "weight" and hasattr(module, "get_delta_weight"):  # PEFT's layer, around the map that it adapts
        value = value + sum(module.get_delta_weight(one) for one in module.lora_A)
    return value
