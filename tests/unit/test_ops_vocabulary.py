"""Chunked losses over the vocabulary against the plain formulas on whole logits: values, gradients, and what is read off beside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_toolkit.ops.vocabulary import Rows, cross_entropy_rows, divergence_rows
from dllm_toolkit.training.objectives import cross_entropy, reverse_kl, soft_cross_entropy


def inputs(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, head, target, teacher's hidden rows, weights of the rows (some 0)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(0, 37, (rows,), generator=generator)
    return draw(rows, 6).requires_grad_(), draw(37, 6).requires_grad_(), target, draw(rows, 6), draw(rows).clamp(min=0)


def both(kind: str, temperature: float, chunk: int, values: tuple[Tensor, ...]) -> tuple[Rows, Tensor]:
    """By chunk, and by the plain formula of training/objectives.py."""
    hidden, head, target, teacher, _ = values
    logits, told = (hidden @ head.t()).unsqueeze(0), (teacher @ head.detach().t()).unsqueeze(0)
    if kind == "cross_entropy":
        return cross_entropy_rows(hidden, head, target, chunk=chunk), cross_entropy(logits, target.unsqueeze(0))[0]
    rule = soft_cross_entropy if kind == "forward_kl" else reverse_kl
    got = divergence_rows(hidden, teacher, head, kind, temperature, chunk=chunk)  # type: ignore[arg-type]
    return got, rule(logits, told, temperature)[0]


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["cross_entropy", "forward_kl", "reverse_kl"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    rows=st.integers(1, 20),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_plain_formula(kind: str, temperature: float, rows: int, chunk: int, seed: int) -> None:
    values = inputs(rows, seed)
    hidden, head, *_, weight = values
    got, expected = both(kind, temperature, chunk, values)
    assert torch.allclose(got.value, expected, atol=1e-12, rtol=1e-12)
    ours = torch.autograd.grad((got.value * weight).sum(), (hidden, head))
    theirs = torch.autograd.grad((expected * weight).sum(), (hidden, head))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-11, rtol=1e-11)


def test_what_is_read_off_beside_has_no_gradient_and_is_right() -> None:
    hidden, head, _, teacher, _ = inputs(9, 1)
    rows = divergence_rows(hidden, teacher, head, chunk=4)
    told = (teacher @ head.t()).detach()
    assert torch.equal(rows.guess, (hidden @ head.t()).argmax(-1))
    assert rows.teacher_guess is not None and torch.equal(rows.teacher_guess, told.argmax(-1))
    assert rows.entropy is not None and not rows.entropy.requires_grad
    assert torch.allclose(rows.entropy, torch.distributions.Categorical(logits=told).entropy())
    same = divergence_rows(teacher, teacher, head, chunk=4)
    assert torch.allclose(same.value, rows.entropy, atol=1e-12)


def test_no_rows_give_an_empty_loss_with_its_graph() -> None:
    hidden, head, target, teacher, _ = inputs(0, 1)
    for rows in (cross_entropy_rows(hidden, head, target), divergence_rows(hidden, teacher, head)):
        assert rows.value.shape == (0,)
        rows.value.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 6) and head.grad is not None and not head.grad.any()


@pytest.mark.parametrize("kind", ["cross_entropy", "forward_kl", "reverse_kl"])
def test_bf16_states_are_measured_in_float32(kind: str) -> None:
    """The only rounding is that of the logits and of the gradient, as in a bf16 head: within a few of its steps (2^-8)."""
    values = inputs(16, 2, torch.bfloat16)
    hidden, head, target, teacher, _ = values
    exact = tuple(one.detach().double().requires_grad_(one.requires_grad) if one.is_floating_point() else one for one in values)
    got, _ = both(kind, 1.0, 5, values)
    _, expected = both(kind, 1.0, 5, exact)
    assert got.value.dtype == torch.float32
    assert torch.allclose(got.value.double(), expected, rtol=2e-2, atol=2e-2)
    (ours,) = torch.autograd.grad(got.value.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), exact[0])
    assert ours.dtype == torch.bfloat16
    assert float((ours.double() - theirs).norm() / theirs.norm()) < 2e-2


def test_autocast_computes_a_float32_head_in_bf16_and_gives_float32_gradients() -> None:
    hidden, head, target, *_ = inputs(16, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = cross_entropy_rows(hidden, head, target, chunk=7)
    plain = cross_entropy_rows(hidden.bfloat16(), head.bfloat16(), target, chunk=7)
    assert torch.equal(rows.value, plain.value)
    for one in torch.autograd.grad(rows.value.sum(), (hidden, head)):
        assert one.dtype == torch.float32 and bool(one.isfinite().all())
