"""Countdown: reach a target from a few numbers with + - * /, each number used exactly once.

Problems are drawn backwards: numbers, then a random tree of operations whose every intermediate result is a positive whole number, then its
value as the target. So each has a solution. A hash of the numbers and the target decides the split; public test problems are never drawn.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Literal

from dllm_toolkit.data.plan import Draw
from dllm_toolkit.data.public import is_public

Split = Literal["train", "heldout"]
LARGEST = 99
TARGETS = range(10, 101)
HELDOUT_OF = 10


@dataclass(frozen=True)
class Countdown:
    """numbers: to be used once each. solution: one of perhaps many expressions with value `target`."""

    numbers: tuple[int, ...]
    target: int
    solution: str


def key_of(numbers: Sequence[int], target: int) -> str:
    """The same for the same problem, whatever the order of its numbers."""
    return f"countdown/{','.join(map(str, sorted(numbers)))}={target}"


def split_of(key: str) -> Split:
    return "heldout" if zlib.crc32(key.encode()) % HELDOUT_OF == 0 else "train"


def countdown(seed: int, index: int, split: Split, count: int = 3) -> Countdown:
    """Problem number `index` of the endless sequence that `seed` makes for `split`, with `count` numbers; always the same one."""
    draw = Draw(int.from_bytes(blake2b(f"countdown/{seed}/{index}/{split}/{count}".encode(), digest_size=8).digest(), "little"))
    while True:
        numbers = tuple(draw.between(1, LARGEST) for _ in range(count))
        made = _combine(numbers, draw)
        if made is None or made[0] not in TARGETS:
            continue
        key = key_of(numbers, made[0])
        if split_of(key) == split and not is_public(key):
            return Countdown(numbers, made[0], made[1])


def _combine(numbers: tuple[int, ...], draw: Draw) -> tuple[int, str] | None:
    """Combine two of the values at random until one is left; None where a step has no whole positive result."""
    values: list[tuple[int, str]] = [(number, str(number)) for number in numbers]
    while len(values) > 1:
        (a, left), (b, right) = (values.pop(int(draw.uniform() * len(values))) for _ in range(2))
        sign = draw.pick("+-*/")
        if (sign == "-" and a <= b) or (sign == "/" and a % b):
            return None
        result = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a // b
        values.append((result, f"({left} {sign} {right})"))
    return values[0][0], values[0][1].removeprefix("(").removesuffix(")") if len(numbers) > 1 else values[0][1]


def value_of(expression: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """Value and numbers of an expression of whole numbers, + - * / and brackets; None for anything else. Nothing is evaluated."""
    if len(expression) > 200:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        used: list[int] = []
        return _value(tree, used), tuple(used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left, used), _value(node.right, used)
        if isinstance(node.op, ast.Add):
            return a + b
        if isinstance(node.op, ast.Sub):
            return a - b
        if isinstance(node.op, ast.Mult):
            return a * b
        if isinstance(node.op, ast.Div):
            return a / b
    raise ValueError("not arithmetic of whole numbers")


_LINE = re.compile(r"[0-9(][0-9()+\-*/x\u00d7\u00f7\s]*[+\-*/x\u00d7\u00f7][0-9()+\-*/x\u00d7\u00f7\s]*[0-9)]")
_ASCII = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/"})
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def expression_of(text: str) -> str | None:
    """The expression that a text ends with, or the last <answer>...</answer> in it: the last one of the last line that has one.

    `= result` behind it is left out; None if there is no expression.
    """
    tagged = _TAGGED.findall(text)
    text = (tagged[-1] if tagged else text).replace("\\times", "*").replace("\\div", "/")
    for line in reversed(text.strip().splitlines()):
        found = _LINE.findall(line)
        if found:
            return found[-1].translate(_ASCII).strip()
    return None


def solves(expression: str | None, numbers: Sequence[int], target: int) -> bool:
    """Whether the expression has the value and uses every number exactly once."""
    found = None if expression is None else value_of(expression)
    return found is not None and found[0] == target and sorted(found[1]) == sorted(numbers)


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that solves the problem, found by trying; None if there is none. For up to five numbers."""

    def search(values: list[tuple[Fraction, str]]) -> str | None:
        if len(values) == 1:
            return values[0][1] if values[0][0] == target else None
        for i, (a, left) in enumerate(values):
            for j, (b, right) in enumerate(values):
                if i == j:
                    continue
                rest = [value for k, value in enumerate(values) if k not in (i, j)]
                made = [(a - b, f"({left} - {right})")]
                if i < j:
                    made += [(a + b, f"({left} + {right})"), (a * b, f"({left} * {right})")]
                if b:
                    made.append((a / b, f"({left} / {right})"))
                for result in made:
                    found = search([*rest, result])
                    if found is not None:
                        return found
        return None

    found = search([(Fraction(number), str(number)) for number in numbers])
    return found[1:-1] if found is not None and found.startswith("(") else found
