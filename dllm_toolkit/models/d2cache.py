"""d2Cache: in each forward compute a chosen set of positions, all the way up, and answer the others from memory.

    changed    positions whose token is not the one they were computed from: committed, revised, or never computed
    masks      the `candidates` masked positions with the highest certainty density:
               confidence when they were last read, times the share of known positions around (Gaussian, `sigma` positions)
    context    of the known positions that are left, the fewest that hold `share` of the attention rollout of the last forward:
               ones(positions) (A_N + I) / 2 ... (A_1 + I) / 2, A_l the mean attention map of layer l, identity where nothing was computed
    compute    changed, masks and context, with their own queries, against the stored keys of everybody
    answer     every position that is read from its last hidden row, computed now or before

The first forward computes everything; nothing is ever refreshed otherwise. The paper's decoder commits only what has just been computed;
this model answers for the others with what it said last. Its decoder (decoders/certainty_prior.py) ranks positions as the masks are ranked
here, so that both look at the same ones. Inexact by declaration; with `candidates` no less than the masks and `share` 1 it is the model.

Attention is computed the plain way, because its weights are needed, and all layers' mean maps are kept until the last one is done.

Reference: d2Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching, arXiv 2509.23094.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import Lanes, Layer, ModelError
from dllm_toolkit.models.wrapper import Wrapper, bare, choose, live_lanes, narrow, predicted, prompt_of
from dllm_toolkit.ops import select
from dllm_toolkit.ops.density import certainty_density
from dllm_toolkit.registry import register

NAME = "d2cache"


class Canvas(nn.Module):
    """What a decode remembers of every slot, all [B, S] but the last.

    tokens: what it was computed from, -1 never; known: it holds a token; confidence: of what was last said of it; rollout: the attention
    that flows into it; ran [B]: lanes that were computed.
    """

    tokens: Tensor
    known: Tensor
    confidence: Tensor
    rollout: Tensor
    ran: Tensor

    def __init__(self, kv: KVBuffer) -> None:
        super().__init__()
        shape, device = (kv.rows, kv.slots), kv.keys.device
        wide = torch.float64 if kv.keys.dtype == torch.float64 else torch.float32
        self.register_buffer("tokens", torch.full(shape, -1, device=device), persistent=False)
        self.register_buffer("known", torch.zeros(shape, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("confidence", torch.zeros(shape, dtype=wide, device=device), persistent=False)
        self.register_buffer("rollout", torch.zeros(shape, dtype=wide, device=device), persistent=False)
        self.register_buffer("ran", torch.zeros(kv.rows, dtype=torch.long, device=device), persistent=False)


class Watched:
    """Attention the plain way, in float32 or wider; keeps each layer's weights, a mean over heads."""

    def __init__(self) -> None:
        self.maps: list[Float[Tensor, "B W S"]] = []

    def __call__(
        self, q: Float[Tensor, "B H W D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], lanes: Lanes
    ) -> Float[Tensor, "B H W D"]:
        assert lanes.allow is not None
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores if scores.dtype == torch.float64 else scores.float()
        weights = scores.masked_fill(~lanes.allow, float("-inf")).softmax(-1)
        self.maps.append(weights.mean(1))
        return weights.to(v.dtype) @ v


@register("model", NAME)
class D2Cache(Wrapper):
    """`model` that computes a chosen set of positions a forward (d2Cache, arXiv 2509.23094). Inexact.

    candidates: masked positions a forward; sigma: width of the certainty density in positions; share: of the attention rollout that the
    known positions which are computed hold.
    """

    reads_host = True
    cite = ("2509.23094",)

    def __init__(self, model: Model, candidates: int = 32, sigma: float = 10.0, share: float = 0.1) -> None:
        super().__init__(bare(model, "d2cache"))
        if candidates < 1:
            raise ModelError(f"candidates must be 1 or more, got {candidates}. It counts masked positions. Write candidates: 32.")
        if not 0 < sigma <= 1000:
            raise ModelError(f"sigma must be above 0 and at most 1000, got {sigma}. It is a width in positions. Write sigma: 10.")
        if not 0 <= share <= 1:
            raise ModelError(f"share must be in [0, 1], got {share}. It is a share of attention. Write share: 0.1.")
        self.candidates, self.sigma, self.share = candidates, sigma, share

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        kv = bare(self.model, NAME).buffer(rows, slots, hidden=True)
        kv.notes[NAME] = Canvas(kv)
        return kv

    def computed(self, kv: KVBuffer) -> Float[Tensor, "B"]:
        return cast(Canvas, kv.notes[NAME]).ran.float()

    def forward(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        """Logits of the read slots; without a buffer nothing is remembered. Raises ModelError for a query without `prompt`."""
        if kv is None or query.slots is None or query.allow is None or query.read is None:
            return self.model(query, kv)
        model, own, live = bare(self.model, NAME), cast(Canvas, kv.notes[NAME]), live_lanes(query, kv)
        masked = (query.tokens == self.spec.mask_id) & ~prompt_of(query, "d2cache")
        own.known.scatter_(1, query.slots, live & ~masked)
        chosen = self._chosen(query, live, masked, own)
        from dllm_toolkit.ops.widths import read_widths  # a second to import, so only where it is used

        (width,) = read_widths(chosen.sum(1).amax())  # the one host read of a forward
        narrowed = narrow(query, choose(chosen, width), kv)
        assert narrowed.slots is not None
        x, lanes, watched = model.enter(narrowed), model.lanes(narrowed, kv), Watched()
        for layer in cast("list[Layer]", model.layers):
            x = x + layer.attend(x, lanes, kv, watched)
            x = x + layer.transform(x)
        logits = model.leave(x, narrowed, kv)
        own.tokens.scatter_(1, narrowed.slots, narrowed.tokens)
        own.rollout.copy_(_rollout(watched.maps, narrowed.slots, own.tokens >= 0))
        said = logits if logits.dtype == torch.float64 else logits.float()
        said = said.masked_fill(torch.arange(said.shape[-1], device=said.device) == self.spec.mask_id, float("-inf"))
        own.confidence.scatter_(1, predicted(query, kv, self.spec.shift), said.softmax(-1).amax(-1))
        own.ran += chosen.sum(1)
        return logits

    def _chosen(self, query: Query, live: Bool[Tensor, "B W"], masked: Bool[Tensor, "B W"], own: Canvas) -> Bool[Tensor, "B W"]:
        """The lanes that this forward computes."""
        slots = query.slots
        assert slots is not None
        changed = live & (own.tokens.gather(1, slots) != query.tokens)
        density = certainty_density(own.known, self.sigma).to(own.confidence.dtype)
        score = (own.confidence * density).gather(1, slots)
        many = torch.full_like(slots[:, 0], self.candidates)
        chosen = changed | select.top_k(score, live & masked & ~changed, many)
        if self.spec.shift:  # a mask is read from the position before it
            canvas = torch.zeros_like(own.known).scatter(1, slots, chosen & masked)
            source = torch.cat((canvas[:, self.spec.shift :], torch.zeros_like(canvas[:, : self.spec.shift])), dim=1)
            chosen = chosen | (live & source.gather(1, slots))
        known = live & ~masked & ~chosen
        return chosen | select.nucleus(own.rollout.gather(1, slots), known, self.share)


def _rollout(maps: list[Float[Tensor, "B W S"]], slots: Int[Tensor, "B W"], there: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """Attention that flows into every slot from all slots that have been computed: the column sums of the rollout matrix.

    Row by row the matrix product is never formed: a row vector of ones goes through the layers from the last to the first.
    """
    flow = there.to(maps[0].dtype)
    flow[:, -1] = 0
    for attention in reversed(maps):
        half = flow.gather(1, slots) / 2  # [B, W]
        flow = flow.scatter_add(1, slots, -half) + torch.einsum("bw,bws->bs", half, attention)
    return flow
