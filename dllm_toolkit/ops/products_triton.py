"""One Triton kernel for a product of few lanes in bfloat16 or float16. Optional: ops/parts.py has the same sums in PyTorch.

    y[p, m, n] = sum_{k in part p} x[m, k] w[n, k]              a product in parts, for whoever adds them up anyway
    y[m, n]    = silu(sum_k x[m, k] w[n, k]) sum_k x[m, k] w[N + n, k]        SwiGLU's two maps and what joins them

With 16 to 128 lanes a product is a walk over the weights. As in ops/eight_bit_triton.py weights are the left operand, whose rows fill an
instruction of the tensor cores, and a program reads some rows of them over a part of K. What is read once may leave the cache first; the
lanes, which every program reads, may stay. Joined at once, gates and ups need not be written and read again. Sums are in float32; gate and
up are rounded to the lanes' type before they are joined, as two products would leave them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-not-found]  # PyTorch brings it for CUDA only
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

MOST_LANES = 128


@dataclass(frozen=True)
class Tile:
    """How the work is cut. outputs: rows of weights of a program, of each of the two maps of `gated`; inputs: of K in one step; parts: of
    K; warps, stages: of Triton.
    """

    outputs: int = 64
    inputs: int = 128
    parts: int = 1
    warps: int = 4
    stages: int = 4


def bytes_of_a_stage(tile: Tile, lanes: int, gated: bool) -> int:
    """Shared memory that each of a tile's stages takes: weights of one map or two, and lanes."""
    return 2 * tile.inputs * (tile.outputs * (2 if gated else 1) + padded(lanes))


@torch.compiler.assume_constant_result
def shared_memory(device: int | None) -> int:
    """Bytes of shared memory that a program may have on a GPU; 0 where that is not known."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def padded(lanes: int) -> int:
    """Lanes of a program: a power of two that the tensor cores take."""
    return max(16, 1 << (lanes - 1).bit_length())


@triton.jit
def _kernel(
    x, weight, out,
    rows, outputs, inputs, part, x_row,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip  # no annotations: Triton reads them as types
    """outputs: of one map; with GATED the weights of the second lie behind those of the first."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * part + tl.arange(0, BLOCK_K)
    here, live = n < outputs, m < rows
    weights = weight + n.to(tl.int64)[:, None] * inputs + k[None, :]
    second = weight + (n + outputs).to(tl.int64)[:, None] * inputs + k[None, :]
    lanes = x + m[None, :] * x_row + k[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(0, part, BLOCK_K):
        left = tl.load(weights, mask=here[:, None], other=0.0, eviction_policy="evict_first")
        right = tl.load(lanes, mask=live[None, :], other=0.0, eviction_policy="evict_last")
        total = tl.dot(left, right, total)
        if GATED:
            other = tl.dot(tl.load(second, mask=here[:, None], other=0.0, eviction_policy="evict_first"), right, other)
            second += BLOCK_K
        weights += BLOCK_K
        lanes += BLOCK_K
    if GATED:
        gate = total.to(x.dtype.element_ty).to(tl.float32)
        total = gate / (1 + tl.exp(-gate)) * other.to(x.dtype.element_ty).to(tl.float32)
    place = (tl.program_id(1) * rows + m[None, :]).to(tl.int64) * outputs + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=here[:, None] & live[None, :])


def by_parts(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """x [..., K] times weight [N, K], as terms of a sum [tile.parts, ..., N]: in float32, or one in the type of x. See `_run`."""
    made = _run(x, weight, weight.shape[0], tile, gated=False)
    return made.view(tile.parts, *x.shape[:-1], weight.shape[0])


def gated(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """silu of what the first half of weight [2 N, K] says of x [..., K], times what the second half says, [..., N]. See `_run`."""
    if weight.shape[0] % 2 or tile.parts != 1:
        raise ValueError(
            f"gates and ups are two equal halves in one part, got {weight.shape[0]} rows and {tile.parts} parts. A gate needs its whole "
            "sum. Write parts=1."
        )
    return _run(x, weight, weight.shape[0] // 2, tile, gated=True).view(*x.shape[:-1], weight.shape[0] // 2)


def _run(x: Tensor, weight: Tensor, outputs: int, tile: Tile, gated: bool) -> Tensor:
    """Raises ValueError for more lanes than a program has place for, and for parts that are no whole steps."""
    inputs = weight.shape[1]
    flat = x.reshape(-1, inputs)
    rows = flat.shape[0]
    if rows > MOST_LANES:
        raise ValueError(f"at most {MOST_LANES} lanes, got {rows}. More of them wait for arithmetic: the library's product is faster.")
    if inputs % (tile.inputs * tile.parts):
        raise ValueError(f"K must be a multiple of {tile.inputs * tile.parts}, got {inputs}. A step of a part reads so many.")
    if not weight.is_contiguous() or flat.stride(-1) != 1:
        raise ValueError(
            f"weights and lanes must be dense rows, got strides {weight.stride()} and {flat.stride()}. The kernel reads whole rows. "
            "Write .contiguous()."
        )
    made = torch.empty(tile.parts, rows, outputs, dtype=x.dtype if tile.parts == 1 else torch.float32, device=x.device)
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    _kernel[-(-outputs // tile.outputs), tile.parts](  # type: ignore[index]  # what the decorator makes of it takes a grid
        flat, weight, made, rows, outputs, inputs, inputs // tile.parts, flat.stride(0),
        GATED=gated, BLOCK_M=padded(rows), BLOCK_N=tile.outputs, BLOCK_K=tile.inputs, **options,
    )  # fmt: skip
    return made
