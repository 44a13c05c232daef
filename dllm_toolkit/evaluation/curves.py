"""Curves of accuracy against speed: the Pareto front, sweeps as curves, and the area under parallelism (AUP).

A curve is any set of configurations that differ in one argument. AUP condenses it into one number that depends on the best accuracy of
the pool that is compared, so that accuracy and the points are always shown beside it; look at the curve as well, since the number is
not monotone everywhere: a point that falls too low is left out, and its neighbours are joined.

Reference: AUP: d3LLM (arXiv 2601.07568).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_toolkit.evaluation.ledger import Summary
from dllm_toolkit.recipe_hints import COMPONENT

ALPHA, DROP = 3.0, 5.0
"""Of d3LLM: how fast lower accuracy loses weight, and how many points of accuracy below a curve's first one are still on it."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates, from left to right."""
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front[::-1]


def area_under_parallelism(
    points: Sequence[tuple[float | int, float | int]],
    *,
    alpha: float | int = ALPHA,
    drop: float | int = DROP,
    best: float | int | None = None,
) -> float:
    """AUP of (tokens per forward, accuracy in percent) points.

    With the points sorted by parallelism r_1 <= r_2 <= ... and y the accuracies, points with y < y_1 - drop are left out and

        AUP = r_1 y_1 + sum_i (r_i - r_{i-1}) (y_i w(y_i) + y_{i-1} w(y_{i-1})) / 2,   w(y) = min(1, exp(-alpha (1 - y / best)))

    `best` is the highest accuracy over all methods that are compared (None: over these points).
    """
    if not points:
        raise ValueError("AUP needs points, got none. It is an area under a curve. Write at least one (tpf, accuracy).")
    curve = sorted(points, key=lambda point: point[0])
    floor = curve[0][1] - drop
    curve = [point for point in curve if point[1] >= floor]
    top = max(accuracy for _, accuracy in curve) if best is None else best
    if top <= 0:
        return 0.0

    def weighted(accuracy: float | int) -> float:
        return accuracy * min(1.0, math.exp(-alpha * (1.0 - accuracy / top)))

    area = float(curve[0][0] * curve[0][1])
    for (left, before), (right, after) in zip(curve, curve[1:], strict=False):
        area += (right - left) * (weighted(after) + weighted(before)) / 2
    return area


@dataclass(frozen=True)
class Point:
    """A configuration as a curve sees it: what it achieved, its recipe, and which model that is (names may mean others in other runs)."""

    summary: Summary
    configuration: Mapping[str, Any]
    model: str


@dataclass(frozen=True)
class Curve:
    """A sweep: one argument at several values. settings: the values, as text."""

    name: str
    settings: tuple[str, ...]
    summaries: tuple[Summary, ...]


@dataclass(frozen=True)
class Area:
    """AUP of a curve, of accuracy and of exact solutions; `best` of the pool, in percent, for each."""

    curve: Curve
    accuracy: float
    exact: float
    best_accuracy: float
    best_exact: float


def curves_of(points: Sequence[Point]) -> list[Curve]:
    """Configurations that differ in the value of one argument of decoder or driver, as curves; in the order given.

    Same model, cache, decoder, driver and names of arguments. Where several arguments differ (a grid), the one with the most values, the
    last of equals, makes the curves, and the others name them.
    """
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        own = point.configuration
        names = (cache_of(own), component(own.get("driver")), component(own.get("decoder")))
        groups.setdefault((point.model, *names, *sorted(settings_of(own))), []).append(point)
    return [curve for members in groups.values() for curve in _curves(members)]


def _curves(members: Sequence[Point]) -> list[Curve]:
    settings = [{name: str(value) for name, value in settings_of(point.configuration).items()} for point in members]
    values = {name: len({own[name] for own in settings}) for name in settings[0]}
    varied = [name for name, count in values.items() if count > 1]
    if not varied:
        return []
    swept = max(varied, key=lambda name: (values[name], varied.index(name)))
    others = [name for name in varied if name != swept]
    slot, _, argument = swept.partition(".")
    title = f"{component(members[0].configuration[slot])}, {argument}"
    lines: dict[tuple[str, ...], dict[str, Summary]] = {}
    for point, own in zip(members, settings, strict=True):
        # A setting that was measured twice, in two runs, is one point: the first.
        lines.setdefault(tuple(own[name] for name in others), {}).setdefault(own[swept], point.summary)
    found = []
    for fixed, line in lines.items():
        at = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in zip(others, fixed, strict=True))
        if len(line) > 1:
            found.append(Curve(f"{title} ({at})" if at else title, tuple(line), tuple(line.values())))
    return found


def areas(curves: Sequence[Curve], pool: Sequence[Summary]) -> list[Area]:
    """AUP of each curve, the largest first; `pool`: everything that is compared, which says what the best accuracy is."""
    best = {what: max((100 * getattr(one, what) for one in pool), default=0.0) for what in ("accuracy", "exact")}

    def area(curve: Curve, what: str) -> float:
        return area_under_parallelism([(one.tokens_per_forward, 100 * getattr(one, what)) for one in curve.summaries], best=best[what])

    found = [Area(curve, area(curve, "accuracy"), area(curve, "exact"), best["accuracy"], best["exact"]) for curve in curves]
    return sorted(found, key=lambda one: -one.accuracy)


def settings_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of decoder and driver, as `slot.argument`."""
    nodes = {slot: configuration.get(slot) for slot in ("decoder", "driver")}
    given = {slot: node for slot, node in nodes.items() if isinstance(node, Mapping)}
    return {f"{slot}.{key}": value for slot, node in given.items() for key, value in node.items() if key != COMPONENT}


def cache_of(configuration: Mapping[str, Any]) -> str:
    """The name of its cache."""
    return component(configuration.get("cache", "none"))


def component(node: Any) -> str:
    """The name of a component of a recipe, with or without arguments."""
    return str(node[COMPONENT]) if isinstance(node, Mapping) else str(node)
