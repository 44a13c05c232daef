"""One forward over several canvases of a row, or over a canvas and its shadows, as lanes: the layout that `Engine` runs.

    sheets      a: canvas of branch 0    b: canvas of branch 1  ...      then, if asked for, the shadow of each
    lanes       a2 a3 b2 b3 ..           what the cache wants computed, one sheet after the other
    slots       0 .. L - 1 | scratch .. | trash

A row of which one canvas is in use computes it in place, in the slots of its positions. Everything else stands in scratch slots, which the
next forward overwrites. Who sees whom is in ops/masks.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from dllm_toolkit.models.base import Query
from dllm_toolkit.ops import lanes, masks
from dllm_toolkit.state import Answer, Region, Shadow, State
from dllm_toolkit.types import Canvas


@dataclass(frozen=True)
class Needed:
    """What a forward over sheets has to compute and to read. Masks of B * C rows; row b * C + c is canvas c of row b.

    visible, compute, read: as planned; shadows: positions asked anew, or None. sheets: C.
    """

    visible: Canvas
    compute: Canvas
    read: Canvas
    shadows: Canvas | None
    done: Bool[Tensor, "BC"]
    sheets: int

    def by_row(self, values: Tensor) -> Tensor:
        """Something for every canvas [B * C, ...] as [B, C, ...]."""
        return values.view(-1, self.sheets, *values.shape[1:])

    @property
    def in_place(self) -> Bool[Tensor, "B"]:
        """Rows of which at most one canvas is in use."""
        return self.by_row(~self.done).sum(1) <= 1

    @property
    def length(self) -> int:
        """Of all sheets together."""
        return self.sheets * self.compute.shape[1] * (1 if self.shadows is None else 2)

    def counts(self) -> Int[Tensor, "5"]:
        """For the host: lanes and scratch slots of the busiest row, reads and shadows of the busiest canvas, canvases in use."""
        asked = torch.zeros_like(self.compute) if self.shadows is None else self.shadows
        canvas, shadow = self.by_row(self.compute).sum((1, 2)), self.by_row(asked).sum((1, 2))
        apart = canvas.masked_fill(self.in_place, 0) + shadow
        return torch.stack(
            ((canvas + shadow).amax(), apart.amax(), self.read.sum(1).amax(), asked.sum(1).amax(), (~self.done).sum())
        )


@dataclass(frozen=True)
class Layout:
    """The query of a forward over sheets, its lanes, and what its reads are about."""

    query: Query
    lanes: lanes.SheetLanes
    read: Int[Tensor, "BC R"]
    shaded: Int[Tensor, "BC Q"] | None

    def answer(self, logits: Tensor) -> Answer:
        """The model's logits [B, C * R + C * Q, V] as an answer with a row for every canvas."""
        count = self.read.numel() // logits.shape[0]
        plain = logits[:, :count].reshape(*self.read.shape, -1)
        if self.shaded is None:
            return Answer(plain, self.read)
        return Answer(plain, self.read, Shadow(logits[:, count:].reshape(*self.shaded.shape, -1), self.shaded))


def source(where: Int[Tensor, "B R"], shift: int, length: int) -> Int[Tensor, "B R"]:
    """The positions whose hidden rows predict the positions `where`; L stays L."""
    return where if shift == 0 else torch.where(where < length, (where - shift).clamp(min=0), length)


def lay_out(state: State, region: Region, needed: Needed, *, slots: int, width: int, reads: int, shades: int) -> Layout:
    """Lanes, masks and reads of a forward. slots: of a row of the K/V buffer; width, reads, shades: lanes, and logits of each canvas."""
    spec, length, sheets = state.spec, state.tokens.shape[1], needed.sheets
    scratch, trash = slots - 1 - length, slots - 1
    compute, in_place = needed.by_row(needed.compute), needed.in_place
    lane = lanes.pack_sheets(
        compute, None if needed.shadows is None else needed.by_row(needed.shadows), in_place, width, scratch
    )
    own_slot = torch.where(lane.positions < length, lane.positions, trash)
    slot = torch.where(lane.scratch < scratch, length + lane.scratch, own_slot)  # [B, W]
    dead: Bool[Tensor, "B W 1"] = (lane.positions == length).unsqueeze(2)
    moved = compute & ~in_place[:, None, None]
    allow = masks.sheets_allow(spec.attention, needed.by_row(needed.visible), moved, needed.by_row(region.block), lane, scratch)
    # A dead lane sees the trash slot only.
    allow = torch.cat((allow & ~dead, dead), dim=2)  # [B, W, S]
    # Where the keys and the hidden row of every place of every sheet stand; what was not computed, where an earlier forward left it.
    rows = compute.shape[0]
    earlier = pad(state.positions.repeat(1, sheets), (0, needed.length - sheets * length + 1), value=trash)
    stands = earlier.expand(rows, -1).scatter(1, lane.index, slot)

    def slots_of(positions: Int[Tensor, "BC Q"], first: int) -> Int[Tensor, "B CQ"]:
        """The slots of positions of every canvas, on the sheets from place `first` on."""
        by_row = needed.by_row(positions)
        begins = first + torch.arange(sheets, device=positions.device)[:, None] * length
        return stands.gather(1, torch.where(by_row < length, begins + by_row, needed.length).flatten(1))

    read = lanes.pack(needed.read, reads)
    wanted = slots_of(source(read, spec.shift, length), 0)
    shaded = None
    if needed.shadows is not None:
        shaded = lanes.pack(needed.shadows, shades)
        wanted = torch.cat((wanted, slots_of(shaded, sheets * length)), dim=1)
    canvas = pad(state.tokens.view(rows, -1), (0, 1), value=spec.pad_id)
    place = torch.where(dead.squeeze(2), sheets * length, lane.index % (sheets * length))
    query = Query(
        tokens=canvas.gather(1, place).masked_fill(lane.shadow, spec.mask_id),
        positions=lane.positions.masked_fill(lane.positions == length, 0),
        slots=slot,
        allow=allow,
        read=wanted,
        prompt=lane.positions < needed.by_row(state.begin)[:, :1],
    )
    return Layout(query, lane, read, shaded)
