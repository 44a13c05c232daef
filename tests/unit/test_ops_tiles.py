"""Tiles of the block-causal mask against the dense mask; FlexAttention over them is in tests/compile."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from dllm_toolkit.ops.masks import answer_blocks, block_causal
from dllm_toolkit.ops.tiles import block_causal_tiles, kinds


@st.composite
def blocks(draw: st.DrawFn) -> torch.Tensor:
    """Block numbers as training has them (padding last), or in any order."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 50))
    if draw(st.booleans()):
        begin = torch.tensor(draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows)))
        block = answer_blocks(begin, length, draw(st.integers(1, 9)))
        end = torch.tensor(draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))).unsqueeze(1)
        return block.masked_fill(torch.arange(length) >= end, length + 1)
    return torch.tensor(draw(st.lists(st.lists(st.integers(0, 5), min_size=length, max_size=length), min_size=rows, max_size=rows)))


@settings(max_examples=60, deadline=None)
@given(block=blocks(), tile=st.sampled_from([4, 8, 16]))
def test_tiles_are_those_of_the_dense_mask(block: torch.Tensor, tile: int) -> None:
    dense, (full, mixed) = block_causal(block), kinds(block, tile)
    length = block.shape[1]
    for row in range(block.shape[0]):
        for i in range(full.shape[1]):
            for j in range(full.shape[2]):
                part = dense[row, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
                whole = part.numel() == tile * tile
                assert bool(full[row, i, j]) == (whole and bool(part.all()))
                assert bool(mixed[row, i, j]) == (bool(part.any()) and not full[row, i, j])
    made = block_causal_tiles(block, tile)
    assert made.shape == (block.shape[0], 1, length, length)


def test_the_mask_is_the_one_that_torch_makes_of_the_dense_rule() -> None:
    block = answer_blocks(torch.tensor([5, 30, 0]), 64, 8)
    ours = block_causal_tiles(block, 16)
    theirs = create_block_mask(lambda b, h, q, k: block[b, k] <= block[b, q], 3, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    for mine, other in ((ours.kv_indices, theirs.kv_indices), (ours.full_kv_indices, theirs.full_kv_indices)):
        assert torch.equal(mine, other)
    for mine, other in ((ours.q_indices, theirs.q_indices), (ours.q_num_blocks, theirs.q_num_blocks)):
        assert torch.equal(mine, other)
