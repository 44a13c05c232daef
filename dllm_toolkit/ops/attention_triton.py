"""One Triton kernel for few query lanes against a K/V buffer under a mask of any shape. Optional: ops/attention.py has the same formula.

    out[b, w, h] = softmax_s(q[b, w, h] . k[b, s, g] / sqrt D  where allow[b, w, s]) v[b, s, g]          g = h // (H / G)

A step of 16 to 128 lanes reads every key and value once and computes little, so what counts is that all multiprocessors read at once, and
that scores never leave the chip. One program takes one head of one row, a tile of lanes, and a part of the slots; with few rows the slots
are cut until there are enough programs. The parts meet in a second kernel, in order and not by atomics: a decode must repeat itself bit for
bit. Scores and sums are in float32; weights are rounded to the values' type for the second product, as in other attention kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-not-found]  # PyTorch brings it for CUDA only
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

PROGRAMS = 132  # one for each multiprocessor of an H100 or H200
LANES, SLOTS = 64, 64  # of the largest tile
NARROW = 16  # lanes of the smallest tile


@triton.jit
def _kernel(
    q, k, v, allow, out, top, total,
    width, slots, part,
    q_row, q_lane, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head, allow_row, allow_lane,
    HEADS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip  # no annotations: Triton reads them as types
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    group, cut = head // SHARED, tl.program_id(2)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    d = tl.arange(0, SIZE)
    live = w < width
    queries = tl.load(q + row.to(tl.int64) * q_row + w[:, None] * q_lane + head * q_head + d[None, :], mask=live[:, None], other=0.0)
    best = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_W,), tl.float32)
    mixed = tl.zeros((BLOCK_W, SIZE), tl.float32)
    for start in range(0, part, BLOCK_S):
        s = cut * part + start + tl.arange(0, BLOCK_S)
        there = s < slots
        keys = tl.load(k + row.to(tl.int64) * k_row + s[None, :] * k_slot + group * k_head + d[:, None], mask=there[None, :], other=0.0)
        seen = tl.load(
            allow + row.to(tl.int64) * allow_row + w[:, None] * allow_lane + s[None, :], mask=live[:, None] & there[None, :], other=0
        )
        scores = tl.where(seen != 0, tl.dot(queries, keys, input_precision="ieee") * SCALE, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: no difference of infinities
        weights = tl.exp(scores - base[:, None])
        old = tl.exp(best - base)
        values = tl.load(v + row.to(tl.int64) * v_row + s[:, None] * v_slot + group * v_head + d[None, :], mask=there[:, None], other=0.0)
        mixed = mixed * old[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        mass = mass * old + tl.sum(weights, 1)
        best = higher
    if PARTS == 1:
        mixed = mixed / mass[:, None]
    place = (cut * tl.num_programs(0) // HEADS + row).to(tl.int64) * width + w  # [parts, B, W]
    tl.store(out + (place[:, None] * HEADS + head) * SIZE + d[None, :], mixed.to(out.dtype.element_ty), mask=live[:, None])
    if PARTS > 1:
        tl.store(top + place * HEADS + head, best, mask=live)
        tl.store(total + place * HEADS + head, mass, mask=live)


@triton.jit
def _join(made, top, total, out, count, HEADS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The parts of one lane's heads as one: made [parts, lanes, heads, D], top and total [parts, lanes, heads]."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, SIZE)
    there = head < HEADS
    best = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        best = tl.maximum(best, tl.load(top + (part * count + lane) * HEADS + head, mask=there, other=0.0))
    mass = tl.zeros((BLOCK_H,), tl.float32)
    mixed = tl.zeros((BLOCK_H, SIZE), tl.float32)
    for part in tl.static_range(PARTS):
        place = (part * count + lane) * HEADS + head
        share = tl.exp(tl.load(top + place, mask=there, other=0.0) - best)  # every lane sees something in one of the parts
        mass += share * tl.load(total + place, mask=there, other=1.0)
        mixed += share[:, None] * tl.load(made + place[:, None] * SIZE + d[None, :], mask=there[:, None], other=0.0)
    place = lane * HEADS + head
    tl.store(out + place[:, None] * SIZE + d[None, :], (mixed / mass[:, None]).to(out.dtype.element_ty), mask=there[:, None])


def attend(
    q: Tensor, k: Tensor, v: Tensor, allow: Tensor, tile: tuple[int, int] | None = None
) -> Tensor:
    """q [B, H, W, D], k and v [B, G, S, D], any of them views of [B, W or S, heads, D]; allow [B, 1, W, S], something for every lane.

    Returns [B, H, W, D], a view of [B, W, H, D]. D is a power of two, 16 or more. tile: lanes of a tile, and into how many parts the slots
    are cut; None: as many as keep an H100 busy.
    """
    rows, heads, width, size = q.shape
    groups, slots = k.shape[1], k.shape[2]
    block_w, parts = cuts(rows * heads, width, slots) if tile is None else tile
    tiles = -(-width // block_w)
    part = -(-slots // (parts * SLOTS)) * SLOTS
    parts = -(-slots // part)
    made = torch.empty(parts, rows, width, heads, size, dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    top = torch.empty(parts, rows, width, heads, dtype=torch.float32, device=q.device) if parts > 1 else made
    total = torch.empty_like(top) if parts > 1 else made
    seen = allow.squeeze(1)
    for name, one in (("q", q), ("k", k), ("v", v), ("allow", seen)):
        if one.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in its last dimension, got strides {one.stride()}. The kernel reads whole rows.")
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 3}
    _kernel[rows * heads, tiles, parts](  # type: ignore[index]  # what the decorator makes of it takes a grid
        q, k, v, seen, made, top, total, width, slots, part,
        q.stride(0), q.stride(2), q.stride(1), k.stride(0), k.stride(2), k.stride(1), v.stride(0), v.stride(2), v.stride(1),
        seen.stride(0), seen.stride(1),
        HEADS=heads, SHARED=heads // groups, SIZE=size, PARTS=parts, BLOCK_W=block_w, BLOCK_S=SLOTS,
        SCALE=1 / math.sqrt(size), **options,
    )  # fmt: skip
    if parts == 1:
        return made[0].transpose(1, 2)
    out = torch.empty(rows, width, heads, size, dtype=q.dtype, device=q.device)
    several = min(8, 1 << (heads - 1).bit_length())
    _join[rows * width, -(-heads // several)](  # type: ignore[index]
        made, top, total, out, rows * width, HEADS=heads, SIZE=size, PARTS=parts, BLOCK_H=several, num_warps=4
    )
    return out.transpose(1, 2)


def cuts(heads: int, width: int, slots: int) -> tuple[int, int]:
    """Lanes of a tile, and into how many parts the slots are cut: a program for every multiprocessor, no part shorter than two tiles.

    heads: of all rows. Narrower tiles in place of parts were slower: each reads all keys again.
    """
    lanes = min(max(NARROW, 1 << (width - 1).bit_length()), LANES)
    programs = heads * -(-width // lanes)
    return lanes, max(1, min(-(-PROGRAMS // programs), slots // (2 * SLOTS)))
