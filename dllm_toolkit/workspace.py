"""What a compiled decode leaves for the next one: the K/V buffer, compiled functions, recorded graphs.

Recording takes seconds, a short decode less than one, so the work of a decode is kept on the model and taken by the next decode of the same
shapes, cache and weights. One engine uses a workspace at a time; a second one at the same time makes its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.graphs import Pool, Replayed

MOST = 4  # workspaces of a model; each holds a K/V buffer


class Workspace:
    """kv, pool, and functions by name, compiled and recorded. `fresh`: nothing of it has been used before."""

    def __init__(self, kv: KVBuffer, pool: Pool) -> None:
        self.kv, self.pool = kv, pool
        self.units: dict[Hashable, Callable[..., Any]] = {}
        self.unused: list[KVBuffer] = []
        self.busy = True

    def unit(self, name: Hashable, function: Callable[..., Any], *, compiled: bool = True) -> Callable[..., Any]:
        """`function`, compiled, and replayed where there are graphs. The first function of a name is the one that counts."""
        found = self.units.get(name)
        if found is None:
            found = self.units[name] = Replayed(function, self.pool, compiled=compiled, kept=self._kept)
        return found

    def _kept(self) -> Iterable[Tensor]:
        # Wrappers count in their notes; keys and values are written anew, with the same values.
        return self.kv.notes.buffers()

    def release(self) -> None:
        self.busy = False


def take(owner: object, model: nn.Module, key: tuple[Any, ...], new: Callable[[], Workspace]) -> Workspace:
    """A workspace for `owner`, given back when that object is gone. key: everything that recorded graphs depend on besides the weights."""
    kept: dict[Hashable, list[Workspace]] = model.__dict__.setdefault("_workspaces", {})
    full = (*(one if _hashable(one) else id(one) for one in key), _places(model))
    for stale in [one for one in kept if isinstance(one, tuple) and one[-1] != full[-1]]:
        del kept[stale]  # recorded for weights that lay elsewhere
    same = kept.pop(full, [])
    kept[full] = same  # the latest one last
    space = next((one for one in same if not one.busy), None)
    if space is None:
        space = new()
        if not len(space.kv.notes):  # what a wrapper remembers has no form in which it can begin anew
            same.append(space)
            while sum(map(len, kept.values())) > MOST:
                oldest = next(name for name, several in kept.items() if several)
                kept[oldest].pop(0)
                if not kept[oldest]:
                    del kept[oldest]
    space.busy = True
    weakref.finalize(owner, space.release)
    return space


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _places(model: nn.Module) -> int:
    """Changes when a weight lies elsewhere: graphs read the weights where they lay when they were recorded."""
    tensors = [*model.parameters(), *model.buffers()]
    return hash((model.training, *(one.data_ptr() for one in tensors if one.device != torch.device("meta"))))
