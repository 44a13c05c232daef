"""One Triton kernel for few rows of activations against 8-bit weights. Optional: ops/eight_bit.py has the same formulas in PyTorch.

    y[m, n] = scale[n] (own[m]) sum_k x[m, k] w[n, k]        x bf16 (weights only), or e4m3 with its scales `own`

With 16 to 128 rows such a product is a walk over the weights, so what counts is to read each of them once, 8 bits wide, with enough loads
in flight. Three choices follow. The operands are exchanged: weights are the left one, because its rows fill an instruction of the tensor
cores (64 of them) and it may come from registers, where 8 bits become bf16. One program reads BLOCK_N rows of weights over a part of K, and
K is cut until there are a few programs for each multiprocessor. The parts are summed after, in order and not by atomics: a decode must
repeat itself bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-not-found]  # PyTorch brings it for CUDA only
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How the work is cut. outputs: rows of weights of a program; inputs: of K in one step; warps, stages: of Triton."""

    outputs: int = 64
    inputs: int = 128
    warps: int = 4
    stages: int = 4


TILES = (Tile(), Tile(inputs=256, stages=3), Tile(outputs=128, warps=8), Tile(outputs=128, warps=4, stages=3), Tile(outputs=32, inputs=256))
"""Worth measuring. The first is used."""
PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def _kernel(
    x, weight, scale, own, out,
    rows, outputs, inputs, part,
    WEIGHTS_ONLY: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip  # no annotations: Triton reads them as types
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * part + tl.arange(0, BLOCK_K)
    here, live = n < outputs, m < rows
    weights = weight + n.to(tl.int64)[:, None] * inputs + k[None, :]
    lanes = x + m[None, :] * inputs + k[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(0, part, BLOCK_K):
        left = tl.load(weights, mask=here[:, None], other=0.0)
        right = tl.load(lanes, mask=live[None, :], other=0.0)
        if WEIGHTS_ONLY:
            left = left.to(right.dtype)
        total = tl.dot(left, right, total)
        weights += BLOCK_K
        lanes += BLOCK_K
    if PARTS == 1:
        total = total * tl.load(scale + n, mask=here, other=0.0)[:, None]
        if not WEIGHTS_ONLY:
            total = total * tl.load(own + m, mask=live, other=0.0)[None, :]
    place = (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * outputs + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=here[:, None] & live[None, :])


def product(
    x: Tensor, weight: Tensor, scale: Tensor, own: Tensor | None, dtype: torch.dtype, tile: Tile = TILES[0], parts: int | None = None
) -> Tensor:
    """x [M, K] (bf16, or e4m3 with scales own [M, 1]) times weight [N, K] (int8 or e4m3) with scale [N], as [M, N] of `dtype`.

    K must be a multiple of tile.inputs. parts: into how many K is cut; None: as many as keep an H100 busy.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    parts = cuts(outputs, inputs, tile) if parts is None else parts
    if inputs % (tile.inputs * parts):
        raise ValueError(f"the inner width must be a multiple of {tile.inputs * parts}, got {inputs}. A step of the kernel reads so many.")
    block = min(max(16, 1 << (rows - 1).bit_length()), 128)
    made = torch.empty(parts, rows, outputs, dtype=dtype if parts == 1 else torch.float32, device=x.device)
    grid = (-(-outputs // tile.outputs), parts, -(-rows // block))
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    _kernel[grid](  # type: ignore[index]  # what the decorator makes of it takes a grid
        x.contiguous(), weight, scale, scale if own is None else own, made, rows, outputs, inputs, inputs // parts,
        WEIGHTS_ONLY=own is None, PARTS=parts, BLOCK_M=block, BLOCK_N=tile.outputs, BLOCK_K=tile.inputs, **options,
    )  # fmt: skip
    if parts == 1:
        return made[0]
    whole = made.sum(0) * scale
    return (whole if own is None else whole * own).to(dtype)


def cuts(outputs: int, inputs: int, tile: Tile) -> int:
    """Into how many parts K is cut: doubled until there are `PROGRAMS` programs or a part would be shorter than four steps."""
    parts, steps, programs = 1, inputs // tile.inputs, -(-outputs // tile.outputs)
    while programs * parts < PROGRAMS and steps % (2 * parts) == 0 and steps // (2 * parts) >= 4:
        parts *= 2
    return parts
