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
from dllm_toolkit.models.fused import in_parts, no_parts, summed
from dllm_toolkit.models.transformer import Lanes, Layer, Transformer


def _enter(model: Transformer, query: Query, kv: KVBuffer) -> tuple[Tensor, Tensor, Lanes]:
    x = model.enter(query)
    return x, no_parts(cast("Layer", model.layers[0]).down_proj, x), model.lanes(query, kv)


def _layer(layer: Layer, x: Tensor, added: Tensor, lanes: Lanes, store: LayerBuffer) -> tuple[Tensor, Tensor]:
    """added: what the layer before adds to the stream, as terms of a sum [P, B, W, width]: they are added up where they are needed.

    The first layer gets zeros of that form, so that it needs no graph of its own.
    """
    x = x + summed(added, x.dtype)
    x = x + layer.attend(x, lanes, store)
    return x, in_parts(layer.down_proj, layer.gated(x))


def _leave(model: Transformer, x: Tensor, added: Tensor, query: Query, kv: KVBuffer) -> Tensor:
    return model.leave(x + summed(added, x.dtype), query, kv)


class Pieces:
    """Compiled once for each shape; calling it is a forward of any transformer."""

    def __init__(self) -> None:
        self.enter = torch.compile(_enter, fullgraph=True, dynamic=False)
        self.layer = torch.compile(_layer, fullgraph=True, dynamic=False)
        self.leave = torch.compile(_leave, fullgraph=True, dynamic=False)

    def __call__(self, model: Transformer, query: Query, kv: KVBuffer) -> Tensor:
        x, added, lanes = self.enter(model, query, kv)
        for index, layer in enumerate(cast("list[Layer]", model.layers)):
            x, added = self.layer(layer, x, added, lanes, kv.layer(index))
        return self.leave(model, x, added, query, kv)
