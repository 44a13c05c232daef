"""Selections on the canvas: best k of a row, progress of a group. All sync-free; rank ties go to the leftmost position."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rank(score: Float[Tensor, "B L"], among: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """0-based rank of every position among the candidates, best score first, ties leftmost; L for the others."""
    length = score.shape[1]
    order = score.masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True)
    # Candidates at -inf would tie with non-candidates: sort once more by membership, which is stable too.
    member = among.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, member)
    places = torch.arange(length, device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places).masked_fill(~among, length)


def top_k(score: Float[Tensor, "B L"], among: Bool[Tensor, "B L"], k: Int[Tensor, "B"]) -> Bool[Tensor, "B L"]:
    """The k best candidates of each row; fewer where there are fewer."""
    return rank(score, among) < torch.minimum(k, among.sum(1)).unsqueeze(1)


def best(score: Float[Tensor, "B L"], among: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """The one best candidate of each row (leftmost on ties); nothing where there is none."""
    # A candidate at -inf must still beat every non-candidate.
    lifted = torch.where(among, score.clamp(min=torch.finfo(score.dtype).min), float("-inf"))
    place = lifted.argmax(dim=1, keepdim=True)
    return torch.zeros_like(among).scatter(1, place, True) & among


def nucleus(score: Float[Tensor, "B L"], among: Bool[Tensor, "B L"], share: float) -> Bool[Tensor, "B L"]:
    """The fewest best candidates of each row that together hold `share` of the candidates' scores, which are 0 or more.

    0 chooses none, 1 all.
    """
    if share >= 1:
        return among
    place = rank(score, among)
    order = place.argsort(dim=1, stable=True)
    ranked = score.masked_fill(~among, 0).gather(1, order)
    before = torch.zeros_like(ranked).scatter(1, order, ranked.cumsum(1) - ranked)  # what better candidates hold
    return among & (before < share * ranked.sum(1, keepdim=True))


def group_any(flag: Bool[Tensor, "B L"], group: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """For every position: does its group hold a True? Groups are numbered 0 .. L."""
    rows, length = flag.shape
    found = torch.zeros(rows, length + 1, dtype=torch.uint8, device=flag.device)
    return found.scatter_reduce(1, group, flag.to(torch.uint8), "amax").gather(1, group).bool()


def group_count(flag: Bool[Tensor, "B L"], group: Int[Tensor, "B L"]) -> Int[Tensor, "B G"]:
    """How many True each group holds, for groups 0 .. L."""
    rows, length = flag.shape
    return torch.zeros(rows, length + 1, dtype=torch.long, device=flag.device).scatter_add(1, group, flag.long())


def group_best(score: Float[Tensor, "B L"], among: Bool[Tensor, "B L"], group: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """The best candidate of every group (leftmost on ties)."""
    rows, length = score.shape
    low = torch.finfo(score.dtype).min
    lifted = torch.where(among, score.clamp(min=low), float("-inf"))
    top = torch.full((rows, length + 1), float("-inf"), dtype=score.dtype, device=score.device)
    top = top.scatter_reduce(1, group, lifted, "amax").gather(1, group)
    places = torch.arange(length, device=score.device).expand(rows, length)
    candidates = torch.where(among & (lifted == top), places, length)
    first = torch.full((rows, length + 1), length, dtype=torch.long, device=score.device)
    return first.scatter_reduce(1, group, candidates, "amin").gather(1, group) == places


def ensure_progress(
    chosen: Bool[Tensor, "B L"],
    score: Float[Tensor, "B L"],
    eligible: Bool[Tensor, "B L"],
    group: Int[Tensor, "B L"],
    force: Bool[Tensor, "B L"],
) -> Bool[Tensor, "B L"]:
    """The one liveness guarantee: a forced group in which nothing was chosen commits its best eligible position."""
    chosen = chosen & eligible
    wanting = eligible & force & ~group_any(chosen, group)
    return chosen | group_best(score, wanting, group)


def ensure_count(
    chosen: Bool[Tensor, "B L"], score: Float[Tensor, "B L"], eligible: Bool[Tensor, "B L"], least: Int[Tensor, "B"]
) -> Bool[Tensor, "B L"]:
    """Fill up a selection with the best-ranked of the other eligible positions until a row has at least `least`."""
    chosen = chosen & eligible
    return chosen | top_k(score, eligible & ~chosen, (least - chosen.sum(1)).clamp(min=0))
