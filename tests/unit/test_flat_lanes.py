"""Live lanes of all rows, one behind the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_toolkit.rounds import _flat


@given(st.integers(1, 7), st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 9))
def test_every_live_lane_has_its_place(width: int, wanted: list[int], more: int) -> None:
    each = torch.tensor(wanted).clamp(max=width)
    live = torch.arange(width) < each.unsqueeze(1)  # live lanes are the first of their row
    alive = int(live.sum())
    count = min(max(1, alive + more), live.numel())
    flat = _flat(live, count)
    assert flat.lane.shape == (count,) and flat.place.shape == live.shape
    assert torch.equal(flat.lane[:alive], live.flatten().nonzero().flatten())
    assert not live.flatten()[flat.lane[alive:]].any(), "what fills up is a dead lane"
    assert flat.place.min() >= 0 and flat.place.max() < count
    assert torch.equal(flat.place[live], torch.arange(alive))
