"""Sweeps: a value written as `{_sweep_: [0.7, 0.8, 0.9]}` under `configurations` stands for each of its values in turn.

    configurations:
      d2f:
        model: student
        decoder: {_component_: d2f, threshold: {_sweep_: [0.7, 0.9]}, block_length: {_sweep_: [16, 32]}}
        cache: block_causal

becomes four configurations, d2f[threshold=0.7,block_length=16] to d2f[threshold=0.9,block_length=32]: the grid, the last sweep fastest.
Values without a short name get one: `{_sweep_: {fast: {_component_: d2f, threshold: 0.5}, safe: vanilla}}` gives [decoder=fast] and
[decoder=safe]. A sweep may lie inside a value of another. A plain list stays the list that a component takes.

The grid is made of the recipe as written, before it is checked, so that an error of a cell points at the line of its value.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from dllm_toolkit.recipe_errors import RecipeError
from dllm_toolkit.recipe_hints import COMPONENT
from dllm_toolkit.yaml_marks import Node, dump, join, kind_of

SWEEP = "_sweep_"
CONFIGURATIONS = "configurations"
LARGEST = 1000
"""Configurations of a grid that are run without asking; `sweep.largest` in a recipe says otherwise."""

_Choice = tuple[tuple[str, ...], str]  # the keys under which a sweep stands, and the name of the value chosen


def expand(root: Node) -> Node:
    """The recipe with the configurations that its sweeps stand for. Raises `RecipeError` for a sweep that is none, or is too large."""
    if not isinstance(root.value, dict) or not _sweeps(root):
        return root
    for key, child in root.value.items():
        if key != CONFIGURATIONS:
            _forbid(child, key)
    configurations = root.value.get(CONFIGURATIONS)
    if configurations is None or not isinstance(configurations.value, dict) or SWEEP in configurations.value:
        _forbid(root, "")
    assert configurations is not None
    count = sum(_count(node, join(CONFIGURATIONS, name)) for name, node in configurations.value.items())
    _require_small(root, configurations, count)
    cells: dict[str, Node] = {}
    for name, node in configurations.value.items():
        if SWEEP in (node.value if isinstance(node.value, dict) else ()):
            message = "a whole configuration is no value to sweep. Put the sweep on what differs inside it."
            raise RecipeError(node.mark, join(CONFIGURATIONS, name), message, "decoder: {_sweep_: {one: ..., other: ...}}")
        swept = _places(node, ())
        for choices, cell in _grid(node, ()):
            title = name + _suffix(choices, swept)
            if title in cells:
                message = f"two configurations are called {title!r}. Rename one of them, or drop a value of the sweep."
                raise RecipeError(node.key_mark or node.mark, join(CONFIGURATIONS, title), message)
            cells[title] = dataclasses.replace(cell, key_mark=node.key_mark)
    changed = dataclasses.replace(configurations, value=cells)
    return dataclasses.replace(root, value={**root.value, CONFIGURATIONS: changed})


def is_cell(name: str) -> bool:
    """Whether a configuration of this name came out of a sweep."""
    return name.endswith("]")


def _sweeps(node: Node) -> bool:
    if isinstance(node.value, dict):
        return SWEEP in node.value or any(map(_sweeps, node.value.values()))
    return isinstance(node.value, list) and any(map(_sweeps, node.value))


def _forbid(node: Node, path: str) -> None:
    """Raise at the first sweep under `node`."""
    if isinstance(node.value, dict) and SWEEP in node.value:
        at = node.value[SWEEP].key_mark or node.mark
        message = f"a sweep stands inside a configuration of a comparison, got one at {path or 'the top'}. One run has one task and one "
        raise RecipeError(
            at, path, f"{message}set-up, so that its rows can be compared. Write it under configurations, or one recipe for each."
        )
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for key, child in children:
        _forbid(child, join(path, key))


def _values(node: Node, path: str) -> dict[str, Node]:
    """Name -> value of a sweep, checked."""
    sweep = node.value[SWEEP]
    if len(node.value) > 1:
        others = ", ".join(key for key in node.value if key != SWEEP)
        message = f"`{SWEEP}` stands alone, got {others} beside it. A sweep replaces the whole value."
        component = node.value.get(COMPONENT)
        write = (
            None if component is None else f"{SWEEP}: {{first: {{{COMPONENT}: {dump(component.plain(), flow=True)}, ...}}, second: ...}}"
        )
        raise RecipeError(sweep.key_mark or sweep.mark, path, message, write)
    if not isinstance(sweep.value, dict | list):
        message = f"`{SWEEP}` takes a list of values, got {kind_of(sweep.value)}."
        raise RecipeError(sweep.mark, path, message, f"{SWEEP}: [{dump(sweep.plain(), flow=True)}, ...]")
    if not sweep.value:
        raise RecipeError(sweep.mark, path, f"`{SWEEP}` is empty. A sweep needs values. Write at least one.")
    named = sweep.value.items() if isinstance(sweep.value, dict) else [(_label(value, path), value) for value in sweep.value]
    found: dict[str, Node] = {}
    for name, value in named:
        if not re.fullmatch(r"[\w.+-]+", name):
            message = f"a name of a sweep's values is letters, digits and _ . + -, got {name!r}."
            raise RecipeError(value.mark, path, message, f"{SWEEP}: {{<name>: {dump(value.plain(), flow=True)}, ...}}")
        if name in found:
            message = f"two values of the sweep are called {name!r}, which would be one configuration twice. Drop one, or name both."
            raise RecipeError(value.mark, path, message, f"{SWEEP}: {{<name>: {dump(value.plain(), flow=True)}, ...}}")
        found[name] = value
    return found


def _label(node: Node, path: str) -> str:
    """The name of a value in a sweep's list: a scalar itself, a component's own name."""
    value = node.value
    if isinstance(value, dict) and COMPONENT in value:
        value = value[COMPONENT].value
    if isinstance(value, dict | list):
        message = f"{kind_of(value)} in a sweep has no short name."
        raise RecipeError(node.mark, path, message, f"{SWEEP}: {{<name>: {dump(node.plain(), flow=True)}, ...}}")
    # One name for one value, however it was typed: 0.80 and 0.8 are the same cell.
    return dump(value, flow=True) if not isinstance(value, str) else value


def _count(node: Node, path: str) -> int:
    """Cells of a value, counted without making them."""
    if isinstance(node.value, dict) and SWEEP in node.value:
        return sum(_count(value, path) for value in _values(node, path).values())
    if isinstance(node.value, dict):
        return math.prod(_count(child, join(path, key)) for key, child in node.value.items())
    if isinstance(node.value, list):
        return math.prod(_count(child, join(path, index)) for index, child in enumerate(node.value))
    return 1


def _require_small(root: Node, configurations: Node, count: int) -> None:
    options = root.value.get("sweep")
    largest = options.value.get("largest") if options is not None and isinstance(options.value, dict) else None
    # What is no whole number is left for the check of the recipe to report.
    most = largest.value if largest is not None and type(largest.value) is int else LARGEST
    if count > most:
        message = f"the sweeps make {count:,} configurations, and at most {most:,} are run unasked. Sweep less, or allow it."
        raise RecipeError(configurations.key_mark or configurations.mark, CONFIGURATIONS, message, f"sweep: {{largest: {count}}}")


def _grid(node: Node, keys: tuple[str, ...]) -> list[tuple[tuple[_Choice, ...], Node]]:
    """Every choice of the sweeps under `node`, with the value that it gives; the last sweep changes fastest."""
    if isinstance(node.value, dict) and SWEEP in node.value:
        cells = []
        for name, value in _values(node, ".".join(keys)).items():
            placed = dataclasses.replace(value, key_mark=node.key_mark)
            cells += [(((keys, name), *inner), made) for inner, made in _grid(placed, keys)]
        return cells
    if isinstance(node.value, dict):
        names, children = list(node.value), list(node.value.values())
    elif isinstance(node.value, list):
        names, children = [str(index) for index in range(len(node.value))], node.value
    else:
        return [((), node)]
    grids = [_grid(child, (*keys, name)) for name, child in zip(names, children, strict=True)]
    cells = []
    for picked in itertools.product(*grids):
        choices = tuple(choice for inner, _ in picked for choice in inner)
        values = [value for _, value in picked]
        made = dict(zip(names, values, strict=True)) if isinstance(node.value, dict) else values
        cells.append((choices, dataclasses.replace(node, value=made)))
    return cells


def _suffix(choices: Sequence[_Choice], swept: set[tuple[str, ...]]) -> str:
    """`[threshold=0.8,block_length=16]`: the last key of each sweep, more of them where two sweeps share it."""
    if not choices:
        return ""
    return "[" + ",".join(f"{_shortest(keys, swept)}={name}" for keys, name in choices) + "]"


def _places(node: Node, keys: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Where sweeps stand in a configuration, those inside of values included."""
    if isinstance(node.value, dict) and SWEEP in node.value:
        inner = (_places(value, keys) for value in _values(node, ".".join(keys)).values())
        return {keys}.union(*inner)
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    return set().union(*(_places(child, (*keys, str(key))) for key, child in children))


def _shortest(keys: tuple[str, ...], swept: set[tuple[str, ...]]) -> str:
    for length in range(1, len(keys)):
        tail = keys[-length:]
        if not tail[0].isdecimal() and sum(other[-length:] == tail for other in swept) == 1:
            return ".".join(tail)
    return ".".join(keys)
