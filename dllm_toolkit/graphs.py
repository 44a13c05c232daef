"""Compiled functions of pytrees, replayed as CUDA graphs where there is a GPU.

A decoding step is a few hundred small tensor operations around one forward. Launched one by one they cost more than the forward of an 8B
model, so a function is compiled once (`torch.compile`) and, on CUDA, recorded once for each signature and replayed:

    call 1 of a signature    clone the inputs (the static inputs), warm up on a side stream, record
    call 2, 3, ...           copy what lies elsewhere into the static inputs, replay, return the static outputs

Static outputs are overwritten by the next replay of the same function. A tensor that is already a static output of another `Replayed` in
the same `Pool` is taken where it is, so a chain of them copies nothing; a call with the very objects of an earlier call does not even look
at their tensors. A function may update its inputs in place; they are put back after the warm-up, so a call has its effect once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

PyTree = Any
Kind = Literal["cuda", "emulated"]
_emulated = False


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
    if is_dataclass(tree) and not isinstance(tree, type) and next(leaves(tree), None) is not None:
        changed = {field.name: rebuild(getattr(tree, field.name), tensors) for field in fields(tree) if field.init}
        return replace(tree, **changed)  # type: ignore[type-var]
    return tree


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, one launch for each type: the fused kernel wants tensors of one type.

    As if at once: what is another pair's target, too, is read before it is overwritten.
    """
    moved = [(target, source) for target, source in pairs if target.data_ptr() != source.data_ptr()]
    written = {target.data_ptr() for target, _ in moved}
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in moved:
        targets, sources = kinds.setdefault(target.dtype, ([], []))
        targets.append(target)
        sources.append(source.clone() if source.data_ptr() in written else source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Pools made meanwhile replay without a GPU: functions run as they are, on the same static inputs and into the same static outputs.

    For tests of everything around the graphs: what is static, what is copied, what the next replay overwrites.
    """
    global _emulated
    before, _emulated = _emulated, True
    try:
        yield
    finally:
        _emulated = before


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _expanded(tensor: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


class Pool:
    """What the graphs of one decode share: the tensors that stay where they are, and the time spent on compiling and recording."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind: Kind | None = "emulated" if _emulated else "cuda" if device.type == "cuda" else None
        self.static: dict[tuple[Any, ...], Tensor] = {}
        self.homes: dict[Any, PyTree] = {}
        self.seconds = 0.0

    def owns(self, tensor: Tensor) -> bool:
        return _place(tensor) in self.static

    def adopt(self, tree: PyTree) -> None:
        """From now on these tensors stay where they are: a recorded function may read them without a copy."""
        for tensor in leaves(tree):
            self.static[_place(tensor)] = tensor

    def hold(self, tree: PyTree) -> PyTree:
        """The tree in a place of its own that stays: the same object for every tree of its form, with this one's values."""
        if self.kind is None:
            return tree
        form = self.signature(tree, apart=False)
        home = self.homes.get(form)
        if home is None:
            home = self.homes[form] = rebuild(tree, (one.clone() for one in leaves(tree)))
            self.adopt(home)
        elif home is not tree:
            copy_all(zip(leaves(home), leaves(tree), strict=True))
        return home

    def signature(self, tree: PyTree, apart: bool = True) -> Any:
        """What a recorded graph is good for: shapes, types, strides and constants, and the place of what stays where it is. Hashable."""
        if isinstance(tree, Tensor):
            place = tree.data_ptr() if apart and self.owns(tree) else None
            return (tuple(tree.shape), tree.dtype, tree.stride(), place)
        if isinstance(tree, tuple | list):
            return (type(tree), *(self.signature(one, apart) for one in tree))
        if isinstance(tree, dict):
            return (dict, *((key, self.signature(one, apart)) for key, one in tree.items()))
        if is_dataclass(tree) and not isinstance(tree, type) and next(leaves(tree), None) is not None:
            return (type(tree), *(self.signature(getattr(tree, field.name), apart) for field in fields(tree)))
        try:
            hash(tree)
        except TypeError:
            return id(tree)
        return tree


class _Recording:
    """One signature of one function: static inputs, the graph, static outputs."""

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], pool: Pool, handle: Any, kept: Iterable[Tensor]
    ) -> None:
        self.function, self.pool = function, pool
        given = list(leaves(arguments))
        self.inputs = [one if pool.owns(one) else one.clone() for one in given]
        self.static = rebuild(arguments, iter(self.inputs))
        # A tensor that was expanded has several elements in one place: nobody writes to it.
        touched = [one for one in (*self.inputs, *kept) if not _expanded(one)]
        before = [one.clone() for one in touched]
        if pool.kind == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function(*self.static)
                    copy_all(zip(touched, before, strict=True))
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=handle):
                self.outputs = function(*self.static)
        else:
            made = function(*self.static)
            passed = {one.data_ptr() for one in self.inputs}
            kept_apart = (one if one.data_ptr() in passed else one.clone() for one in leaves(made))
            self.outputs = rebuild(made, kept_apart)
            copy_all(zip(touched, before, strict=True))
        pool.adopt((self.inputs, self.outputs))

    def fits(self, arguments: tuple[Any, ...]) -> bool:
        """Do all these tensors lie where the graph reads them?"""
        return all(mine.data_ptr() == one.data_ptr() for mine, one in zip(self.inputs, leaves(arguments), strict=True))

    def take(self, arguments: tuple[Any, ...]) -> None:
        copy_all(zip(self.inputs, leaves(arguments), strict=True))

    def replay(self) -> Any:
        if self.pool.kind == "cuda":
            self.graph.replay()
        else:
            copy_all(zip(leaves(self.outputs), leaves(self.function(*self.static)), strict=True))
        return self.outputs


class Replayed:
    """`function` compiled as one graph; on CUDA recorded for each signature of its arguments and replayed.

    compiled: False leaves the function as it is (it may call compiled ones) and only records it. kept: tensors besides the arguments that
    it changes, which the warm-up must leave as they were. Outputs of a replay are overwritten by the next one: clone what must stay.
    """

    def __init__(
        self, function: Callable[..., Any], pool: Pool, *, compiled: bool = True, kept: Callable[[], Iterable[Tensor]] = tuple
    ) -> None:
        self.function = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        self.pool, self.kept = pool, kept
        # A pool of memory of its own: the memory of one graph's output may be scratch memory of another graph of the same pool.
        self.handle = torch.cuda.graph_pool_handle() if pool.kind == "cuda" else None
        self.recordings: dict[Any, _Recording] = {}
        self._known: dict[tuple[int, ...], tuple[tuple[Any, ...], _Recording]] = {}

    def __call__(self, *arguments: Any) -> Any:
        if self.pool.kind is None:
            return self.function(*arguments)
        known = self._known.get(tuple(map(id, arguments)))
        return self._look_up(arguments) if known is None else known[1].replay()

    def _look_up(self, arguments: tuple[Any, ...]) -> Any:
        form = self.pool.signature(arguments)
        recording = self.recordings.get(form)
        if recording is None:
            clock = time.perf_counter()
            recording = _Recording(self.function, arguments, self.pool, self.handle, self.kept())
            self.recordings[form] = recording
            if self.pool.kind == "cuda":
                torch.cuda.synchronize()
            self.pool.seconds += time.perf_counter() - clock
        if recording.fits(arguments):
            # The arguments are kept, so that nothing else can have their identity.
            self._known[tuple(map(id, arguments))] = (arguments, recording)
        else:
            recording.take(arguments)
        return recording.replay()
