"""Compiled functions of pytrees, replayed as CUDA graphs where there is a GPU.

A decoding step is a few hundred small tensor operations around one forward. Launched one by one they cost more than the forward of an 8B
model, so a function is compiled once (`torch.compile`) and, on CUDA, recorded once for each signature and replayed:

    call 1 of a signature    clone the inputs (the static inputs), warm up on a side stream, record
    call 2, 3, ...           copy what lies elsewhere into the static inputs, replay, return the static outputs

Static outputs are overwritten by the next replay. A tensor that is already a static output of another `Replayed` in the same `Pool` is
taken as it is, so a chain of them copies nothing. A function may update its inputs in place (a state that goes round in a loop); the
inputs are put back after the warm-up, so a call has its effect once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

PyTree = Any


def leaves(tree: PyTree) -> Iterator[Tensor]:
    """The tensors of tuples, lists, dicts and dataclasses, in a fixed order; everything else is a constant."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for one in tree:
            yield from leaves(one)
    elif isinstance(tree, dict):
        for one in tree.values():
            yield from leaves(one)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            yield from leaves(getattr(tree, field.name))


def rebuild(tree: PyTree, tensors: Iterator[Tensor]) -> PyTree:
    """The same tree with other tensors, taken in the order of `leaves`."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, tuple):
        made = [rebuild(one, tensors) for one in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else tuple(made)
    if isinstance(tree, list):
        return [rebuild(one, tensors) for one in tree]
    if isinstance(tree, dict):
        return {key: rebuild(one, tensors) for key, one in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = {field.name: rebuild(getattr(tree, field.name), tensors) for field in fields(tree) if field.init}
        return replace(tree, **changed)  # type: ignore[type-var]
    return tree


def signature(tree: PyTree) -> Any:
    """Shapes, types, strides and constants: what a recorded graph is good for. Hashable; constants count by value where they can."""
    if isinstance(tree, Tensor):
        return (tuple(tree.shape), tree.dtype, tree.stride())
    if isinstance(tree, tuple | list):
        return (type(tree), *map(signature, tree))
    if isinstance(tree, dict):
        return (dict, *((key, signature(one)) for key, one in tree.items()))
    if is_dataclass(tree) and not isinstance(tree, type) and next(leaves(tree), None) is not None:
        return (type(tree), *(signature(getattr(tree, field.name)) for field in fields(tree)))
    try:
        hash(tree)
    except TypeError:
        return id(tree)
    return tree


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, one launch for each type: the fused kernel wants tensors of one type."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        targets, sources = kinds.setdefault(target.dtype, ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)


class Pool:
    """What the graphs of one device share: memory, the static outputs that need no copy, the time spent on compiling and recording."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs = device.type == "cuda"
        self.handle = torch.cuda.graph_pool_handle() if self.graphs else None
        self.static: dict[int, Tensor] = {}
        self.recorded = 0
        self.seconds = 0.0

    def owns(self, tensor: Tensor) -> bool:
        known = self.static.get(tensor.data_ptr())
        return known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype

    def adopt(self, tree: PyTree) -> None:
        """From now on these tensors stay where they are: a recorded function may read them without a copy."""
        for tensor in leaves(tree):
            self.static[tensor.data_ptr()] = tensor


class _Recording:
    """One signature of one function: static inputs, the graph, static outputs."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], pool: Pool) -> None:
        self.pool = pool
        given = list(leaves(arguments))
        self.inputs = [one if pool.owns(one) else one.clone() for one in given]
        static = rebuild(arguments, iter(self.inputs))
        before = [one.clone() for one in self.inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*static)
                copy_all(zip(self.inputs, before, strict=True))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool.handle):
            self.outputs = function(*static)
        copy_all(zip(self.inputs, before, strict=True))
        pool.adopt((self.inputs, self.outputs))
        pool.recorded += 1

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        pairs = zip(self.inputs, leaves(arguments), strict=True)
        copy_all((mine, one) for mine, one in pairs if mine.data_ptr() != one.data_ptr())
        self.graph.replay()
        return self.outputs


class Replayed:
    """`function` compiled as one graph; on CUDA recorded for each signature of its arguments and replayed.

    mode: as for torch.compile. Outputs of a replay are overwritten by the next one: clone what must stay.
    """

    def __init__(self, function: Callable[..., Any], pool: Pool, mode: str | None = None) -> None:
        self.function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        self.pool = pool
        self.recordings: dict[Any, _Recording] = {}

    def __call__(self, *arguments: Any) -> Any:
        if not self.pool.graphs:
            return self.function(*arguments)
        key = signature(arguments)
        if key not in self.recordings:
            clock = time.perf_counter()
            self.recordings[key] = _Recording(self.function, arguments, self.pool)
            torch.cuda.synchronize()
            self.pool.seconds += time.perf_counter() - clock
        return self.recordings[key](arguments)
