"""The attention masks against their ASCII pictures and against plain loops."""

from __future__ import annotations

from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_toolkit.ops import masks
from dllm_toolkit.types import Attention


def picture(allow: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in allow.tolist()]


def test_answer_blocks_start_at_each_rows_own_answer() -> None:
    block = masks.answer_blocks(torch.tensor([4, 1]), 9, 3)
    assert block.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2, 2, 3, 3]]


def test_block_causal_picture() -> None:
    assert picture(masks.block_causal(torch.tensor([[0, 0, 1, 1, 2, 2]]))[0]) == [
        "xx....",
        "xx....",
        "xxxx..",
        "xxxx..",
        "xxxxxx",
        "xxxxxx",
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8), st.data())
def test_lanes_see_what_the_rule_lets_through(begin: int, size: int, length: int, data: st.DataObject) -> None:
    begin = min(begin, length)
    block = masks.answer_blocks(torch.tensor([begin]), length, size)
    visible = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    positions = torch.tensor([data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))])
    for attention in get_args(Attention):
        allow = masks.lanes_allow(attention, visible, block, positions)[0]
        for lane, position in enumerate(positions[0].tolist()):
            place = min(position, length - 1)
            for key in range(length):
                rule = {
                    "full": True,
                    "block_causal": int(block[0, key]) <= int(block[0, place]),
                    "causal": key <= place,
                }[attention]
                assert bool(allow[lane, key]) == (bool(visible[0, key]) and rule)


def test_training_and_decoding_use_one_formula() -> None:
    """All positions as lanes, everything visible: the decoding mask is the training mask."""
    block = masks.answer_blocks(torch.tensor([3, 5]), 12, 4)
    everywhere = torch.arange(12).expand(2, 12)
    visible = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(masks.lanes_allow("block_causal", visible, block, everywhere), masks.block_causal(block))
