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
MOST_RULES = 24  # functions of decoders in one of them; each holds its scratch memory, some of it as large as the logits


class Workspace:
    """kv, pool, and functions by name, compiled and recorded.

    single: a buffer of one row, which is written anew before a forward of that row. unused: buffers that a larger one replaced; graphs may
    read them.
    """

    def __init__(self, kv: KVBuffer, pool: Pool) -> None:
        self.kv, self.pool = kv, pool
        self.units: dict[Hashable, Callable[..., Any]] = {}
        self.single: KVBuffer | None = None
        self.unused: list[KVBuffer] = []
        self.busy = True

    def unit(self, name: Hashable, function: Callable[..., Any], *, compiled: bool = True) -> Callable[..., Any]:
        """`function`, compiled, and replayed where there are graphs. The first function of a name is the one that counts."""
        found = self.units.get(name)
        if found is None:
            found = self.units[name] = Replayed(function, self.pool, compiled=compiled, kept=_notes_of(weakref.ref(self)))
        return found

    def one_row(self, buffer: Callable[[int, int], KVBuffer]) -> KVBuffer:
        """`single` with as many slots as `kv`, made when it is first wanted. Graphs that were recorded on another one keep that."""
        if self.single is None or self.single.slots != self.kv.slots:
            with torch.inference_mode(False), torch.no_grad():  # as `kv` was made
                self.single = buffer(1, self.kv.slots)
        return self.single

    def again(self) -> None:
        """As if it were new, for another decode. What a mask hides is multiplied by 0, which is not enough for NaN."""
        for one in (self.kv.keys, self.kv.values, self.kv.hidden):
            if one is not None:
                one.zero_()
        rules = [name for name in self.units if isinstance(name, tuple) and name[0] == "rule"]
        for name in rules[:-MOST_RULES]:
            del self.units[name]

    def release(self) -> None:
        self.busy = False


def _notes_of(space: weakref.ref[Workspace]) -> Callable[[], Iterable[Tensor]]:
    # No cycle of references: what is given up must give its memory back at once.
    def kept() -> Iterable[Tensor]:
        mine = space()
        # Wrappers count in their notes; keys and values are written anew, with the same values.
        return () if mine is None else mine.kv.notes.buffers()

    return kept


def take(owner: object, model: nn.Module, key: tuple[Any, ...], new: Callable[[], Workspace]) -> Workspace:
    """A workspace for `owner`, given back when that object is gone. key: everything that recorded graphs depend on besides the weights."""
    kept: dict[Hashable, list[Workspace]] = model.__dict__.setdefault("_workspaces", {})
    full = (*(one if _hashable(one) else id(one) for one in key), _settings(model), _places(model))
    for stale in [one for one in kept if isinstance(one, tuple) and one[-1] != full[-1]]:
        del kept[stale]  # recorded for weights that lay elsewhere
    same = kept.pop(full, [])
    kept[full] = same  # the latest one last
    space = next((one for one in same if not one.busy), None)
    if space is not None:
        space.again()
    else:
        try:
            space = new()
        except torch.OutOfMemoryError:
            for several in kept.values():  # idle ones make room
                several[:] = [one for one in several if one.busy]
        space = new() if space is None else space
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


def forget(model: nn.Module) -> None:
    """Give back the memory of what decodes of this model have left, on its device. The next one records anew."""
    model.__dict__.pop("_workspaces", None)


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _places(model: nn.Module) -> int:
    """Changes when a weight lies elsewhere: graphs read the weights where they lay when they were recorded."""
    tensors = [one for one in (*model.parameters(), *model.buffers()) if one.device.type != "meta"]
    return hash(tuple((one.data_ptr(), one.dtype) for one in tensors))


def _settings(model: nn.Module) -> int:
    """Changes when a module is set otherwise, as by an adapter that is off: settings are constants of a graph."""
    return hash(tuple(_plain(value) for module in model.modules() for name, value in vars(module).items() if not name.startswith(OTHER)))


OTHER = ("_forward", "_backward", "_full", "_state", "_load", "_non_persistent", "_workspaces", "_parameters", "_buffers", "_modules")


def _plain(value: object) -> Any:
    """A number, a word, or a few of them, such as a wrapper's scale or which adapters are on; None for everything else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((_plain(key), _plain(one)) for key, one in value.items())
    return None
