"""Attention of few lanes over many keys, as plain products.

A decoding step has 16 to 128 query lanes. There scores fit in the cache of a GPU, and two batched products with a softmax between them,
which a compiler fuses, beat the attention kernels, whose tiles are made for long sequences (measured in benchmarks/attention_speed.py).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MOST_LANES = 128


def few_lanes(q: Float[Tensor, "B H W D"], allow: Bool[Tensor, "B 1 W S"] | None) -> bool:
    """Are products the faster way? Decided by shapes alone, so a compiled graph holds one of the two.

    Only one row: with several, keys [B, S, H, D] are no single batch of matrices, and a product would copy them.
    """
    return allow is not None and torch.compiler.is_compiling() and q.is_cuda and q.shape[0] == 1 and q.shape[2] <= MOST_LANES


def products(
    q: Float[Tensor, "B H W D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], allow: Bool[Tensor, "B 1 W S"] | None
) -> Float[Tensor, "B H W D"]:
    """softmax(q k^T / sqrt D + mask) v, H query heads on G key heads; scores and softmax in float32 or wider.

    Every lane must be allowed to see something.
    """
    rows, heads, width, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    several = heads // groups
    flat = q.reshape(rows * groups, several * width, size)
    turned = k.transpose(2, 3).reshape(rows * groups, size, keys)
    scores = _product(flat, turned).view(rows, groups, several, width, keys) / math.sqrt(size)
    if allow is not None:
        scores = scores.masked_fill(~allow.unsqueeze(2), float("-inf"))
    weights = scores.softmax(-1).to(v.dtype).view(rows * groups, several * width, keys)
    return torch.bmm(weights, v.reshape(rows * groups, keys, size)).view(rows, heads, width, size)


def _product(a: Float[Tensor, "N W D"], b: Float[Tensor, "N D S"]) -> Float[Tensor, "N W S"]:
    """a b, half precision summed and kept in float32: a score rounded to bf16 is off by up to 2^-9 of itself."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float()) if a.dtype in (torch.bfloat16, torch.float16) else torch.bmm(a, b)
