"""Models around a model: what they have in common, and how they run fewer lanes than they were asked.

A wrapper answers a `Query` with the help of another model. What it remembers of a decode lies in the K/V buffer (`KVBuffer.notes`), slot by
slot, so it lives as long as the keys, follows the rows of the batch, and one wrapper can serve any number of decodes.

    guidance.py        two answers for one
    smoothing.py       masked positions see what was said of them before
    feature_reuse.py   layers skip positions whose values have hardly changed
    d2cache.py         only a chosen set of positions is computed at all

The last two are inexact by declaration: their answers are those of the model only at the limits of their arguments.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_toolkit import workspace
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import ModelError, Transformer
from dllm_toolkit.ops import lanes
from dllm_toolkit.types import ModelSpec


class Wrapper(nn.Module, abc.ABC):
    """A model around `model`; says of itself what that one says.

    reads_host: a forward reads a tensor on the host (`read_widths`), so it cannot be recorded as one graph.
    """

    reads_host: ClassVar[bool] = False

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self.model, "device", "cpu"))

    @property
    def tokenizer(self) -> object:
        """The model's own tokenizer, None if it has none."""
        return getattr(self.model, "tokenizer", None)

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return self.model.buffer(rows, slots)

    def computed(self, kv: KVBuffer) -> Float[Tensor, "B"] | None:
        """Query tokens of each row that really ran, over all forwards of the decode that `kv` belongs to; None if all did."""
        inner = getattr(self.model, "computed", None)
        return None if inner is None else inner(kv)

    def __getstate__(self) -> dict[str, Any]:  # recorded graphs read the weights of this very model
        return {name: value for name, value in self.__dict__.items() if name != "_workspaces"}

    def _apply(self, fn: Any, recurse: bool = True) -> Wrapper:
        place = self.device
        super()._apply(fn, recurse)
        if self.device != place:
            workspace.forget(self)
        return self

    @abc.abstractmethod
    def forward(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]: ...


def core(model: Model) -> Transformer:
    """The transformer inside all wrappers. Raises ModelError if there is none."""
    inner: Any = model
    while isinstance(inner, Wrapper):
        inner = inner.model
    return bare(inner, "a wrapper that looks into its model")


def recordable(model: Model) -> Transformer | None:
    """The transformer inside, if a forward of `model` runs without the host: it can be recorded and replayed. None otherwise."""
    inner: Any = model
    while isinstance(inner, Wrapper):
        if inner.reads_host:
            return None
        inner = inner.model
    return inner if isinstance(inner, Transformer) else None


def bare(model: Model, who: str) -> Transformer:
    """`model`, which must be a transformer without a wrapper. Raises ModelError otherwise."""
    if isinstance(model, Transformer):
        return model
    raise ModelError(
        f"{who} must be given a transformer, got {type(model).__name__}. It calls the layers one by one. "
        "Write model: {_component_: load, ...} inside it, and other wrappers around it."
    )


def prompt_of(query: Query, who: str) -> Bool[Tensor, "B W"]:
    """Which lanes hold the prompt. Raises ModelError if nobody says so."""
    if query.prompt is None:
        raise ModelError(
            f"{who} must be told which lanes hold the prompt, got a query without `prompt`. It treats them apart. "
            "Decode with `decode()`, or fill Query.prompt."
        )
    return query.prompt


def live_lanes(query: Query, kv: KVBuffer) -> Bool[Tensor, "B W"]:
    """Lanes that are not dead."""
    assert query.slots is not None
    return query.slots < kv.slots - 1


def predicted(query: Query, kv: KVBuffer, shift: int) -> Int[Tensor, "B R"]:
    """The slot whose token each read lane predicts; the trash slot for dead lanes."""
    assert query.read is not None
    trash = kv.slots - 1
    return torch.where(query.read < trash, query.read + shift, trash)


def choose(chosen: Bool[Tensor, "B W"], width: int) -> Int[Tensor, "B K"]:
    """Numbers of the chosen lanes, packed to `width`; W stands for a dead lane."""
    return lanes.pack(chosen, width)


def take(values: Tensor, chosen: Int[Tensor, "B K"], dead: float | int | bool) -> Tensor:
    """`values` [B, W, ...] of the chosen lanes, `dead` where W was chosen."""
    padded = torch.cat((values, torch.full_like(values[:, :1], dead)), dim=1)
    index = chosen.reshape(*chosen.shape, *(1,) * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return padded.gather(1, index)


def narrow(query: Query, chosen: Int[Tensor, "B K"], kv: KVBuffer) -> Query:
    """The same query with the chosen lanes only. Dead ones see, read and write the trash slot, as the engine's do."""
    assert query.slots is not None and query.allow is not None
    dead = (chosen == query.tokens.shape[1]).unsqueeze(2)
    trash = kv.slots - 1
    only_trash = torch.arange(kv.slots, device=chosen.device) == trash
    return query._replace(
        tokens=take(query.tokens, chosen, 0),
        positions=take(query.positions, chosen, 0),
        slots=take(query.slots, chosen, trash),
        allow=torch.where(dead, only_trash, take(query.allow, chosen, False)),
        prompt=None if query.prompt is None else take(query.prompt, chosen, False),
        added=None if query.added is None else take(query.added, chosen, 0.0),
    )


def store(memory: Float[Tensor, "B S width"], slots: Int[Tensor, "B K"], values: Float[Tensor, "B K width"]) -> None:
    """Write a row of features into each lane's slot, in place."""
    memory.scatter_(1, slots.unsqueeze(-1).expand_as(values), values)


def recall(memory: Float[Tensor, "B S width"], slots: Int[Tensor, "B W"]) -> Float[Tensor, "B W width"]:
    """The rows of features that lie in the lanes' slots."""
    return memory.gather(1, slots.unsqueeze(-1).expand(-1, -1, memory.shape[-1]))
