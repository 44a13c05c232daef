"""Between canvas and lanes: packing the positions that are wanted now into a narrow batch, and spreading results back.

    canvas   . x . x x .      pack, W = 4      lanes  1 3 4 L      (L: dead lane, maps to the trash slot)

Several canvases of a row (hypotheses that share its slots), and shadows of their positions, are sheets: one behind the other they are
packed like one long canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def pack(wanted: Bool[Tensor, "B L"], width: int) -> Int[Tensor, "B W"]:
    """Positions of the first `width` wanted entries of each row, in order; the rest of the row is L (dead lanes)."""
    rows, length = wanted.shape
    rank = wanted.cumsum(1)  # 1-based place of each wanted position
    if torch.compiler.is_compiling() and wanted.is_cuda:
        # How many positions come before the one of that place: a reduction that is fused, where a scatter would be a launch of its own.
        places = torch.arange(1, width + 1, device=wanted.device)
        return (rank.unsqueeze(1) < places.unsqueeze(1)).sum(2)
    place = torch.where(wanted & (rank <= width), rank - 1, width)
    positions = torch.arange(length, device=wanted.device).expand(rows, length)
    caught = torch.full((rows, width + 1), length, device=wanted.device).scatter(1, place, positions)
    # Column `width` catches everything unwanted and is cut off. Compiled code is specialised on strides, and `contiguous` would leave
    # those of a single row as they are.
    return caught[:, :width].clone(memory_format=torch.contiguous_format)


def to_canvas(values: Shaped[Tensor, "B R"], positions: Int[Tensor, "B R"], length: int, fill: float | int | bool) -> Tensor:
    """Spread lane values over the canvas [B, L]; positions == L (dead lanes) are dropped; everything else is `fill`."""
    canvas = torch.full((values.shape[0], length + 1), fill, dtype=values.dtype, device=values.device)
    return canvas.scatter(1, positions, values)[:, :length]


def to_lanes(canvas: Shaped[Tensor, "B L"], positions: Int[Tensor, "B R"], fill: float | int | bool) -> Tensor:
    """Canvas values at the lanes' positions [B, R]; dead lanes get `fill`."""
    length = canvas.shape[1]
    values = canvas.gather(1, positions.clamp(max=length - 1))
    return values.masked_fill(positions >= length, fill)


@dataclass(frozen=True)
class SheetLanes:
    """Lanes of several canvases of a row, all [B, W].

    sheet: which canvas (0 where dead); positions: L where dead; shadow: does the lane ask for its position anew; scratch: its place among
    the scratch slots, or their number where it has none; index: its place on all sheets, their whole length where dead.
    """

    sheet: Int[Tensor, "B W"]
    positions: Int[Tensor, "B W"]
    shadow: Bool[Tensor, "B W"]
    scratch: Int[Tensor, "B W"]
    index: Int[Tensor, "B W"]


def pack_sheets(
    wanted: Bool[Tensor, "B C L"], shadows: Bool[Tensor, "B C L"] | None, in_place: Bool[Tensor, "B"], width: int, scratch: int
) -> SheetLanes:
    """Lanes for the wanted positions of C canvases, then for their shadows.

    in_place: rows whose canvas lanes write into their own slots, because only one canvas is in use; shadows always need scratch slots.
    """
    _, sheets, length = wanted.shape
    flat = wanted.flatten(1)
    if shadows is not None:
        flat = torch.cat((flat, shadows.flatten(1)), dim=1)
    index = pack(flat, width)
    dead = index == flat.shape[1]
    shadow = (index >= sheets * length) & ~dead
    sheet = index.div(length, rounding_mode="floor").masked_fill(dead, 0) % sheets
    apart = ~dead & (shadow | ~in_place.unsqueeze(1))
    place = torch.where(apart, apart.cumsum(1) - 1, scratch)
    return SheetLanes(sheet, torch.where(dead, length, index % length), shadow, place, index)
