"""The K/V buffer: static tensors, one slot a canvas position, one trash slot at the end.

Keys are stored after RoPE, so nothing is rotated twice. Addresses never change during a decode (CUDA graphs need that); a
forward overwrites the slots of its lanes in place. Dead lanes, which only pad a batch to one width, write to the trash slot, so
a wide refresh wanted by one row cannot refresh another row's stale keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class LayerBuffer(NamedTuple):
    """The keys and values of one layer: views into a `KVBuffer`, row behind row [B * S, H * D].

    Flat, because a compiler writes in place only into what it was given, not into a view of it.
    """

    keys: Float[Tensor, "BS HD"]
    values: Float[Tensor, "BS HD"]

    def write(
        self, rows: int, index: Int[Tensor, "N"], keys: Float[Tensor, "*lanes H D"], values: Float[Tensor, "*lanes H D"]
    ) -> tuple[Float[Tensor, "B S H D"], Float[Tensor, "B S H D"]]:
        """Store new keys and values of N lanes in place; return the whole buffers, by row."""
        heads, size = keys.shape[-2:]
        for whole, new in zip(self, (keys, values), strict=True):
            whole.index_copy_(0, index, new.reshape(index.numel(), -1))  # whole rows: a plain memcpy per lane on every backend
        return self.keys.view(rows, -1, heads, size), self.values.view(rows, -1, heads, size)


class KVBuffer(nn.Module):
    """Keys and values of every layer, plus the last hidden row of every slot for models with shift 1.

    keys, values: [layers, B, S, H, D];  hidden: [B, S, width], or None when the model does not need it. notes: whatever else model
    wrappers remember of a decode, slot by slot, each under its own name; it lives and ends with the keys.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None
    base: Tensor

    def __init__(
        self,
        rows: int,
        slots: int,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        hidden_width: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        shape = (layers, rows, slots, kv_heads, head_dim)
        self.rows, self.slots = rows, slots
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("values", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        hidden = None if hidden_width is None else torch.zeros(rows, slots, hidden_width, dtype=dtype, device=device)
        self.register_buffer("hidden", hidden, persistent=False)
        base = torch.arange(rows, device=device).unsqueeze(1) * slots
        self.register_buffer("base", base, persistent=False)
        self.notes = nn.ModuleDict()

    def flat(self, slots: Int[Tensor, "B W"]) -> Int[Tensor, "BW"]:
        """Slots of each row as indices into the flattened [B * S] buffers."""
        return (slots + self.base).flatten()

    def layer(self, layer: int) -> LayerBuffer:
        """One layer's keys and values."""
        flat = self.rows * self.slots
        return LayerBuffer(self.keys[layer].view(flat, -1), self.values[layer].view(flat, -1))

    def write_values(self, layer: int, index: Int[Tensor, "BW"], values: Float[Tensor, "B W H D"]) -> None:
        """Store one layer's new values in place and leave its keys alone."""
        self.values[layer].view(self.rows * self.slots, -1).index_copy_(0, index, values.reshape(index.numel(), -1))

    def write_hidden(self, index: Int[Tensor, "BW"], hidden: Float[Tensor, "B W width"]) -> None:
        if self.hidden is not None:
            width = hidden.shape[-1]
            self.hidden.view(-1, width).index_copy_(0, index, hidden.reshape(-1, width))

    def take(self, other: KVBuffer, slots: int) -> None:
        """Copy the first `slots` slots of another buffer of as many rows."""
        for mine, theirs in self._pairs(other):
            mine[..., :slots, :].copy_(theirs[..., :slots, :])

    def take_row(self, other: KVBuffer, row: Int[Tensor, "1"]) -> None:
        """Become one row of another buffer with as many slots; this one has a single row. Notes stay where they are.

        The row's number is a tensor, so that a recorded graph is good for every row.
        """
        for mine, theirs in self._by_row(other):
            torch.index_select(theirs, 1, row, out=mine)

    def give_row(self, other: KVBuffer, row: Int[Tensor, "1"]) -> None:
        """Write this single row into another buffer: the way back."""
        for mine, theirs in self._by_row(other):
            theirs.index_copy_(1, row, mine)

    def move(self, source: Int[Tensor, "B W"], target: Int[Tensor, "B W"]) -> None:
        """Copy slots of each row onto other slots of it, in every layer."""
        copies = self.rows // source.shape[0]  # guidance keeps each row twice
        taken, given = self.flat(source.repeat(copies, 1)), self.flat(target.repeat(copies, 1))
        for one, _ in self._pairs(self):
            flat = one.view(self.rows * self.slots, -1)
            flat.index_copy_(0, given, flat.index_select(0, taken))

    def pick(self, index: Int[Tensor, "B"]) -> None:
        """Row r becomes what row index[r] was, one layer after the other."""
        copies = self.rows // index.shape[0]
        index = torch.cat([index + copy * index.shape[0] for copy in range(copies)])
        for one, _ in self._pairs(self):
            one.copy_(one.index_select(0, index))

    def _by_row(self, other: KVBuffer) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys, values and hidden rows [layers, B, N] beside those of another buffer."""
        yield _words(self.keys), _words(other.keys)
        yield _words(self.values), _words(other.values)
        if self.hidden is not None and other.hidden is not None:
            yield _words(self.hidden.unsqueeze(0)), _words(other.hidden.unsqueeze(0))

    def _pairs(self, other: KVBuffer) -> Iterator[tuple[Tensor, Tensor]]:
        """The buffers [B, S, width] of every layer, and the hidden rows, beside those of another one."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            yield from zip(mine.flatten(3), theirs.flatten(3), strict=True)
        if self.hidden is not None and other.hidden is not None:
            yield self.hidden, other.hidden


def _words(rows: Tensor) -> Tensor:
    """Rows [layers, B, ...] as [layers, B, N], of 8 bytes each where that goes: kernels that pick rows copy one element at a time."""
    flat = rows.flatten(2)
    return flat.view(torch.int64) if flat.shape[2] * flat.element_size() % 8 == 0 else flat
