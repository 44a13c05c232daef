"""Linear maps with 8-bit weights: how numbers become 8 bits, and the products that read them.

    fp8     weights and activations in float8 e4m3, a float32 scale for each output row and, made at run time, for each row of activations:
            y = (qx qw^T) sx sw. The tensor cores multiply 8-bit numbers; sums are in float32.
    int8    weights only, a float32 scale for each output row: y = (x qw^T) sw. Activations stay as they are.

A scale is the row's largest magnitude over the largest number of the format (448; 127), so nothing saturates. Rounding is to nearest, ties
to even: |w - q s| <= s / 2 for int8, and <= max(|w| / 16, s / 1024) for fp8 (three bits of mantissa, subnormals 1 / 512 apart).

Every format has a formula in plain PyTorch, exact in its sums to float32 (or wider), which runs anywhere and which tests compare with; and
kernels for CUDA, by name in `KERNELS`. Formats: FP8 Formats for Deep Learning, arXiv 2209.05433; scales for each row, as in LLM.int8(),
arXiv 2208.07339.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from dllm_toolkit.errors import ToolkitError

Format = Literal["fp8", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPES: dict[Format, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
_SMALLEST = 2.0**-100  # of a row's magnitude: a row of zeros has a scale too, whose inverse is finite


class EightBitError(ToolkitError):
    """Weights that cannot be kept in 8 bits, or a product that this machine does not have."""


def quantise(values: Float[Tensor, "*rows K"], format: Format) -> tuple[Shaped[Tensor, "*rows K"], Float32[Tensor, "*rows 1"]]:
    """Numbers of the format and the scale of each row: values ~ numbers * scale, in float32."""
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / LARGEST[format]
    turned = wide / scale
    return (turned if format == "fp8" else turned.round()).to(DTYPES[format]), scale


def dequantise(
    numbers: Shaped[Tensor, "*rows K"], scale: Float32[Tensor, "*rows 1"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows K"]:
    """numbers * scale."""
    return (numbers.float() * scale).to(dtype)


def fp8_formula(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """The product of `fp8` in float32: products of two e4m3 numbers are exact there, their sums as exact as float32 is."""
    narrow, own = quantise(x, "fp8")
    return (F.linear(narrow.float(), weight.float()) * own * scale).to(x.dtype)


def int8_formula(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """The product of weight-only 8 bits in the precision of `x`. Also for e4m3 weights."""
    return (F.linear(x, weight.to(x.dtype)) * scale.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def scaled_mm(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """`fp8` by torch._scaled_mm with row-wise scales: compute capability 8.9 and up, K and N multiples of 16, any M."""
    narrow, own = quantise(x, "fp8")
    made = torch._scaled_mm(narrow, weight.t(), scale_a=own, scale_b=scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True)
    return made.to(x.dtype)


def scaled_mm_whole(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """`fp8` by torch._scaled_mm with one scale for each operand, which is another kernel (cuBLAS); the scales of the rows come after."""
    narrow, own = quantise(x, "fp8")
    one = torch.ones((), dtype=torch.float32, device=x.device)
    made = torch._scaled_mm(narrow, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return (made.float() * own * scale).to(x.dtype)


def int_mm(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """int8 weights and int8 activations by torch._int_mm, which wants more than 16 rows: the formula of `fp8` on another format."""
    narrow, own = quantise(x, "int8")
    rows = narrow.shape[0]
    padded = F.pad(narrow, (0, 0, 0, 32 - rows)) if rows <= 16 else narrow
    return (torch._int_mm(padded, weight.t())[:rows].float() * own * scale).to(x.dtype)


def triton_fp8(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """`fp8` by the Triton kernel of ops/eight_bit_triton.py."""
    from dllm_toolkit.ops.eight_bit_triton import product

    narrow, own = quantise(x, "fp8")
    return product(narrow, weight, scale, own, x.dtype)


def triton_weights(x: Float[Tensor, "M K"], weight: Shaped[Tensor, "N K"], scale: Float32[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """Weight-only 8 bits (int8 or e4m3) by the Triton kernel of ops/eight_bit_triton.py."""
    from dllm_toolkit.ops.eight_bit_triton import product

    return product(x, weight, scale, None, x.dtype)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
KERNELS: dict[str, Product] = {
    "fp8_formula": fp8_formula,
    "int8_formula": int8_formula,
    "scaled_mm": scaled_mm,
    "scaled_mm_whole": scaled_mm_whole,
    "int_mm": int_mm,
    "triton_fp8": triton_fp8,
    "triton_weights": triton_weights,
}
"""Products by name: (x [M, K], weight [N, K], scale [N]) -> [M, N]."""
FORMULAS: dict[Format, Product] = {"fp8": fp8_formula, "int8": int8_formula}
BEST: dict[Format, str] = {"fp8": "scaled_mm", "int8": "triton_weights"}
"""What a format runs on where the device has it; benchmarks/matmul_speed.py measures the candidates."""


def choose(format: Format, x: Float[Tensor, "M K"], best: str | None) -> Product:
    """The kernel `best` for activations that it takes, else the formula. Knows types only, so a compiled graph holds one of them."""
    return FORMULAS[format] if best is None or x.dtype != torch.bfloat16 else KERNELS[best]


def best_on(format: Format, device: torch.device, outputs: int, inputs: int) -> str | None:
    """The kernel of a format for weights [outputs, inputs] on a device, None where there is none. Asks the driver: not in compiled code."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if format == "fp8":
        fits = outputs % 16 == 0 and inputs % 16 == 0 and capability >= (8, 9)
    else:
        fits = inputs % 128 == 0 and capability >= (8, 0) and importlib.util.find_spec("triton") is not None
    return BEST[format] if fits else None
