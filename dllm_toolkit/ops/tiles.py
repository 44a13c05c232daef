"""The block-causal mask of ops/masks.py for FlexAttention: which tiles of [L, L] are full, mixed or empty, found without making [L, L].

    blocks     0 0 0 0 | 1 1 2 2            a tile of 4 x 4
    tile       lowest 0, highest 0 | 1, 2   query tile i and key tile j are
                                            full    if highest block of j <= lowest block of i
                                            empty   if lowest block of j > highest block of i
                                            mixed   otherwise: the rule is asked for each of its pairs, inside the kernel

The rule compares two numbers, so four numbers a pair of tiles decide exactly: (L / 128)^2 comparisons where a dense mask has L^2.
FlexAttention is in torch.nn.attention.flex_attention; block-causal training as in D2F (arXiv 2508.09192).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128
"""Rows and columns of a tile: what FlexAttention's kernels are tuned for."""


def order(mixed: Bool[Tensor, "B Q K"]) -> tuple[Int[Tensor, "B 1 Q"], Int[Tensor, "B 1 Q K"]]:
    """How many tiles of each row are meant, and the numbers of the tiles with those first; int32, for all heads at once."""
    indices = mixed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return mixed.sum(-1).to(torch.int32).unsqueeze(1), indices.to(torch.int32).contiguous().unsqueeze(1)


def kinds(block: Int[Tensor, "B L"], tile: int = TILE) -> tuple[Bool[Tensor, "B T T"], Bool[Tensor, "B T T"]]:
    """(full, mixed) for every pair of query tile and key tile. A tile that the row ends in is never full."""
    rows, length = block.shape
    tiles = -(-length // tile)
    limit = torch.iinfo(block.dtype)

    def padded(fill: int) -> Int[Tensor, "B T tile"]:
        over = torch.full((rows, tiles * tile - length), fill, dtype=block.dtype, device=block.device)
        return torch.cat((block, over), dim=1).view(rows, tiles, tile)

    lowest, highest = padded(limit.max).amin(-1), padded(limit.min).amax(-1)  # of the positions that exist
    lowest_query, highest_key = padded(limit.min).amin(-1), padded(limit.max).amax(-1)  # what does not exist is not allowed
    some = lowest.unsqueeze(1) <= highest.unsqueeze(2)
    full = highest_key.unsqueeze(1) <= lowest_query.unsqueeze(2)
    return full, some & ~full


def block_causal_tiles(block: Int[Tensor, "B L"], tile: int = TILE) -> BlockMask:
    """The BlockMask of allow[b, q, k] = block[b, k] <= block[b, q], on the device of `block` and without waiting for it.

    Whatever order the blocks come in; every position sees at least itself.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return block[b, k] <= block[b, q]

    full, mixed = kinds(block, tile)
    length = block.shape[1]
    return BlockMask.from_kv_blocks(*order(mixed), *order(full), BLOCK_SIZE=tile, mask_mod=allowed, seq_lengths=(length, length))
