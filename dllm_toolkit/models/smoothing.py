"""Iteration smoothing (dInfer): a masked position sees, besides the mask, a little of what the model said of it last time.

    forward t:  input of a masked position   emb(M) + w * sum_v p(v) emb(v)       p: its distribution when it was last read
                w = min(start + growth * s, most)                                 s: the number of that forward, from 0

Why: a hard choice between mask and token throws away everything that a forward found out about the positions it left masked.

Only positions that are read have a distribution: under a block decoder those of the open block, as in dInfer with a K/V cache. A position
that was never read is a plain mask. Tokens and prompts are as ever. With most = 0 it is the model itself. Keys of masked positions that a
K/V cache keeps are those of the input of that forward.

Reference: dInfer: An Efficient Inference Framework for Diffusion Language Models, arXiv 2510.08666.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import ModelError
from dllm_toolkit.models.wrapper import Wrapper, core, live_lanes, predicted, prompt_of, recall, store
from dllm_toolkit.registry import register

NAME = "smoothed"


class Beliefs(nn.Module):
    """What a decode remembers: what is added to the mask of every slot [B, S, width], forwards of every row [B]."""

    added: Tensor
    taken: Tensor

    def __init__(self, rows: int, kv: KVBuffer, width: int) -> None:
        super().__init__()
        device = kv.keys.device
        self.register_buffer("added", torch.zeros(rows, kv.slots, width, dtype=kv.keys.dtype, device=device), persistent=False)
        self.register_buffer("taken", torch.zeros(rows, dtype=torch.long, device=device), persistent=False)


@register("model", NAME)
class Smoothed(Wrapper):
    """`model` whose masked inputs carry what it said of them before (dInfer's iteration smoothing, arXiv 2510.08666).

    start, growth, most: weight of the expected embedding; `start` for what the first forward says, `growth` more with each, up to `most`.
    """

    cite = ("2510.08666",)

    def __init__(self, model: Model, start: float = 0.15, growth: float = 0.02, most: float = 0.3) -> None:
        super().__init__(model)
        if min(start, growth, most) < 0:
            raise ModelError(
                f"start, growth and most must be 0 or more, got {start}, {growth} and {most}. They weigh an embedding that is added. "
                "Write start: 0.15, growth: 0.02 and most: 0.3."
            )
        inner: object = model
        while isinstance(inner, Wrapper):
            if isinstance(inner, Smoothed):
                raise ModelError("a model is smoothed once, got smoothed around smoothed. Both would add to the same masks. Remove one.")
            inner = inner.model
        core(model)  # its embeddings are needed
        self.start, self.growth, self.most = start, growth, most

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        kv = super().buffer(rows, slots)
        kv.notes[NAME] = Beliefs(rows, kv, self.spec.width)
        return kv

    def forward(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        """Logits of the read slots; without a buffer nothing is remembered. Raises ModelError for a query without `prompt`."""
        if kv is None or query.slots is None or query.read is None:
            return self.model(query, kv)
        own, live = cast(Beliefs, kv.notes[NAME]), live_lanes(query, kv)
        masked = live & (query.tokens == self.spec.mask_id) & ~prompt_of(query, "a smoothed model")
        added = recall(own.added, query.slots).masked_fill(~masked.unsqueeze(-1), 0)
        logits = self.model(query._replace(added=added if query.added is None else query.added + added), kv)
        weight = (self.start + self.growth * own.taken.to(logits.dtype)).clamp(max=self.most)  # [B]
        words = core(self.model).embed.weight
        said = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        expected = said.softmax(-1).to(words.dtype) @ words  # [B, R, width]
        store(own.added, predicted(query, kv, self.spec.shift), weight.view(-1, 1, 1).to(words.dtype) * expected)
        own.taken += live.any(1)
        return logits
