"""One Triton kernel for few query lanes against a K/V buffer under a mask of any shape. ops/attention.py has the same formula in PyTorch.

    out[b, w, h] = softmax_s(q[b, w, h] . k[b, s, g] / sqrt D  where allow[b, w, s]) v[b, s, g]          g = h // (H / G)

A step of 16 to 128 lanes reads every key and value once and computes little, so what counts is that all multiprocessors read at once, and
that scores never leave the chip. One program takes one head of one row, a tile of lanes, and a part of the slots; with few rows the slots
are cut until there are enough programs. The parts meet in a second kernel, in order and not by atomics: a decode must repeat itself bit for
bit. Scores and sums are in float32; weights are rounded to the values' type for the second product, as in other attention kernels.

Two things save time beside that. Queries may come as they leave their projection: the kernel then rotates what it loads, and no other one
has to. Slots behind the last whole block (a K/V buffer ends in 16, the trash slot and its padding) are a short block, which the last part
takes while it waits for its first keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-not-found]  # PyTorch brings it for CUDA only
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

PROGRAMS = 132  # one for each multiprocessor of an H100 or H200
LONG = 512  # slots of a part that is worth a second program on each of them
NARROW, WIDE = 16, 64  # lanes of the smallest and of the largest tile; no block of slots is shorter than NARROW either


@dataclass(frozen=True)
class Tiling:
    """How the work is cut. lanes: of a tile; parts: of the slots, at most; slots: of a block; warps, stages: of Triton.

    Raises ValueError for sizes that no program can have.
    """

    lanes: int
    parts: int
    slots: int = 64
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        for name, value, least in (("lanes", self.lanes, NARROW), ("slots", self.slots, NARROW), ("warps", self.warps, 1)):
            if value < least or value & (value - 1):
                raise ValueError(f"{name} of a tiling must be a power of two from {least} on, got {value}. Write {name}: {4 * least}.")
        if self.parts < 1 or self.stages < 1:
            raise ValueError(f"parts and stages of a tiling must be 1 or more, got {self.parts} and {self.stages}. Write 1.")


def tiling_for(heads: int, width: int, slots: int, size: int, bytes_each: int = 2) -> Tiling:
    """A program for every multiprocessor, no part shorter than two blocks. heads: of all rows; size, bytes_each: of a key, of its numbers.
    With many slots two: 4352 of them take 32 us for 64 lanes, where one for each takes 40 (an H200; 12 to 24 parts take 43 to 51).

    Narrower tiles in place of parts were slower: each reads all keys again. A part is short, and shorter blocks let it begin earlier. What
    registers and shared memory do not hold is cut smaller: long keys, and float32, whose products run on no tensor core.
    """
    lanes = min(max(NARROW, 1 << (width - 1).bit_length()), WIDE if bytes_each <= 2 else NARROW)
    programs = heads * -(-width // lanes)
    parts = max(1, min(-(-PROGRAMS // programs), slots // (2 * Tiling.slots)), min(2 * PROGRAMS // programs, slots // LONG))
    if bytes_each > 2:
        return Tiling(lanes, parts, slots=32, stages=2)
    if size > 128:
        return Tiling(lanes, parts, slots=32, warps=8)
    return Tiling(lanes, parts, slots=32, stages=4) if parts > 1 else Tiling(lanes, parts)


@triton.jit
def _fetch(k, v, s, there, d, k_slot, v_slot):
    keys = tl.load(k + s[None, :] * k_slot + d[:, None], mask=there[None, :], other=0.0)  # [D, slots]
    return keys, tl.load(v + s[:, None] * v_slot + d[None, :], mask=there[:, None], other=0.0)


@triton.jit
def _queries(q, cos, sin, lane, angle, live, SIZE: tl.constexpr, ROTATE: tl.constexpr):
    """The queries of a tile; rotated, they are what `rotate` of models/transformer.py makes of them, in the tables' precision.

    lane, angle [lanes]: where a lane's query and its angles begin. Both halves of a table are alike, so one is read.
    """
    if ROTATE:
        half = tl.arange(0, SIZE // 2)
        place = lane[:, None] + half[None, :]
        one = tl.load(q + place, mask=live[:, None], other=0.0).to(cos.dtype.element_ty)
        other = tl.load(q + place + SIZE // 2, mask=live[:, None], other=0.0).to(cos.dtype.element_ty)
        along = tl.load(cos + angle[:, None] + half[None, :], mask=live[:, None], other=0.0)
        across = tl.load(sin + angle[:, None] + half[None, :], mask=live[:, None], other=0.0)
        turned = tl.join((one * along - other * across).to(q.dtype.element_ty), (other * along + one * across).to(q.dtype.element_ty))
        return tl.reshape(tl.permute(turned, (0, 2, 1)), (lane.shape[0], SIZE))
    else:
        return tl.load(q + lane[:, None] + tl.arange(0, SIZE)[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _add(queries, keys, values, seen, best, mass, mixed, SCALE: tl.constexpr):
    """One block more in a running softmax: its largest score, the sum of its weights, the weighted values."""
    scores = tl.where(seen != 0, tl.dot(queries, keys, input_precision="ieee") * SCALE, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: no difference of infinities
    weights = tl.exp(scores - base[:, None])
    old = tl.exp(best - base)
    mixed = mixed * old[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, mass * old + tl.sum(weights, 1), mixed


@triton.jit
def _kernel(
    q, k, v, allow, cos, sin, out, top, total,
    width, slots, part,
    q_row, q_lane, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head, allow_row, allow_lane, angle_row, angle_lane,
    HEADS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, SCALE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip  # no annotations: Triton reads them as types
    """part: slots of a part, whole blocks. TAIL: of the short block behind them all, or 0."""
    row, head, cut = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS, tl.program_id(2)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    d = tl.arange(0, SIZE)
    live = w < width
    q += row * q_row + head * q_head
    k += row * k_row + head // SHARED * k_head
    v += row * v_row + head // SHARED * v_head
    allow += row * allow_row + w[:, None] * allow_lane
    cos += row * angle_row
    sin += row * angle_row
    best = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_W,), tl.float32)
    mixed = tl.zeros((BLOCK_W, SIZE), tl.float32)
    queries = tl.zeros((BLOCK_W, SIZE), q.dtype.element_ty)
    whole = slots // BLOCK_S * BLOCK_S if TAIL > 0 else slots  # the last part's blocks may reach into the tail, which is added apart
    for start in range(0, part, BLOCK_S):
        s = cut * part + start + tl.arange(0, BLOCK_S)
        there = s < whole
        seen = tl.load(allow + s[None, :], mask=live[:, None] & there[None, :], other=0)
        keys, values = _fetch(k, v, s, there, d, k_slot, v_slot)
        if start == 0:  # in here: the loop's first keys are asked for before it begins, but after all that is above it has arrived
            if TAIL > 0:
                rest = slots // BLOCK_S * BLOCK_S + tl.arange(0, TAIL)
                mine = (rest < slots) & (cut == PARTS - 1)
                keys_rest, values_rest = _fetch(k, v, rest, mine, d, k_slot, v_slot)
            queries = _queries(q, cos, sin, w * q_lane, w * angle_lane, live, SIZE, ROTATE)
            if TAIL > 0:
                seen_rest = tl.load(allow + rest[None, :], mask=live[:, None] & mine[None, :], other=0)
                if cut == PARTS - 1:
                    best, mass, mixed = _add(queries, keys_rest, values_rest, seen_rest, best, mass, mixed, SCALE)
        best, mass, mixed = _add(queries, keys, values, seen, best, mass, mixed, SCALE)
    if PARTS == 1:
        mixed = mixed / mass[:, None]
    place = (cut * (tl.num_programs(0) // HEADS) + row) * width + w  # [parts, B, W]
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allow: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """q [B, H, W, D], k and v [B, G, S, D], any of them views of [B, W or S, heads, D]; allow [B, 1, W, S], something for every lane.

    Returns [B, H, W, D], a view of [B, W, H, D]. D is a power of two, 16 or more. cos, sin [B, W, D]: the queries are rotated first, as
    `rotate` does it; the first halves are read, the second are the same. tiling None: `tiling_for`. Raises ValueError for other shapes of
    the mask and the angles, which the kernel would read past, and for tensors that are not dense in their last dimension.
    """
    rows, heads, width, size = q.shape
    groups, slots = k.shape[1], k.shape[2]
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together, got one of them. Write both, or neither for queries that are rotated.")
    if allow.shape != (rows, 1, width, slots) or (cos is not None and cos.shape != (rows, width, size)):
        angles = None if cos is None else tuple(cos.shape)
        raise ValueError(
            f"allow must be [B, 1, W, S] and cos, sin [B, W, D], got {tuple(allow.shape)} and {angles} for queries {tuple(q.shape)} and "
            f"{slots} slots. Write allow.expand(...): rows may share their memory."
        )
    chosen = tiling_for(rows * heads, width, slots, size, q.element_size()) if tiling is None else tiling
    blocks, tail = slots // chosen.slots, slots % chosen.slots
    if blocks == 0 or tail > chosen.slots // 2:
        blocks, tail = blocks + 1, 0  # what is nearly a block is one
    elif tail:
        tail = max(NARROW, 1 << (tail - 1).bit_length())
    several = -(-blocks // chosen.parts)  # blocks of a part
    parts = -(-blocks // several)
    made = torch.empty(parts, rows, width, heads, size, dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    top = torch.empty(parts, rows, width, heads, dtype=torch.float32, device=q.device) if parts > 1 else made
    total = torch.empty_like(top) if parts > 1 else made
    seen = allow.squeeze(1)
    rotated = cos is not None and sin is not None
    cos, sin = (cos, sin) if cos is not None and sin is not None else (q[:, 0], q[:, 0])  # not read
    if cos.stride() != sin.stride():
        raise ValueError(
            f"cos and sin must lie alike, got strides {cos.stride()} and {sin.stride()}. One place is read in both. Write cos.contiguous()."
        )
    for name, one in (("q", q), ("k", k), ("v", v), ("allow", seen), ("cos", cos)):
        if one.stride(-1) != 1:
            raise ValueError(
                f"{name} must be dense in its last dimension, got strides {one.stride()}. The kernel reads whole rows. "
                f"Write {name}.contiguous()."
            )
    options: dict[str, Any] = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    _kernel[rows * heads, -(-width // chosen.lanes), parts](  # type: ignore[index]  # what the decorator makes of it takes a grid
        q, k, v, seen, cos, sin, made, top, total, width, slots, several * chosen.slots,
        q.stride(0), q.stride(2), q.stride(1), k.stride(0), k.stride(2), k.stride(1), v.stride(0), v.stride(2), v.stride(1),
        seen.stride(0), seen.stride(1), cos.stride(0), cos.stride(1),
        HEADS=heads, SHARED=heads // groups, SIZE=size, PARTS=parts, TAIL=tail, BLOCK_W=chosen.lanes, BLOCK_S=chosen.slots,
        SCALE=1 / math.sqrt(size), ROTATE=rotated, **options,
    )  # fmt: skip
    if parts == 1:
        return made[0].transpose(1, 2)
    out = torch.empty(rows, width, heads, size, dtype=q.dtype, device=q.device)
    high = min(8, 1 << (heads - 1).bit_length())
    _join[rows * width, -(-heads // high)](  # type: ignore[index]
        made, top, total, out, rows * width, HEADS=heads, SIZE=size, PARTS=parts, BLOCK_H=high, num_warps=4
    )
    return out.transpose(1, 2)
