"""Rules that look back: what they refuse, and what the loop makes of what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dllm_toolkit.decoders.base import DecodeError, extra_steps
from dllm_toolkit.decoders.remdm_loop import LookingBack, TakeBackLeast, remdm_loop
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import standing
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.saber import AboveMean, TakeBackFallen, saber
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.token_editing import EditTokens, llada21
from dllm_toolkit.ops import select
from dllm_toolkit.state import Answer, begin_state
from dllm_toolkit.testing.models import EOS, MASK, VOCABULARY, toy_spec


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EditTokens(max_post_steps=-1), "max_post_steps must be 0 or more, got -1"),
        (lambda: EditTokens(limit=-1), "limit must be 0 or more, got -1"),
        (lambda: EditTokens(action="remask"), "remask needs a limit"),
        (lambda: EditTokens(action="remask", limit=1, no_return=True), "no_return does not go with remask"),
        (lambda: EditTokens(suspect="improbable"), "can only be remasked"),
        (lambda: llada21(action="remask"), "remask needs a limit"),
        (lambda: AboveMean(0), "minimum must be 1 or more, got 0"),
        (lambda: saber(minimum=0), "minimum must be 1 or more, got 0"),
        (lambda: TakeBackFallen(least=-1), "least must be 0 or more, got -1"),
        (lambda: TakeBackFallen(one_in=0), "one_in must be 1 or more, got 0"),
        (lambda: LookingBack(at=1.5), r"at must be in \[0, 1\], got 1.5"),
        (lambda: LookingBack(loops=-1), "loops must be 0 or more, got -1"),
        (lambda: TakeBackLeast(0), "count must be 1 or more, got 0"),
        (lambda: SemiAutoregressive(reach="answer", step_cap=4), "reach: answer does not go with step_cap"),
    ],
)
def test_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        make()


def test_declared_steps() -> None:
    """Beyond one a token: post steps of every block, loops and what they may take back; nothing for rules of net progress."""
    assert extra_steps(semi_ar(), 64) == extra_steps(saber(), 64) == 0
    assert extra_steps(llada21(), 64) == 64 * 16
    assert extra_steps(llada21(edit_threshold=1.0), 64) == 0
    assert extra_steps(llada21(action="remask", limit=3), 64) == 64 * 19
    assert extra_steps(remdm_loop(loops=2), 8) == 2 * 9


def two_rows() -> tuple:
    """State and region of two rows with answers of 4 in one span: `x m x m` and `m m x x` decided at steps 0, 0."""
    spec = toy_spec()
    schedule = SemiAutoregressive(None)
    state = begin_state(spec, [([1], [None] * 4), ([1, 2], [None] * 4)], [0, 1], length=7, device="cpu")
    state = state.with_part(schedule=schedule.init(state))
    where = torch.tensor([[0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    return state.write(where, torch.full_like(state.tokens, 7)), schedule


def test_standing_is_the_probability_of_the_given_token() -> None:
    state, schedule = two_rows()
    region = schedule.region(state)
    positions = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]])
    logits = torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[..., MASK] = 9.0
    proposal = Sample()(Answer(logits, positions), state)
    found = standing(proposal, state.tokens, state)
    clean = logits.clone()
    clean[..., MASK] = float("-inf")
    for row in range(2):
        for lane, place in enumerate(positions[row].tolist()):
            if not bool(state.masked[row, place]):
                assert float(found[row, place]) == pytest.approx(float(clean[row, lane].softmax(-1)[7]), abs=1e-15)
    assert bool((found[~region.read] == float("-inf")).all())


def test_changeable_leaves_the_fill_and_its_end_of_text() -> None:
    state, schedule = two_rows()
    region = schedule.region(state)
    assert region.changeable(state).nonzero().tolist() == [[0, 1], [0, 3], [1, 4], [1, 5]]
    ended = state.write((state.positions == 4).expand(2, -1), torch.full_like(state.tokens, EOS))  # row 0: last of 4; row 1: third
    assert region.changeable(ended)[1].nonzero().flatten().tolist() == [4, 5]
    filled = replace(ended, born=torch.where(state.positions == 5, -1, ended.born))  # row 1: behind its end-of-text
    assert region.changeable(filled)[1].nonzero().flatten().tolist() == []
    assert region.changeable(filled)[0].nonzero().flatten().tolist() == [1, 3, 4]


def test_ensure_count_fills_up_by_rank() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.4, 0.4, 0.2, 0.9]])
    eligible = torch.tensor([[True, True, True, False], [True, True, True, False]])
    chosen = torch.tensor([[True, False, False, True], [False, False, False, False]])
    filled = select.ensure_count(chosen, score, eligible, torch.tensor([2, 9]))
    assert filled.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert select.ensure_count(chosen, score, eligible, torch.tensor([0, 1])).tolist() == [
        [True, False, False, False],
        [True, False, False, False],
    ]
