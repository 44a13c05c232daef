"""What happens in a story: the kinds of step, the numbers that each draws, and how they chain.

A story is a walk of dependent steps over a running value. The walk has four scenes (one person's things,
two people compared, money, done); a step may need the value before it, the value at the start, or the value
of the other person. All values stay in 2..99, products come from 2..5, and division is exact: the steps are
to be chained without mistakes, the sums are not to be hard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from dllm_toolkit.data import templates

VALUE_MIN, VALUE_MAX = 2, 99
Equation = tuple[int, str, int]
T = TypeVar("T")


class Draw:
    """Random choices made from `Random.random` alone, whose sequence Python promises not to change."""

    def __init__(self, seed: int) -> None:
        self.uniform = Random(seed).random

    def between(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.uniform() * len(options))]


@dataclass(slots=True)
class Situation:
    """Where the walk stands; `other` is the value of the other person after a comparison."""

    value: int = 0
    first: int = 0
    other: int = 0
    scene: str = "start"
    compared: bool = False
    equations: list[Equation] = field(default_factory=list)


Numbers = dict[str, int]
Outcome = tuple[Numbers, tuple[Equation, ...], int]
Drawer = Callable[[Situation, Draw], Outcome | None]


@dataclass(frozen=True)
class Step:
    """A kind of step: it may follow in `scenes`, leads to scene `to` (None: stays), `weight` says how
    often."""

    wordings: templates.Wordings
    draw: Drawer
    scenes: tuple[str, ...]
    to: str | None = None
    equations: int = 1
    weight: int = 2


def _add(now: Situation, draw: Draw) -> Outcome | None:
    high = min(45, VALUE_MAX - now.value)
    if high < 3:
        return None
    n = draw.between(3, high)
    return {"n": n}, ((now.value, "+", n),), now.value + n


def _subtract(now: Situation, draw: Draw) -> Outcome | None:
    if now.value < 6:
        return None
    n = draw.between(3, now.value - 2)
    return {"n": n}, ((now.value, "-", n),), now.value - n


def _groups(now: Situation, draw: Draw) -> Outcome:
    n, k = draw.between(4, 45), draw.between(4, 45)
    return {"n": n, "k": k}, ((n, "+", k),), n + k


def _start_boxes(now: Situation, draw: Draw) -> Outcome:
    n, k = draw.between(3, 19), draw.between(2, 5)
    return {"n": n, "k": k}, ((n, "x", k),), n * k


def _start(now: Situation, draw: Draw) -> Outcome:
    return {}, (), draw.between(8, 80)


def _recall_add(now: Situation, draw: Draw) -> Outcome:
    return {"f": now.first}, ((now.value, "+", now.first),), now.value + now.first


def _recall_subtract(now: Situation, draw: Draw) -> Outcome:
    return {"f": now.first}, ((now.value, "-", now.first),), now.value - now.first


def _product_add(now: Situation, draw: Draw) -> Outcome:
    n, k = draw.between(2, 15), draw.between(2, 5)
    return {"n": n, "k": k, "m": n * k}, ((n, "x", k), (now.value, "+", n * k)), now.value + n * k


def _product_subtract(now: Situation, draw: Draw) -> Outcome:
    n, k = draw.between(2, 15), draw.between(2, 5)
    return {"n": n, "k": k, "m": n * k}, ((n, "x", k), (now.value, "-", n * k)), now.value - n * k


def _multiply(now: Situation, draw: Draw) -> Outcome | None:
    high = min(5, VALUE_MAX // now.value)
    if high < 2:
        return None
    k = draw.between(2, high)
    return {"k": k}, ((now.value, "x", k),), now.value * k


def _multiply_more(now: Situation, draw: Draw) -> Outcome | None:
    """Three to five times: "2 times as many" reads badly and has wordings of its own."""
    high = min(5, VALUE_MAX // now.value)
    if high < 3:
        return None
    k = draw.between(3, high)
    return {"k": k}, ((now.value, "x", k),), now.value * k


def _divide(now: Situation, draw: Draw) -> Outcome | None:
    k = draw.between(2, 5)
    if now.value % k:
        return None
    return {"k": k}, ((now.value, "/", k),), now.value // k


def _goal(now: Situation, draw: Draw) -> Outcome | None:
    if now.value > VALUE_MAX - 3:
        return None
    g = draw.between(now.value + 3, min(VALUE_MAX, now.value + 50))
    return {"g": g}, ((g, "-", now.value),), g - now.value


def _together(now: Situation, draw: Draw) -> Outcome:
    return {"w": now.other}, ((now.other, "+", now.value),), now.other + now.value


def _difference(now: Situation, draw: Draw) -> Outcome:
    a, b = max(now.value, now.other), min(now.value, now.other)
    return {"a": a, "b": b}, ((a, "-", b),), a - b


def _exactly(op: str, k: int) -> Drawer:
    """Times or divided by a number that the wording fixes."""

    def draw_exactly(now: Situation, draw: Draw) -> Outcome | None:
        if op == "/" and now.value % k:
            return None
        return {}, ((now.value, op, k),), now.value * k if op == "x" else now.value // k

    return draw_exactly


_ONE, _THINGS, _PAIR, _MONEY = ("one",), ("one", "pair"), ("pair",), ("money",)
STEPS: Mapping[str, Step] = {
    "start": Step(templates.START, _start, ("start",), "one", equations=0, weight=6),
    "start_boxes": Step(templates.START_BOXES, _start_boxes, ("start",), "one"),
    "start_groups": Step(templates.START_GROUPS, _groups, ("start",), "one"),
    "gain": Step(templates.GAIN, _add, _THINGS, weight=3),
    "lose": Step(templates.LOSE, _subtract, _THINGS, weight=3),
    "give": Step(templates.GIVE, _subtract, _THINGS),
    "recall_gain": Step(templates.RECALL_GAIN, _recall_add, _ONE, weight=4),
    "recall_give": Step(templates.RECALL_GIVE, _recall_subtract, _ONE, weight=4),
    "boxes_gain": Step(templates.BOXES_GAIN, _product_add, _THINGS, equations=2),
    "days_gain": Step(templates.DAYS_GAIN, _product_add, _THINGS, equations=2),
    "days_use": Step(templates.DAYS_USE, _product_subtract, _THINGS, equations=2),
    "hand_out": Step(templates.HAND_OUT, _product_subtract, _THINGS, equations=2),
    "double": Step(templates.DOUBLE, _exactly("x", 2), _THINGS),
    "times": Step(templates.TIMES, _multiply_more, _THINGS),
    "half": Step(templates.HALF, _exactly("/", 2), _THINGS, weight=3),
    "third": Step(templates.THIRD, _exactly("/", 3), _THINGS),
    "more": Step(templates.MORE, _add, _ONE, "pair", weight=3),
    "fewer": Step(templates.FEWER, _subtract, _ONE, "pair", weight=3),
    "times_as_many": Step(templates.TIMES_AS_MANY, _multiply_more, _ONE, "pair", weight=3),
    "twice_as_many": Step(templates.TWICE_AS_MANY, _exactly("x", 2), _ONE, "pair", weight=3),
    "half_as_many": Step(templates.HALF_AS_MANY, _exactly("/", 2), _ONE, "pair", weight=3),
    "combine": Step(templates.COMBINE, _together, _PAIR, "one", weight=12),
    "sell": Step(templates.SELL, _multiply, _ONE, "money", weight=6),
    "earn": Step(templates.EARN, _add, _MONEY, weight=3),
    "spend": Step(templates.SPEND, _subtract, _MONEY, weight=3),
    "tickets": Step(templates.TICKETS, _product_subtract, _MONEY, equations=2, weight=3),
    "money_half": Step(templates.MONEY_HALF, _exactly("/", 2), _MONEY),
}
ENDINGS: Mapping[str, Step] = {
    "together": Step(templates.TOGETHER, _together, _PAIR, "done", weight=8),
    "difference": Step(templates.DIFFERENCE, _difference, _PAIR, "done", weight=8),
    "goal": Step(templates.GOAL, _goal, _ONE, "done", weight=3),
    "share": Step(templates.SHARE, _divide, _ONE, "done", weight=4),
    "pack": Step(templates.PACK, _divide, _ONE, "done", weight=4),
    "money_goal": Step(templates.MONEY_GOAL, _goal, _MONEY, "done"),
    "money_share": Step(templates.MONEY_SHARE, _divide, _MONEY, "done"),
    "money_buy": Step(templates.MONEY_BUY, _divide, _MONEY, "done"),
}
ASKS: Mapping[str, templates.Wordings] = {
    "one": templates.ASK,
    "pair": templates.ASK,
    "money": templates.MONEY_ASK,
}

SCENES = ("start", "one", "pair", "money")


def _by_scene(table: Mapping[str, Step], scene: str) -> tuple[str, ...]:
    return tuple(name for name, step in table.items() if scene in step.scenes for _ in range(step.weight))


_MIDDLE = {scene: _by_scene(STEPS, scene) for scene in SCENES}
_END = {scene: _by_scene(ENDINGS, scene) for scene in SCENES}
_ALL = {**STEPS, **ENDINGS}
_COMPARISONS = frozenset(name for name, step in STEPS.items() if step.to == "pair")

Event = tuple[str, Step, Numbers]


def plan(draw: Draw, targets: Sequence[int] = (2, 3, 3, 4, 4, 4, 5, 5, 5, 5)) -> tuple[list[Event], Situation] | None:
    """One walk of as many equations as one of `targets` says, or None when it ran into a dead end (the caller draws again)."""
    target = draw.pick(targets)
    now = Situation()
    events: list[Event] = []
    used: set[str] = set()
    tries = 0
    while now.scene != "done" and (now.scene == "start" or len(now.equations) < target):
        tries += 1
        if tries > 30:
            return None
        left = target - len(now.equations)
        ending = left == 1 and bool(events) and draw.uniform() < 0.5
        name = draw.pick((_END if ending else _MIDDLE)[now.scene])
        step = _ALL[name]
        if name in used or step.equations > left or (name in _COMPARISONS and now.compared):
            continue
        outcome = step.draw(now, draw)
        if outcome is None:
            continue
        numbers, equations, result = outcome
        if not VALUE_MIN <= result <= VALUE_MAX:
            continue
        # Results of one digit are kept few: most of the arithmetic should be of two digits.
        if result < 10 and draw.uniform() < 0.6:
            continue
        used.add(name)
        numbers |= {"v": now.value, "r": result}
        events.append((name, step, numbers))
        now.equations.extend(equations)
        if name in _COMPARISONS:
            now.other, now.compared = now.value, True
        if now.scene == "start":
            now.first = result
        # "As many as at first" must point back over at least one step, and at this person's own beginning.
        if len(events) == 1 or now.compared:
            used.update(("recall_gain", "recall_give"))
        elif len(events) == 2:
            used.difference_update(("recall_gain", "recall_give"))
        now.value = result
        now.scene = step.to or now.scene
    return events, now
