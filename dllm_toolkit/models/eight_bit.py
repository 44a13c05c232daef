"""A model whose linear maps keep their weights in 8 bits: half the memory of bf16, and half the bytes that a forward has to read.

    load("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16", device="cuda", weights="fp8")
    quantise(model, "int8")                                 the same for a model in memory; changes it in place

Embeddings and norms stay as they are: a forward reads a few rows of them. The formats and their products are in ops/eight_bit.py. For
decoding only: such a model is neither trained nor saved, since rounding is for good. Keep the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllm_toolkit.ops import eight_bit
from dllm_toolkit.ops.eight_bit import EightBitError, Format

if TYPE_CHECKING:
    from dllm_toolkit.models.transformer import Transformer

Weights = Literal["fp8", "int8"]


class QuantisedLinear(nn.Module):
    """y = x W^T + b with W in 8 bits. Has no parameters.

    bits [outputs, inputs]: the numbers as bytes; scale [outputs] float32; bias [outputs] in the activations' type, or None. format: see
    ops/eight_bit.py. kernel: a name in `eight_bit.KERNELS`, or None for the best that the device has.
    """

    bits: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"] | None, format: Format, kernel: str | None = None) -> None:
        super().__init__()
        if format not in eight_bit.FORMATS:
            raise EightBitError(f"weights must be fp8 or int8, got {format!r}. They name a format of 8 bits. Write weights: fp8.")
        if kernel is not None and kernel not in eight_bit.KERNELS:
            raise EightBitError(f"unknown kernel, got {kernel!r}. Write one of {', '.join(eight_bit.KERNELS)}, or None for the best here.")
        numbers, scale = eight_bit.quantise(weight.detach(), format)
        if not scale.isfinite().all():
            raise EightBitError(
                f"the weights hold NaN or infinity, got a matrix of {tuple(weight.shape)}. No scale fits them. Use a checkpoint whose "
                "weights are finite."
            )
        self.format: Format = format
        self.kernel = kernel
        self.out_features, self.in_features = weight.shape
        # As bytes: `model.to(dtype)` casts every floating-point buffer, and float8 counts as one.
        self.register_buffer("bits", numbers.view(torch.uint8))
        self.register_buffer("scale", scale.squeeze(-1))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._choose()

    def _choose(self) -> None:
        """Which kernel there is where the weights are now: known before a forward is compiled."""
        self.best = eight_bit.best_on(self.format, self.bits.device, self.out_features, self.in_features)

    @classmethod
    def fused(cls, modules: Sequence[nn.Linear | QuantisedLinear], format: Format, kernel: str | None = None) -> QuantisedLinear:
        """One map for several that read the same input: their outputs one after the other, the very numbers that each has alone."""
        widths = {module.in_features for module in modules}
        biased = {module.bias is not None for module in modules}
        formats = {module.format for module in modules if isinstance(module, QuantisedLinear)}
        if len(widths) != 1 or len(biased) != 1 or not formats <= {format}:
            raise EightBitError(
                f"maps that are fused read one input, have a bias or have none, and are {format}, got input widths {sorted(widths)}, "
                f"biases {sorted(biased)} and formats {sorted(formats)}. Their outputs are one product. Fuse those that fit."
            )
        each = [module if isinstance(module, QuantisedLinear) else cls(module.weight, module.bias, format) for module in modules]
        whole = cls(torch.empty(0, each[0].in_features, device=each[0].bits.device), None, format, kernel)
        whole.bits, whole.scale = torch.cat([one.bits for one in each]), torch.cat([one.scale for one in each])
        whole.bias = torch.cat([one.bias for one in each if one.bias is not None]) if biased == {True} else None
        whole.out_features = whole.bits.shape[0]
        whole._choose()
        return whole

    @property
    def numbers(self) -> Tensor:
        """The weights' numbers [N, K] in their own type."""
        return self.bits.view(eight_bit.DTYPES[self.format])

    @property
    def weight(self) -> Float[Tensor, "N K"]:
        """The weights that this map stands for, in float32. A new tensor."""
        return eight_bit.dequantise(self.numbers, self.scale.unsqueeze(-1))

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        if x.requires_grad and torch.is_grad_enabled():
            raise EightBitError(
                f"8-bit weights cannot be trained through, got activations that want gradients with weights: {self.format}. Rounding has "
                "none. Load the model without weights:, or decode under torch.inference_mode()."
            )
        flat = x.reshape(-1, self.in_features)
        product = eight_bit.choose(self.format, flat, self.best) if self.kernel is None else eight_bit.KERNELS[self.kernel]
        y = product(flat, self.numbers, self.scale)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Move and cast as usual, but keep the scales in float32: rounded to bf16 they would move every weight."""
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = before.to(self.scale.device)
        self._choose()
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}"


def quantise(
    model: Transformer, weights: Weights, *, head: bool = True, device: torch.device | str | None = None, kernel: str | None = None
) -> Transformer:
    """Keep the linear maps of a model in 8 bits from now on. Changes in place, one map after the other, and returns the model.

    head: also the LM head, which reads as many bytes as three layers of an 8B model. device: where the model goes meanwhile; its full
    weights never all stand there. Raises EightBitError for a model with an adapter that is not merged, or that is in 8 bits already.
    """
    _check(model)
    where = model.device if device is None else torch.device(device)
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, module in list(parent.named_children()):
                if not isinstance(module, nn.Linear) or (module is model.lm_head and not head):
                    continue
                bias = None if module.bias is None else module.bias.to(where)
                setattr(parent, name, QuantisedLinear(module.weight.to(where), bias, weights, kernel))
                del module  # before the next one is made: at most one weight stands there twice
        if head and model.config.tie_embeddings:  # they are two matrices now
            from dataclasses import replace

            model.config = replace(model.config, tie_embeddings=False)
        return model.to(where)


def check_weights(weights: str | None, head: bool, merged: bool) -> None:
    """Do these arguments of `load` fit each other? Asked before a file is opened. Raises EightBitError."""
    if weights is not None and weights not in eight_bit.FORMATS:
        raise EightBitError(f"weights must be fp8 or int8, got {weights!r}. They name a format of 8 bits. Write weights: fp8, or nothing.")
    if weights is None and not head:
        raise EightBitError(
            "quantise_head: false leaves the LM head out of the 8 bits, got no weights:. Nothing is kept in 8 bits. Write weights: fp8 "
            "too, or leave it out."
        )
    if weights is not None and not merged:
        raise EightBitError(
            f"an adapter beside the weights needs them exact, got weights: {weights} with merge_adapter: false. It would be trained on "
            "top of rounded ones. Write merge_adapter: true, or leave weights: out."
        )


def _check(model: Transformer) -> None:
    format = format_of(model)
    if format is not None:
        raise EightBitError(f"the model is in 8 bits already, got {format} weights. Rounding twice would lose more. Load it anew.")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise EightBitError(
            "the model carries an adapter that is not merged, got LoRA tensors beside the weights. It was trained beside exact weights. "
            "Load it with merge_adapter: true."
        )


def format_of(model: nn.Module) -> Format | None:
    """The 8-bit format of a model's linear maps; None if it has none."""
    return next((module.format for module in model.modules() if isinstance(module, QuantisedLinear)), None)


def eight_bit_memory(model: nn.Module, dtype: torch.dtype, head: bool = True) -> int:
    """Bytes that a model will need with its linear maps in 8 bits and the rest in `dtype`, buffers included. Works on the meta device."""
    tied = _tied(model)
    narrow = {
        id(module.weight): module for name, module in model.named_modules() if isinstance(module, nn.Linear) and (head or name != "lm_head")
    }
    bits = sum(math.prod(module.weight.shape) + 4 * module.out_features for module in narrow.values())
    rest = sum(one.numel() for one in model.parameters() if id(one) not in narrow or one is tied) * dtype.itemsize
    return bits + rest + sum(one.numel() * one.element_size() for one in model.buffers())


def _tied(model: nn.Module) -> Any:
    """The embeddings' weight, if it is the head's too: it stays beside the head's 8 bits."""
    embed, head = getattr(model, "embed", None), getattr(model, "lm_head", None)
    return embed.weight if isinstance(embed, nn.Embedding) and isinstance(head, nn.Linear) and embed.weight is head.weight else None
