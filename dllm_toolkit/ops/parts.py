"""A product of few lanes as several, each over a part of its inputs, for whoever adds them up anyway.

    y[n, m] = sum_p  sum_{k in part p} x[n, k] w[m, k]

With 16 to 128 lanes a product waits for the weights, and a map with few outputs has too few tiles to keep all multiprocessors reading.
The library then cuts the inputs itself and adds the parts in a kernel of its own. Cut here, the sum falls into the kernel that comes next
(a residual, a norm), and is in float32 until then. Who multiplies is the library, or a kernel of our own (ops/products_triton.py), which
also joins the two maps of SwiGLU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.ops.attention import has_triton

if TYPE_CHECKING:
    from dllm_toolkit.ops.products_triton import Tile

Kernel = Literal["library", "triton"]
BEST: Kernel = "triton" if has_triton() else "library"
"""Whose products compiled layers of few lanes are made of, in bfloat16 and float16. What has been compiled stays as it is.

An 8B forward on an H200: of 64 lanes 4.87 ms with our own, 4.99 with the library's; of 32 4.68 and 4.87; of 16 4.50 and 4.70.
"""
ENABLED = True
"""Whether compiled layers cut such products. What has been compiled stays as it is."""
MOST_LANES = 128
MOST_LANES_OF_OUR_OWN = 64
MOST_PARTS = 2  # an 8B forward of 64 lanes on an H200: 4.97 ms without, 4.88 with 2, 4.92 with 4; of 16 lanes 4.88, 4.65, 4.68
TILE, PROGRAMS = 128, 132  # outputs of a tile; multiprocessors of an H100 or H200
LEAST = 512  # inputs of a part


def use(kernel: Kernel) -> None:
    """Let products of few lanes be made this way from now on. Raises ValueError where it is not there. What has been compiled stays."""
    global BEST
    if kernel == "triton" and not has_triton():
        raise ValueError("Triton is not installed, got kernel: triton. It comes with PyTorch's builds for CUDA. Write library.")
    BEST = kernel


def parts_for(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "M K"]) -> int:
    """Into how many parts a compiled product is cut: 1 where it has tiles enough, or lanes enough to wait for arithmetic."""
    if not few(x):
        return 1
    tile = tile_for(x, weight)
    return tile.parts if tile is not None else cuts(*weight.shape) if ENABLED else 1


def few(x: Float[Tensor, "*lanes K"]) -> bool:
    """So few lanes, on a GPU, that their product waits for the weights?"""
    return lanes_of(x) <= MOST_LANES and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def lanes_of(x: Float[Tensor, "*lanes K"]) -> int:
    return x.numel() // x.shape[-1]


def tile_for(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "M K"], whole: bool = False) -> Tile | None:
    """How our own kernel cuts this product; None: the library multiplies.

    That is where it is wished, where the lanes are more than was measured, where the tiles are too few to keep a GPU reading, and where a
    GPU has too little shared memory. whole: the two maps of SwiGLU, in one part. The sizes are the fastest of thirty for an 8B model's
    products for 16 and 64 lanes on an H200 (docs/LOG.md; benchmarks/matmul_speed.py --cuts measures them).
    """
    if BEST == "library" or lanes_of(x) > MOST_LANES_OF_OUR_OWN:
        return None
    from dllm_toolkit.ops.products_triton import Tile, bytes_of_a_stage, shared_memory

    outputs, inputs = weight.shape
    count = 1 if whole or not ENABLED else cuts(outputs, inputs)
    tile = Tile(64, 64, 1, stages=4) if whole else Tile(64, 128, count, stages=3 if count == 1 else 5)
    programs = -(-outputs // tile.outputs) * count // (2 if whole else 1)
    stages = min(tile.stages, shared_memory(x.device.index) // bytes_of_a_stage(tile, lanes_of(x), whole))
    if inputs % (tile.inputs * count) or 2 * programs < PROGRAMS or stages < 3:
        return None
    return replace(tile, stages=stages)


def cuts(outputs: int, inputs: int) -> int:
    """The power of two, MOST_PARTS at most, that gives a tile for nearly every multiprocessor if the inputs go into that many parts."""
    parts = 1
    tiles = -(-outputs // TILE)
    while parts < MOST_PARTS and 2 * parts * tiles <= PROGRAMS and inputs % (2 * parts) == 0 and inputs // (2 * parts) >= LEAST:
        parts *= 2
    return parts


def terms(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "M K"]) -> Float[Tensor, "P *lanes M"]:
    """A compiled product in the parts that `parts_for` says: one in the type of x, several in float32."""
    tile = tile_for(x, weight) if few(x) else None
    if tile is not None:
        from dllm_toolkit.ops import products_triton

        return products_triton.by_parts(x, weight, tile)
    count = parts_for(x, weight)
    return F.linear(x, weight).unsqueeze(0) if count == 1 else by_parts(x, weight, count)


def by_parts(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "M K"], parts: int) -> Float[Tensor, "P *lanes M"]:
    """The product of each part by the library, in float32 or wider."""
    outputs, inputs = weight.shape
    left = x.reshape(-1, parts, inputs // parts).transpose(0, 1)  # [P, N, k]
    right = weight.view(outputs, parts, inputs // parts).permute(1, 2, 0)  # [P, k, M]
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        made = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        made = torch.bmm(left.to(wide), right.to(wide))
    return made.view(parts, *x.shape[:-1], outputs)


def gated(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "both K"]) -> Float[Tensor, "*lanes M"]:
    """Compiled: silu of what the first half of the weights [2 M, K] says, times what the second half says."""
    tile = tile_for(x, weight, whole=True) if few(x) else None
    if tile is not None:
        from dllm_toolkit.ops import products_triton

        return products_triton.gated(x, weight, tile)
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up
