"""A product of few lanes as several, each over a part of its inputs, for whoever adds them up anyway.

    y[n, m] = sum_p  sum_{k in part p} x[n, k] w[m, k]

With 16 to 128 lanes a product waits for the weights, and a map with few outputs has too few tiles to keep all multiprocessors reading.
The library then cuts the inputs itself and adds the parts in a kernel of its own. Cut here, the sum falls into the kernel that comes next
(a residual, a norm), and is in float32 until then.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ENABLED = True
"""Whether compiled layers cut such products. What has been compiled stays as it is."""
MOST_LANES = 128
MOST_PARTS = 2  # an 8B forward of 64 lanes on an H200: 4.97 ms without, 4.88 with 2, 4.92 with 4; of 16 lanes 4.88, 4.65, 4.68
TILE, PROGRAMS = 128, 132  # outputs of a tile; multiprocessors of an H100 or H200
LEAST = 512  # inputs of a part


def parts_for(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "M K"]) -> int:
    """Into how many parts a compiled product is cut: 1 where it has tiles enough, or lanes enough to wait for arithmetic."""
    few = x.numel() // x.shape[-1] <= MOST_LANES and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return cuts(*weight.shape) if ENABLED and few else 1


def cuts(outputs: int, inputs: int) -> int:
    """The power of two, MOST_PARTS at most, that gives a tile for nearly every multiprocessor if the inputs go into that many parts."""
    parts = 1
    tiles = -(-outputs // TILE)
    while parts < MOST_PARTS and 2 * parts * tiles <= PROGRAMS and inputs % (2 * parts) == 0 and inputs // (2 * parts) >= LEAST:
        parts *= 2
    return parts


def by_parts(x: Float[Tensor, "*lanes K"], weight: Float[Tensor, "M K"], parts: int) -> Float[Tensor, "P *lanes M"]:
    """The product of each part, in float32 or wider."""
    outputs, inputs = weight.shape
    left = x.reshape(-1, parts, inputs // parts).transpose(0, 1)  # [P, N, k]
    right = weight.view(outputs, parts, inputs // parts).permute(1, 2, 0)  # [P, k, M]
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        made = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        made = torch.bmm(left.to(wide), right.to(wide))
    return made.view(parts, *x.shape[:-1], outputs)
