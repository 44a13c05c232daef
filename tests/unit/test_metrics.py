"""Metrics and commit order: hand-computed values, fixtures I15 and T35 of the training notes."""

import random

import pytest

from dllm_toolkit.evaluation import order
from dllm_toolkit.evaluation.metrics import (
    AreaUnderParallelism,
    ExactMatch,
    GlobalOrder,
    LocalOrder,
    TokensPerForward,
    area_under_parallelism,
)

LEFT_TO_RIGHT = list(range(8))
RIGHT_TO_LEFT = list(range(7, -1, -1))


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(1, 80)], 80.0),
        ([(1, 80), (3, 80)], 240.0),
        ([(1, 80), (2, 79), (4, 76)], 299.5523),
        ([(4, 70), (1, 80), (2, 79)], 158.0462),  # 10 points below the first: left out; the order of the points is no matter
    ],
)
def test_area_under_parallelism_fixtures(points: list[tuple[float, float]], area: float) -> None:
    assert area_under_parallelism(points) == pytest.approx(area, abs=5e-5)
    metric = AreaUnderParallelism()
    for tokens_per_forward, accuracy in points:
        metric.update(tokens_per_forward, accuracy)
    assert metric.compute().item() == pytest.approx(area, abs=5e-5)


def test_area_under_parallelism_properties() -> None:
    points = [(1.0, 80.0), (2.0, 79.0), (4.0, 76.0)]
    # alpha 0 is the plain trapezoid over a first rectangle
    assert area_under_parallelism(points, alpha=0) == pytest.approx(80 + 79.5 + 155)
    # another method's better accuracy makes every later point weigh less
    assert area_under_parallelism(points, best=90) < area_under_parallelism(points)
    assert area_under_parallelism([(1, 80), (2, 79.5), (4, 76)]) > area_under_parallelism(points)
    assert area_under_parallelism([(2.0, 0.0)]) == 0.0
    with pytest.raises(ValueError, match="needs points"):
        area_under_parallelism([])


def test_local_and_global_order() -> None:
    for k in (1, 2, 3):
        assert order.local_order(LEFT_TO_RIGHT, k) == order.global_order(LEFT_TO_RIGHT, k) == 1.0
        assert order.local_order(RIGHT_TO_LEFT, k) == 0.0
    assert order.global_order(RIGHT_TO_LEFT, 1) == pytest.approx(1 / 8)
    assert order.global_order(RIGHT_TO_LEFT, 8) == 1.0
    # order 0, 2, 1, 3: no commit but the first pair's follows its left neighbour; two of four take the leftmost left, then 1 and 3
    born = [0, 2, 1, 3]
    assert order.commit_order(born) == [0, 2, 1, 3]
    assert order.local_order(born, 1) == 0.0
    assert order.global_order(born, 1) == pytest.approx(3 / 4)


def test_ties_and_fill() -> None:
    assert order.commit_order([1, 1, 0, -1, -1]) == [2, 0, 1]
    assert order.local_order([0, 0, 0, 0]) == 1.0  # one step: read left to right
    assert order.local_order([-1, -1]) == order.global_order([]) == 1.0
    assert order.commits_per_step([0, 0, 2, -1]) == [2, 0, 1]
    with pytest.raises(ValueError, match="k must be at least 1"):
        order.local_order([0, 1], k=0)


def test_order_is_monotone_in_k_and_random_order_has_its_expectation() -> None:
    draw = random.Random(0)
    values = []
    for _ in range(4000):
        born = list(range(4))
        draw.shuffle(born)
        local = [order.local_order(born, k) for k in (1, 2, 3)]
        overall = [order.global_order(born, k) for k in (1, 2, 3, 4)]
        assert overall == sorted(overall) and overall[-1] == 1.0
        assert all(0.0 <= value <= 1.0 for value in local)
        values.append(overall[0])
    assert sum(values) / len(values) == pytest.approx(0.52083, abs=0.01)  # H_4 / 4


def test_accumulating_metrics() -> None:
    exact = ExactMatch()
    exact.update([True, False])
    exact.update([True])
    assert exact.compute().item() == pytest.approx(2 / 3)
    parallel = TokensPerForward()
    parallel.update([[5, 6, 1, 1, 1], [5, 6, 7, 8, 9]], [3, 1], eos_ids=(1,))  # 3 tokens and 5
    parallel.update([[1, 1]], [4], eos_ids=(1,))  # the end itself counts
    assert parallel.compute().item() == pytest.approx(9 / 8)
    for metric, value in ((LocalOrder(k=1), 0.5), (GlobalOrder(k=1), (1 + 1 / 8) / 2)):
        metric.update([LEFT_TO_RIGHT, RIGHT_TO_LEFT])
        assert metric.compute().item() == pytest.approx(value)
        metric.reset()
        metric.update([LEFT_TO_RIGHT])
        assert metric.compute().item() == 1.0
