"""dLLM-Cache: most positions of most layers add what they added before, so let them.

Besides keys and values, every layer remembers for every slot what attention and the feed-forward network added to the stream.

    first layer                    computed for every position, always
    prompt, every `prompt_interval` forwards, answer, every `response_interval`        computed anew in all layers
    other forwards, layer by layer:
        prompt                     adds what it added before
        answer     V of every position is computed and compared with the V that is stored (cosine)
                   the `ratio` least similar positions: q, k, attention, feed-forward anew
                   the others add what they added before; their V is stored, their K stays

        forward    0 1 2 3 4 5 6 7 8 ...             response_interval 7
        answer     # v v v v v v # v                 #  all    v  the least similar ones
        prompt     # . . . . . . . .                 .  nothing but the first layer

Positions whose slot has never been computed (a block that opens, a wide forward of a K/V cache) are computed in any case. All counts are
those of a row: its own forwards, its own answer. Inexact by declaration; with both intervals 1 it is the model itself.

The memory is 2 (layers - 1) rows of the model's width for each slot, about as much as the keys and values of plain heads once more.

Reference: dLLM-Cache: Accelerating Diffusion Large Language Models with Adaptive Caching, arXiv 2506.06295.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import Layer, ModelError
from dllm_toolkit.models.wrapper import Wrapper, bare, choose, live_lanes, narrow, prompt_of, recall, store, take
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register

NAME = "feature_reuse"


class Features(nn.Module):
    """What a decode remembers: per layer but the first and per slot what was added to the stream; per row forwards and layers run.

    attention, transform: [layers - 1, B, S, width]; known: slots that have been computed [B, S]; taken: forwards [B]; ran: lanes times
    layers that were computed [B].
    """

    attention: Tensor
    transform: Tensor
    known: Tensor
    taken: Tensor
    ran: Tensor

    def __init__(self, kv: KVBuffer, layers: int, width: int) -> None:
        super().__init__()
        options = {"dtype": kv.keys.dtype, "device": kv.keys.device}
        shape = (layers - 1, kv.rows, kv.slots, width)
        self.register_buffer("attention", torch.zeros(shape, **options), persistent=False)
        self.register_buffer("transform", torch.zeros(shape, **options), persistent=False)
        self.register_buffer("known", torch.zeros(kv.rows, kv.slots, dtype=torch.bool, device=kv.keys.device), persistent=False)
        self.register_buffer("taken", torch.zeros(kv.rows, dtype=torch.long, device=kv.keys.device), persistent=False)
        self.register_buffer("ran", torch.zeros(kv.rows, dtype=torch.long, device=kv.keys.device), persistent=False)


class Turn(NamedTuple):
    """What one forward does in every layer but the first.

    due: lanes that are computed; compared: lanes whose values are compared with those that are stored; least: how many of these are
    computed [B]; width, compares: the most lanes that a row computes, and compares.
    """

    query: Query
    slots: Int[Tensor, "B W"]
    due: Bool[Tensor, "B W"]
    compared: Bool[Tensor, "B W"]
    least: Int[Tensor, "B"]
    width: int
    compares: int


@register("model", NAME)
class FeatureReuse(Wrapper):
    """`model` with remembered attention and feed-forward outputs (dLLM-Cache, arXiv 2506.06295). Inexact.

    prompt_interval, response_interval: forwards from one computation of all prompt (answer) positions to the next, 1 for always. ratio: the
    share of the answer, rounded down, that the forwards in between compute.
    """

    reads_host = True
    cite = ("2506.06295",)

    def __init__(self, model: Model, prompt_interval: int = 50, response_interval: int = 7, ratio: float = 0.25) -> None:
        super().__init__(bare(model, "feature_reuse"))
        for name, value in (("prompt_interval", prompt_interval), ("response_interval", response_interval)):
            if value < 1:
                raise ModelError(f"{name} must be 1 or more, got {value}. It counts forwards, 1 computes always. Write {name}: 7.")
        if not 0 <= ratio <= 1:
            raise ModelError(f"ratio must be in [0, 1], got {ratio}. It is a share of the answer's positions. Write ratio: 0.25.")
        self.prompt_interval, self.response_interval, self.ratio = prompt_interval, response_interval, ratio

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        kv = super().buffer(rows, slots)
        kv.notes[NAME] = Features(kv, self.spec.layers, self.spec.width)
        return kv

    def computed(self, kv: KVBuffer) -> Float[Tensor, "B"]:
        """Query tokens that really ran, a mean over layers. The values that are only compared are not counted."""
        return cast(Features, kv.notes[NAME]).ran / self.spec.layers

    def forward(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        """Logits of the read slots; without a buffer there is nothing to reuse. Raises ModelError for a query without `prompt`."""
        if kv is None or query.slots is None:
            return self.model(query, kv)
        model, own = bare(self.model, NAME), cast(Features, kv.notes[NAME])
        live = live_lanes(query, kv)
        turn = self._turn(query, prompt_of(query, "feature_reuse"), live, own)
        x, lanes = model.enter(query), model.lanes(query, kv)
        for layer in cast("list[Layer]", model.layers):
            x = layer(x, lanes, kv) if layer.index == 0 else self._layer(layer, x, turn, kv)
        own.known.scatter_(1, query.slots, True)
        own.taken += live.any(1)
        own.ran += live.sum(1) + (self.spec.layers - 1) * (turn.due.sum(1) + turn.least)
        return model.leave(x, query, kv)

    def _turn(self, query: Query, prompt: Bool[Tensor, "B W"], live: Bool[Tensor, "B W"], own: Features) -> Turn:
        assert query.slots is not None
        now = own.taken.unsqueeze(1)
        falls = torch.where(prompt, now % self.prompt_interval == 0, now % self.response_interval == 0)
        due = live & (falls | ~own.known.gather(1, query.slots))
        rest = live & ~prompt & ~due
        least = (rest.sum(1) * self.ratio).floor().long()
        compared = rest & (least > 0).unsqueeze(1)
        # The one host read of a forward: how many lanes does the busiest row compute, and how many does it compare?
        from dllm_toolkit.ops.widths import read_widths  # a second to import, so only where it is used

        width, compares = read_widths((due.sum(1) + least).amax(), compared.sum(1).amax())
        return Turn(query, query.slots, due, compared, least, width, compares)

    def _layer(self, layer: Layer, x: Float[Tensor, "B W width"], turn: Turn, kv: KVBuffer) -> Float[Tensor, "B W width"]:
        own, model = cast(Features, kv.notes[NAME]), bare(self.model, NAME)
        attention, transform = own.attention[layer.index - 1], own.transform[layer.index - 1]  # [B, S, width]
        if turn.width == 0:
            return x + recall(attention, turn.slots) + recall(transform, turn.slots)
        chosen = turn.due | _least_similar(layer, x, turn, kv) if turn.compares else turn.due
        some = choose(chosen, turn.width)  # [B, K]
        narrowed = narrow(turn.query, some, kv)
        assert narrowed.slots is not None
        store(attention, narrowed.slots, layer.attend(take(x, some, 0.0), model.lanes(narrowed, kv), kv))
        x = x + recall(attention, turn.slots)
        store(transform, narrowed.slots, layer.transform(take(x, some, 0.0)))
        return x + recall(transform, turn.slots)


def _least_similar(layer: Layer, x: Float[Tensor, "B W width"], turn: Turn, kv: KVBuffer) -> Bool[Tensor, "B W"]:
    """The compared lanes whose values have turned most since they were stored. All new values are stored."""
    some = choose(turn.compared, turn.compares)  # [B, C]
    there = take(turn.slots, some, kv.slots - 1)
    index = kv.flat(there)
    new = layer.values(take(x, some, 0.0))  # [B, C, H, D]
    old = kv.values[layer.index].flatten(0, 1)[index].view_as(new)
    similar = F.cosine_similarity(new.flatten(2), old.flatten(2), dim=-1)
    kv.write_values(layer.index, index, new)
    rows, lanes = turn.slots.shape
    turned = select.top_k(-similar, some < lanes, turn.least)
    # Back from the compared lanes to all lanes; column W catches the dead ones.
    return torch.zeros(rows, lanes + 1, dtype=torch.bool, device=x.device).scatter(1, some, turned)[:, :-1]
