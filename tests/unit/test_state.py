"""State transitions keep their promises: fixed and finished are never written, a mask holds the mask id, behind the end is fill."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_toolkit.state import Edit, State, Verdict, begin_state
from dllm_toolkit.testing.models import EOS, MASK, PAD, toy_spec
from dllm_toolkit.types import Result


def fresh() -> State:
    """Row 0: prompt 1 2, answer of four with a pinned 9. Row 1: prompt 3, answer of two, padding."""
    rows: list[tuple[list[int], list[int | None]]] = [([1, 2], [None, 9, None, None]), ([3], [None, None])]
    return begin_state(toy_spec(), rows, [0, 1], length=6, device="cpu")


def canvas(*places: tuple[int, int]) -> torch.Tensor:
    where = torch.zeros(2, 6, dtype=torch.bool)
    for row, place in places:
        where[row, place] = True
    return where


EVERYWHERE = torch.ones(2, 6, dtype=torch.bool)
TOKENS = torch.arange(12).view(2, 6)


def test_the_first_state() -> None:
    state = fresh()
    assert state.tokens.tolist() == [[1, 2, MASK, 9, MASK, MASK], [3, MASK, MASK, PAD, PAD, PAD]]
    assert state.masked.tolist() == [[False, False, True, False, True, True], [False, True, True, False, False, False]]
    assert torch.equal(state.fixed, ~state.masked)
    assert state.begin.tolist() == [2, 1] and state.end.tolist() == [6, 3]
    assert state.inside.sum(1).tolist() == [4, 2]
    tensors = [getattr(state, field.name) for field in fields(State) if isinstance(getattr(state, field.name), torch.Tensor)]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors), "fields must not share memory"


def test_states_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        fresh().tokens = TOKENS  # type: ignore[misc]


def test_write_spares_fixed_positions_and_finished_rows() -> None:
    state = replace(fresh(), done=torch.tensor([False, True]), step=torch.tensor([5, 5]))
    after = state.write(EVERYWHERE, TOKENS)
    assert after.tokens[0].tolist() == [1, 2, 2, 9, 4, 5] and after.born[0].tolist() == [-1, -1, 5, -1, 5, 5]
    assert torch.equal(after.tokens[1], state.tokens[1]) and torch.equal(after.masked[1], state.masked[1])
    assert state.masked[0].any(), "the state before must not change"


def test_take_back_undoes_write_and_nothing_else() -> None:
    state = fresh()
    written = state.write(canvas((0, 2), (0, 4)), TOKENS)
    back = written.take_back(EVERYWHERE)
    for name in ("tokens", "masked", "born"):
        assert torch.equal(getattr(back, name), getattr(state, name))


def test_revise_counts_changes() -> None:
    state = fresh().write(canvas((0, 2), (0, 4), (1, 1)), torch.full((2, 6), 7))
    edit = Edit(replace=canvas((0, 2), (0, 3), (0, 5)), remask=canvas((1, 1)), settled=torch.tensor([False, True]), carry="kept")
    after = state.revise(edit, TOKENS)
    assert after.tokens[0].tolist() == [1, 2, 2, 9, 7, MASK], "pinned and masked positions are no edits"
    assert after.tokens[1].tolist() == [3, MASK, MASK, PAD, PAD, PAD]
    assert after.edits.tolist() == [1, 1] and after.settled.tolist() == [False, True] and after.parts.revise == "kept"
    same = state.revise(replace(edit, remask=canvas()), torch.full((2, 6), 7))
    assert same.edits.tolist() == [0, 0], "replacing a token by itself is no edit"


def test_finish_fills_behind_the_end_and_counts_the_step() -> None:
    state = fresh().write(canvas((0, 2), (1, 1), (1, 2)), torch.full((2, 6), 7))
    ended = state.finish(Verdict(torch.tensor([True, False]), torch.tensor([3, 3]), Result.END_OF_TEXT))
    assert torch.equal(ended.tokens, state.tokens), "the fill comes with `advance`, once a step"
    assert ended.fill().tokens[0].tolist() == [1, 2, 7, 9, EOS, EOS], "a pinned token stays, masks behind the end become fill"
    assert ended.end.tolist() == [3, 3] and ended.result.tolist() == [Result.END_OF_TEXT, Result.RUNNING]
    after = ended.advance((), torch.tensor([True, True]))
    assert after.step.tolist() == [1, 1], "every row that took part in the step counts it once"
    assert after.result.tolist() == [Result.END_OF_TEXT, Result.FULL] and after.done.all()
    again = after.advance((), torch.tensor([True, True]))
    assert again.step.tolist() == [1, 1] and torch.equal(again.tokens, after.tokens)


def test_a_row_that_ends_with_masks_ends_at_the_first() -> None:
    state = fresh().write(canvas((0, 4)), torch.full((2, 6), 7)).advance((), torch.tensor([True, False]))
    assert state.end.tolist() == [2, 3] and not state.masked[0].any()
    assert state.tokens[0].tolist() == [1, 2, EOS, 9, EOS, EOS] and state.born[0].tolist() == [-1] * 6


def test_end_of_text_counts_where_it_was_decoded() -> None:
    rows: list[tuple[list[int], list[int | None]]] = [([EOS, 2], [None, EOS, None]), ([3], [None, None, None])]
    state = begin_state(toy_spec(), rows, [0, 1], length=5, device="cpu")
    assert not state.is_eos().any(), "neither prompt nor pinned tokens end a text"
    written = state.write(canvas((0, 2), (1, 3))[:, :5], torch.tensor([[EOS] * 5, [25] * 5]))
    assert written.is_eos().nonzero().tolist() == [[0, 2], [1, 3]], "every id of the model counts"
    assert written.is_eos(torch.full((2, 5), EOS)).all()


def test_a_state_survives_pickling() -> None:
    state = fresh().write(canvas((0, 2)), TOKENS).with_part(commit=(torch.tensor([1, 2]),))
    again = pickle.loads(pickle.dumps(state))
    for field in fields(State):
        mine, theirs = getattr(state, field.name), getattr(again, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else True
    assert again.spec == state.spec and torch.equal(again.parts.commit[0], state.parts.commit[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["write", "take_back", "revise", "finish", "advance"]), max_size=8), st.randoms(use_true_random=False))
def test_promises_hold_after_any_sequence(actions: list[str], random: object) -> None:
    coin = random.random

    def mask(*shape: int) -> torch.Tensor:
        return torch.tensor([coin() < 0.5 for _ in range(shape[0] * (shape[1] if len(shape) > 1 else 1))]).view(shape)

    first = state = fresh()
    for action in actions:
        before = state
        if action == "write":
            state = state.write(mask(2, 6), TOKENS)
        elif action == "take_back":
            state = state.take_back(mask(2, 6))
        elif action == "revise":
            state = state.revise(Edit(mask(2, 6), mask(2, 6), mask(2)), TOKENS)
        elif action == "finish":
            state = state.finish(Verdict(mask(2), state.begin + 1, Result.END_OF_TEXT)).advance((), mask(2) & False)
        else:
            state = state.advance((), mask(2) & ~state.masked.any(1))
        assert torch.equal(state.tokens[first.fixed], first.tokens[first.fixed])
        assert bool((state.tokens[state.masked] == MASK).all()) and not bool((state.masked & state.fixed).any())
        assert bool((before.done <= state.done).all())
        finished = before.done.unsqueeze(1).expand(2, 6)
        assert torch.equal(state.tokens[finished], before.tokens[finished])
        behind = state.done.unsqueeze(1) & ~state.fixed & (state.positions >= state.end.unsqueeze(1))
        assert bool((state.tokens[behind] == EOS).all())
        assert not bool(state.masked[state.done].any())
