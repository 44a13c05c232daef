"""Attention of few lanes over many keys, by the way that is fastest there.

A decoding step has 16 to 128 query lanes. There a kernel of our own (ops/attention_triton.py), which reads keys and values once, is
fastest. Where Triton is missing or heads do not fit it, two batched products with a softmax between them, which a compiler fuses, beat the
kernels of the library in one row: its tiles are made for long sequences. All are measured in benchmarks/attention_speed.py.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Way = Literal["products", "triton"]
MOST_LANES = 128


@cache
def has_triton() -> bool:
    """Is Triton installed? PyTorch's CUDA builds bring it."""
    return importlib.util.find_spec("triton") is not None


BEST: Way = "triton" if has_triton() else "products"
"""What few lanes run on where Triton is installed: 11.3 us a layer of 64 lanes and 528 slots on an H200, products 14.0."""


def way_for(q: Float[Tensor, "B H W D"], allow: Bool[Tensor, "B 1 W S"] | None) -> Way | None:
    """How to attend from these lanes; None: the library's kernel. Decided by shapes alone, so a compiled graph holds one of them."""
    if allow is None or not q.is_cuda or not torch.compiler.is_compiling() or q.shape[2] > MOST_LANES:
        return None
    size = q.shape[3]
    trained = torch.is_grad_enabled()  # the kernel has no backward
    # Longer heads do not fit the shared memory of smaller GPUs.
    if BEST == "triton" and 16 <= size <= 128 and size & (size - 1) == 0 and q.dtype != torch.float64 and not trained:
        return "triton"
    # Only one row: with several, keys [B, S, H, D] are no single batch of matrices, and a product would copy them.
    return "products" if q.shape[0] == 1 else None


def few(
    way: Way,
    q: Float[Tensor, "B H W D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    allow: Bool[Tensor, "B 1 W S"] | None,
    angles: tuple[Float[Tensor, "B W D"], Float[Tensor, "B W D"]] | None = None,
) -> Float[Tensor, "B H W D"]:
    """Attention in the given way. angles: cosines and sines by which the kernel (triton) still has to rotate the queries."""
    if way == "products":
        if angles is not None:
            raise ValueError("products take rotated queries, got angles. Only the kernel rotates what it reads. Write way: triton.")
        return products(q, k, v, allow)
    from dllm_toolkit.ops.attention_triton import attend

    assert allow is not None
    return attend(q, k, v, allow, *(angles or (None, None)))


def use(way: Way) -> None:
    """Let few lanes run this way from now on. Raises ValueError where it is not there. What has been compiled stays as it is."""
    global BEST
    if way == "triton" and not has_triton():
        raise ValueError("Triton is not installed, got way: triton. It comes with PyTorch's builds for CUDA. Write products.")
    BEST = way


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
