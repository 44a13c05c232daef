"""A transformer's forward in three compiled pieces: what comes in, one layer, what goes out.

One graph of all layers takes a minute to compile for every number of lanes. The layers are alike, so one compiled layer serves all of
them. Its seams lie so that nothing is lost: a layer leaves its last sum to the next one, where it is fused with the norm.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer, LayerBuffer
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.fused import in_parts, summed
from dllm_toolkit.models.transformer import Lanes, Layer, Transformer


def _enter(model: Transformer, query: Query, kv: KVBuffer) -> tuple[Tensor, Lanes]:
    return model.enter(query), model.lanes(query, kv)


def _first(layer: Layer, x: Tensor, lanes: Lanes, store: LayerBuffer) -> tuple[Tensor, Tensor]:
    x = x + layer.attend(x, lanes, store)
    return x, in_parts(layer.down_proj, layer.gated(x))


def _next(layer: Layer, x: Tensor, added: Tensor, lanes: Lanes, store: LayerBuffer) -> tuple[Tensor, Tensor]:
    """added: what the layer before adds to the stream, as terms of a sum [P, B, W, width]: they are added up where they are needed."""
    return _first(layer, x + summed(added, x.dtype), lanes, store)


def _leave(model: Transformer, x: Tensor, added: Tensor, query: Query, kv: KVBuffer) -> Tensor:
    return model.leave(x + summed(added, x.dtype), query, kv)


class Pieces:
    """Compiled once for each shape; calling it is a forward of any transformer."""

    def __init__(self) -> None:
        self.enter = torch.compile(_enter, fullgraph=True, dynamic=False)
        self.first = torch.compile(_first, fullgraph=True, dynamic=False)
        self.next = torch.compile(_next, fullgraph=True, dynamic=False)
        self.leave = torch.compile(_leave, fullgraph=True, dynamic=False)

    def __call__(self, model: Transformer, query: Query, kv: KVBuffer) -> Tensor:
        x, lanes = self.enter(model, query, kv)
        added: Tensor | None = None
        for index, layer in enumerate(cast("list[Layer]", model.layers)):
            store = kv.layer(index)
            x, added = self.first(layer, x, lanes, store) if added is None else self.next(layer, x, added, lanes, store)
        assert added is not None
        return self.leave(model, x, added, query, kv)
