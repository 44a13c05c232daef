"""Intervals and paired tests for tables of results: pure functions of numbers, seeded, numpy alone.

Problems are drawn once and answered by every configuration, so the same problem is compared with itself: exact McNemar for graded answers,
sign flips for differences of numbers, Holm's correction over everything that one table tests. Intervals are percentile bootstraps over the
problems, 95 %. With the same number of problems the resamples are the same, so two runs of a report agree to the last digit.

References: B. Efron, Bootstrap methods (1979); Q. McNemar (1947); S. Holm, A simple sequentially rejective multiple test procedure (1979);
B. Phipson and G. K. Smyth, Permutation p-values should never be zero (2010).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
FLIPS = 9999
"""Draws of a sign-flip test that is too large to enumerate; the smallest p-value is 1 / (FLIPS + 1)."""
ENUMERATED = 14
"""Up to so many pairs that differ, a sign-flip test goes through all flips and is exact."""
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """raises, lowers or keeps."""
        return "raises" if self.low > 0 else "lowers" if self.high < 0 else "keeps"


def accuracy_interval(correct: Sequence[bool] | Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of grades in 0..1, such as the share of right answers.

    Where all are 0, or all 1, the bootstrap has no width; the exact binomial bound (Clopper-Pearson) stands in for it there.
    """
    count = len(correct)
    values = np.asarray(correct, dtype=np.float64)
    if count == 0:
        return 0.0, 1.0
    if values.min() == values.max() and values[0] in (0.0, 1.0):
        bound = 0.025 ** (1.0 / count)
        return (bound, 1.0) if values[0] else (0.0, 1.0 - bound)
    interval = ratio_interval(values, np.ones(count), resamples)
    return interval.low, interval.high


def ratio_interval(numerators: Any, denominators: Any, resamples: int = RESAMPLES) -> Interval:
    """Interval of sum(numerators) / sum(denominators): both are drawn together, observation by observation.

    Denominators of ones make it the interval of a mean. Raises ValueError without observations, or where a sum of denominators may be 0.
    """
    above, below = _numbers(numerators), _numbers(denominators)
    _require_pairs(above, below)
    if below.min() < 0 or below.max() <= 0:
        raise ValueError("denominators must not be negative, and not all 0. They are counts or seconds. Leave out what was not measured.")
    counts = _resamples(len(above), resamples)
    under = counts @ below
    ratios = (counts @ above)[under > 0] / under[under > 0]
    low, high = np.quantile(ratios, _TAILS)
    return Interval(float(low), float(high))


def paired(one: Sequence[float] | Any, other: Sequence[float] | Any, resamples: int = RESAMPLES, weights: Any = None) -> Difference:
    """`one` minus `other`, pair by pair. weights: how much each pair counts, such as the problems of a batch; None: all the same."""
    differences = _numbers(one) - _numbers(other)
    shares = np.ones(len(differences)) if weights is None else _numbers(weights)
    _require_pairs(differences, shares)
    interval = ratio_interval(differences * shares, shares, resamples)
    return Difference(float((differences * shares).sum() / shares.sum()), interval.low, interval.high)


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test: are the problems that only one of two answers gets right split evenly?

    With b and c such problems, p = min(1, 2 P(X <= min(b, c))) for X binomial with b + c draws of probability 1/2; 1 if no problem differs.
    """
    _require_pairs(one, other)
    first = sum(bool(a) and not b for a, b in zip(one, other, strict=True))
    second = sum(bool(b) and not a for a, b in zip(one, other, strict=True))
    total = first + second
    # Whole numbers of any size: exact however many problems there are.
    tail = sum(math.comb(total, count) for count in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**total)


def sign_flip(differences: Sequence[float] | Any, draws: int = FLIPS) -> float:
    """Two-sided p-value of the sign-flip permutation test: could each paired difference as well have had the other sign?

    The share of flips whose sum is at least as far from 0 as the sum observed. Exact for up to `ENUMERATED` pairs that differ; above it a
    seeded sample of flips that counts the observed one, so that p is never 0.
    """
    values = _numbers(differences)
    values = values[values != 0]
    if not len(values):
        return 1.0
    # Flips whose sums are equal on paper must not differ by rounding.
    bound = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if len(values) <= ENUMERATED:
        flips = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
        return float(np.mean(np.abs((2.0 * flips - 1.0) @ values) >= bound))
    generator, hits, left = np.random.default_rng(0), 0, draws
    while left:  # in pieces: the signs of thousands of problems would fill the memory
        rows = min(left, 1000)
        flips = np.unpackbits(generator.integers(0, 256, (rows, -(-len(values) // 8)), dtype=np.uint8), axis=1, count=len(values))
        hits += int(np.count_nonzero(np.abs((2.0 * flips - 1.0) @ values) >= bound))
        left -= rows
    return (1 + hits) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order: rejecting those at most 0.05 keeps the chance of any false rejection at most 0.05."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@functools.lru_cache(maxsize=4)
def _resamples(count: int, resamples: int) -> Any:
    """[resamples, count]: how often each observation is in each resample. The same for every column of a table."""
    draws = np.random.default_rng(0).integers(0, count, size=(resamples, count))
    places = draws + count * np.arange(resamples)[:, None]
    return np.bincount(places.reshape(-1), minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def _numbers(values: Any) -> Any:
    return np.asarray(values, dtype=np.float64)


def _require_pairs(one: Any, other: Any) -> None:
    if len(one) != len(other) or not len(one):
        raise ValueError(
            f"pairs must be one number each and at least one pair, got {len(one)} and {len(other)}. Pair the same problems of both."
        )
