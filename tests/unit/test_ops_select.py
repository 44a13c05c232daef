"""Selections on the canvas against plain Python, with ties, infinities, nothing to choose from, and rows of every kind."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_toolkit.ops import lanes, select

SCORES = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 0.5, 1.0, math.inf])


@st.composite
def canvases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """(score, among, group), rows of one length."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    size = rows * length
    score = draw(st.lists(SCORES, min_size=size, max_size=size))
    among = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    group = draw(st.lists(st.integers(0, length), min_size=size, max_size=size))
    shape = (rows, length)
    return (
        torch.tensor(score, dtype=torch.float64).view(shape),
        torch.tensor(among).view(shape),
        torch.tensor(group).view(shape),
    )


def ranked(score: Tensor, among: Tensor, row: int) -> list[int]:
    """Candidates of a row, best first, ties leftmost."""
    places = [place for place in range(score.shape[1]) if among[row, place]]
    return sorted(places, key=lambda place: (-float(score[row, place]), place))


def rows_of(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@settings(max_examples=60, deadline=None)
@given(canvases(), st.integers(0, 9))
def test_rank_and_top_k(canvas: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    score, among, _ = canvas
    rows, length = score.shape
    place = select.rank(score, among)
    chosen = rows_of(select.top_k(score, among, torch.full((rows,), k)))
    for row in range(rows):
        order = ranked(score, among, row)
        for rank, position in enumerate(order):
            assert int(place[row, position]) == rank
        assert all(int(place[row, position]) == length for position in range(length) if position not in order)
        assert chosen[row] == set(order[:k])


@settings(max_examples=60, deadline=None)
@given(canvases())
def test_best(canvas: tuple[Tensor, Tensor, Tensor]) -> None:
    score, among, _ = canvas
    for row, chosen in enumerate(rows_of(select.best(score, among))):
        assert chosen == set(ranked(score, among, row)[:1])


@settings(max_examples=60, deadline=None)
@given(canvases())
def test_group_reductions(canvas: tuple[Tensor, Tensor, Tensor]) -> None:
    score, among, group = canvas
    rows, length = score.shape
    some, best, count = select.group_any(among, group), select.group_best(score, among, group), select.group_count(among, group)
    for row in range(rows):
        for place in range(length):
            mates = [other for other in range(length) if group[row, other] == group[row, place]]
            assert bool(some[row, place]) == any(bool(among[row, other]) for other in mates)
        expected = set()
        for number in range(length + 1):
            order = [place for place in ranked(score, among, row) if group[row, place] == number]
            assert int(count[row, number]) == len(order)
            expected |= set(order[:1])
        assert rows_of(best)[row] == expected


@settings(max_examples=80, deadline=None)
@given(canvases(), st.randoms(use_true_random=False))
def test_progress_is_promised_and_nothing_else(canvas: tuple[Tensor, Tensor, Tensor], random: object) -> None:
    """What was chosen and eligible stays; a forced group without a choice gets its best; no other group gains anything."""
    score, eligible, group = canvas
    rows, length = score.shape
    coin = random.random
    chosen = torch.tensor([[coin() < 0.4 for _ in range(length)] for _ in range(rows)]).view(rows, length)
    force = torch.tensor([[coin() < 0.6 for _ in range(length)] for _ in range(rows)]).view(rows, length)
    result = select.ensure_progress(chosen, score, eligible, group, force)
    assert not bool((result & ~eligible).any())
    assert bool(result[chosen & eligible].all())
    for row in range(rows):
        for number in range(length + 1):
            members = [place for place in range(length) if group[row, place] == number and eligible[row, place]]
            mine = [place for place in members if chosen[row, place]]
            forced = [place for place in members if force[row, place]]
            gained = [place for place in members if result[row, place] and not chosen[row, place]]
            if mine or not forced:
                assert gained == []
            else:
                assert gained == sorted(forced, key=lambda place: (-float(score[row, place]), place))[:1]


@settings(max_examples=60, deadline=None)
@given(canvases(), st.integers(0, 10))
def test_pack_and_spread(canvas: tuple[Tensor, Tensor, Tensor], width: int) -> None:
    score, wanted, _ = canvas
    rows, length = score.shape
    positions = lanes.pack(wanted, width)
    assert positions.shape == (rows, width)
    for row in range(rows):
        places = wanted[row].nonzero().flatten().tolist()[:width]
        assert positions[row].tolist() == places + [length] * (width - len(places))
    values = lanes.to_lanes(score, positions, -7.0)
    assert bool((values[positions == length] == -7.0).all())
    back = lanes.to_canvas(values, positions, length, -9.0)
    packed = lanes.to_canvas(torch.ones_like(positions, dtype=torch.bool), positions, length, False)
    assert torch.equal(back, torch.where(packed, score, torch.full_like(score, -9.0)))
    if width >= length:
        assert torch.equal(packed, wanted)


def test_integer_and_boolean_lanes_keep_their_type() -> None:
    positions = torch.tensor([[1, 3]])
    assert lanes.to_canvas(torch.tensor([[5, 6]]), positions, 3, 0).tolist() == [[0, 5, 0]]
    assert lanes.to_lanes(torch.tensor([[True, True, False]]), positions, False).tolist() == [[True, False]]
