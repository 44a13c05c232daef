"""Noise, sampling and confidence: statistics of the stateless noise, filters against naive references, float32 evidence."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_toolkit.ops import noise, sample, score


def keys(rows: int, positions: int, tokens: int) -> tuple[Tensor, ...]:
    return torch.arange(rows)[:, None, None], torch.tensor(3), torch.arange(positions)[:, None], torch.arange(tokens)


def test_uniform_noise_is_uniform_and_never_an_end() -> None:
    draws = noise.uniform(*keys(8, 100, 250)).double().flatten()
    assert float(draws.min()) > 0 and float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 0.003 and abs(float(draws.var()) - 1 / 12) < 0.001
    # Kolmogorov-Smirnov: the largest gap to the diagonal, 1 % level.
    gap = (draws.sort().values - (torch.arange(len(draws)) + 0.5) / len(draws)).abs().max()
    assert float(gap) < 1.63 / math.sqrt(len(draws))


def test_gumbel_noise_has_the_right_moments_and_is_finite() -> None:
    draws = noise.gumbel(*keys(8, 100, 250)).double()
    assert bool(draws.isfinite().all())
    assert abs(float(draws.mean()) - 0.5772) < 0.01
    assert abs(float(draws.std()) - math.pi / math.sqrt(6)) < 0.01


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_neighbouring_keys_are_independent(axis: int) -> None:
    """Seeds, steps, positions and tokens that differ by one give uncorrelated draws."""
    base = [torch.arange(40).view([-1 if place == other else 1 for other in range(4)]) for place in range(4)]
    moved = [key + (place == axis) for place, key in enumerate(base)]
    one, other = noise.uniform(*base).double().flatten(), noise.uniform(*moved).double().flatten()
    correlation = torch.corrcoef(torch.stack((one, other)))[0, 1]
    assert abs(float(correlation)) < 0.01


def test_noise_depends_on_its_keys_only() -> None:
    """Broadcast or one by one, in any dtype of integer, in any company."""
    whole = noise.uniform(*keys(3, 4, 5))
    for row in range(3):
        for position in range(4):
            one = noise.uniform(torch.tensor(row), torch.tensor(3), torch.tensor(position), torch.tensor(4, dtype=torch.int32))
            assert float(one) == float(whole[row, position, 4])
    assert len(whole.unique()) == whole.numel()
    assert float(noise.uniform(torch.tensor(1), torch.tensor(2))) != float(noise.uniform(torch.tensor(2), torch.tensor(1)))


def test_gumbel_argmax_samples_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    rows = 20000
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample.gumbel_argmax(
            logits.expand(rows, 1, 5), temperature, torch.arange(rows), torch.zeros(rows, dtype=torch.long), torch.full((rows, 1), 9)
        )
        frequency = torch.bincount(drawn.flatten(), minlength=5) / rows
        assert float((frequency - (logits / temperature).softmax(-1)).abs().max()) < 0.015


def test_temperature_zero_is_the_lowest_best_id() -> None:
    logits = torch.tensor([[[0.0, 3.0, 3.0, 1.0]]])
    zero = torch.zeros(1, dtype=torch.long)
    assert sample.gumbel_argmax(logits, 0.0, zero, zero, zero.view(1, 1)).item() == 1


LOGITS = st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 0.5, 1.0, 2.0]), min_size=2, max_size=7).filter(
    lambda values: any(value > -math.inf for value in values)
)


@settings(max_examples=80, deadline=None)
@given(LOGITS, st.integers(1, 8))
def test_top_k_keeps_the_best_and_their_ties(values: list[float], k: int) -> None:
    kept = sample.filter_top_k(torch.tensor(values).view(1, 1, -1), k).flatten().tolist()
    floor = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert kept == [value if value >= floor else -math.inf for value in values]


@settings(max_examples=80, deadline=None)
@given(LOGITS, st.sampled_from([1e-9, 0.11, 0.32, 0.51, 0.77, 0.93, 0.999]))
def test_top_p_keeps_the_smallest_sufficient_set(values: list[float], p: float) -> None:
    kept = sample.filter_top_p(torch.tensor(values, dtype=torch.float64).view(1, 1, -1), p).flatten().tolist()
    weights = [math.exp(value) for value in values]
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    mass, expected = 0.0, [-math.inf] * len(values)
    for token in order:
        if mass / sum(weights) > p and mass > 0:
            break
        expected[token] = values[token]
        mass += weights[token]
    assert kept == expected


@settings(max_examples=80, deadline=None)
@given(LOGITS)
def test_confidence_measures_against_plain_sums(values: list[float]) -> None:
    logits = torch.tensor(values, dtype=torch.float64).view(1, 1, -1)
    weights = [math.exp(value) for value in values]
    chances = [weight / sum(weights) for weight in weights]
    for token, chance in enumerate(chances):
        assert math.isclose(score.probability(logits, torch.tensor([[token]])).item(), chance, abs_tol=1e-12)
    first, second = sorted(chances, reverse=True)[:2]
    assert math.isclose(score.margin(logits).item(), first - second, abs_tol=1e-12)
    entropy = -sum(chance * math.log(chance) for chance in chances if chance > 0)
    assert math.isclose(score.entropy(logits).item(), entropy, abs_tol=1e-12)


@settings(max_examples=40, deadline=None)
@given(LOGITS)
def test_margin_compiled_is_margin(values: list[float]) -> None:
    """The form that a compiler gets, ties of the best token included, against the sorted probabilities."""
    logits = torch.tensor([[values, [max(values)] * len(values), values[::-1]]], dtype=torch.float64)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        read = score.margin(logits)
    torch.testing.assert_close(read, score.margin(logits), rtol=0, atol=1e-12)


def test_entropy_keeps_float32s_precision() -> None:
    """A vocabulary of a real model: nothing cancels, and no sum of log-probabilities is long."""
    logits = torch.randn(1, 4, 60_000, generator=torch.Generator().manual_seed(0)) * 3
    logits[..., 7] = float("-inf")
    torch.testing.assert_close(score.entropy(logits).double(), score.entropy(logits.double()), rtol=1e-6, atol=1e-6)


def test_entropy_at_its_ends() -> None:
    assert math.isclose(score.entropy(torch.zeros(1, 1, 29)).item(), math.log(29), rel_tol=1e-6)
    sure = torch.full((1, 1, 29), float("-inf"))
    sure[..., 4] = 0.0
    assert score.entropy(sure).item() == 0.0 and score.margin(sure).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_evidence_is_at_least_float32(dtype: torch.dtype) -> None:
    """Two probabilities that bfloat16 cannot tell apart stay apart."""
    logits = torch.tensor([[[4.0, 1.0, 0.5], [4.0, 1.0, 0.25]]], dtype=dtype)
    best = torch.zeros(1, 2, dtype=torch.long)
    for measured in (score.probability(logits, best), score.margin(logits), score.entropy(logits)):
        assert measured.dtype == torch.float32 and float(measured[0, 0]) != float(measured[0, 1])
