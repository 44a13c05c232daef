"""Whole rows of a tree of tensors: repeat, reorder, replace. What every part's private state must survive.

    pick(tree, [0, 0, 1, 1])      every row twice            interleave([a, b])      rows a0 b0 a1 b1 ..
    pick(tree, [2, 0])            some rows, in this order   choose(where, a, b)     row by row a where True, else b

A tree is a tensor, None or a number, or a tuple, list, dict or dataclass of trees. A tensor of it has rows first; one whose first dimension
is 1 among several rows holds for all of them, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def over(function: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """`function` of every tensor of a tree, and of the tensors at the same place of the other trees, which have its form."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in fields(tree)]
        parts = {name: over(function, getattr(tree, name), *(getattr(one, name) for one in others)) for name in names}
        # What holds no tensors (a model's spec) stays the very object that it was.
        return tree if all(parts[name] is getattr(tree, name) for name in names) else replace(tree, **parts)
    if isinstance(tree, dict):
        return {key: over(function, value, *(one[key] for one in others)) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        made = [over(function, *several) for several in zip(tree, *others, strict=True)]
        if all(one is other for one, other in zip(made, tree, strict=True)):
            return tree
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    return tree


def _has_rows(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows


def pick(tree: Any, index: Int[Tensor, "N"], rows: int) -> Any:
    """The rows `index` of a tree of `rows` rows."""
    return over(lambda one: one.index_select(0, index) if _has_rows(one, rows) else one, tree)


def interleave(trees: Sequence[Any], rows: int) -> Any:
    """K trees of one form as one of rows * K rows: row r of tree k becomes row r * K + k."""
    return over(lambda *ones: torch.stack(ones, 1).flatten(0, 1) if _has_rows(ones[0], rows) else ones[0], *trees)


def choose(where: Bool[Tensor, "B"], tree: Any, other: Any) -> Any:
    """Row by row from `tree` where True, from `other` elsewhere; both have the same form."""
    rows = where.shape[0]

    def one(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(where.view(-1, *[1] * (a.ndim - 1)), a, b) if _has_rows(a, rows) else b

    return over(one, tree, other)
