"""Intervals and paired tests: closed forms, textbook values, enumeration, and what must hold for any numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from dllm_toolkit.evaluation.statistics import (
    FLIPS,
    accuracy_interval,
    holm,
    mcnemar,
    paired,
    ratio_interval,
    sign_flip,
)

BITS = some.lists(some.tuples(some.booleans(), some.booleans()), min_size=1, max_size=40)
NUMBERS = some.lists(some.floats(-100, 100), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (1, 9, 2 * (1 + 10) / 1024),
        (3, 3, 1.0),
        (25, 15, 0.15386),  # binom.test(15, 40) of R: 0.1539
    ],
)
def test_mcnemar_by_the_binomial(first: int, second: int, p: float) -> None:
    one = [True] * first + [False] * second + [True, False] * 4
    other = [False] * first + [True] * second + [True, False] * 4
    assert mcnemar(one, other) == pytest.approx(p, abs=5e-6)


@given(BITS)
def test_mcnemar_is_a_sign_flip_of_grades(pairs: list[tuple[bool, bool]]) -> None:
    """Under the null each problem that differs is a fair coin, which is what a sign flip draws."""
    one, other = zip(*pairs, strict=True)
    assert 0 < mcnemar(one, other) == mcnemar(other, one) <= 1
    few = [a - b for a, b in pairs][:14]
    assert sign_flip(few) == pytest.approx(mcnemar([d > 0 for d in few], [d < 0 for d in few]))


def test_mcnemar_of_many_problems_is_exact() -> None:
    p = mcnemar([True] * 3000, [False] * 3000)
    assert p == 0.0 or math.log2(p) == pytest.approx(-2999)  # below what a float can hold it is 0
    assert mcnemar([True] * 1000, [False] * 1000) == pytest.approx(2.0**-999)


@given(NUMBERS)
def test_sign_flip_is_the_enumeration(values: list[float]) -> None:
    present = [value for value in values if value]
    signs = list(itertools.product((1, -1), repeat=len(present)))
    bound = abs(sum(present)) - 1e-9 * sum(map(abs, present))
    hits = sum(abs(sum(sign * value for sign, value in zip(row, present, strict=True))) >= bound for row in signs)
    assert sign_flip(values) == pytest.approx(hits / len(signs))
    assert sign_flip(values) == sign_flip([-value for value in values])


def test_sign_flip_of_many_pairs() -> None:
    assert sign_flip([0.25] * 200) == 1 / (FLIPS + 1)  # never 0
    assert sign_flip([1.0, -1.0] * 100) == 1.0
    assert sign_flip([0.0] * 300) == 1.0
    # one against the normal approximation: the sum of 100 fair signs is 20 or more away from 0
    exact = 2 * sum(math.comb(100, k) for k in range(41)) / 2**100
    assert sign_flip([1.0] * 60 + [-1.0] * 40) == pytest.approx(exact, abs=0.01)
    assert sign_flip([1.0] * 60 + [-1.0] * 40) == sign_flip([1.0] * 60 + [-1.0] * 40)  # seeded


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(some.lists(some.floats(0, 1), max_size=12))
def test_holm_lies_between_the_p_values_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for raw, one in zip(p_values, adjusted, strict=True):
        assert raw <= one <= min(1.0, len(p_values) * raw) + 1e-12
    for (a, one), (b, other) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert (a <= b) <= (one <= other)


def test_bootstrap_draws_whole_observations() -> None:
    """The same percentiles as resampling index by index."""
    above, below = np.arange(12.0), np.linspace(1, 3, 12)
    draws = np.random.default_rng(0).integers(0, 12, size=(2000, 12))
    expected = np.quantile(above[draws].sum(axis=1) / below[draws].sum(axis=1), [0.025, 0.975])
    interval = ratio_interval(above, below)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))
    # a mean of many draws: the normal interval is close
    normal = np.random.default_rng(1).normal(5, 2, 400)
    interval = ratio_interval(normal, np.ones(400))
    half = 1.96 * normal.std() / 20
    assert (interval.low, interval.high) == pytest.approx((normal.mean() - half, normal.mean() + half), abs=0.05)


@settings(max_examples=30)
@given(BITS)
def test_accuracy_interval_holds_the_share(pairs: list[tuple[bool, bool]]) -> None:
    correct = [one for one, _ in pairs]
    low, high = accuracy_interval(correct)
    assert 0 <= low <= sum(correct) / len(correct) <= high <= 1 and low < high


@settings(max_examples=30)
@given(some.lists(some.tuples(some.floats(-9, 9), some.floats(-9, 9), some.integers(1, 5)), min_size=1, max_size=20))
def test_paired_differences(rows: list[tuple[float, float, int]]) -> None:
    one, other, weights = (list(column) for column in zip(*rows, strict=True))
    difference, back = paired(one, other, weights=weights), paired(other, one, weights=weights)
    assert difference.low <= difference.high
    assert (difference.mean, difference.low) == pytest.approx((-back.mean, -back.high), abs=1e-9)
    # a weight is that many copies of the pair, as far as the mean goes
    copies = [(a, b) for a, b, weight in rows for _ in range(weight)]
    assert difference.mean == pytest.approx(paired([a for a, _ in copies], [b for _, b in copies]).mean, abs=1e-9)


def test_what_cannot_be_paired() -> None:
    for call in (lambda: paired([1.0], []), lambda: mcnemar([], []), lambda: ratio_interval([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="Pair the same problems"):
            call()
    with pytest.raises(ValueError, match="denominators"):
        ratio_interval([1.0], [0.0])
