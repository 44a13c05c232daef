"""Classifier-free guidance as a model: it answers what another model would, pushed away from what that model says without a prompt.

    conditional    the canvas as it is
    unconditional  the same canvas, every prompt token replaced by the mask token
    logits         unconditional + (scale + 1) (conditional - unconditional)

Both run as one batch of doubled rows with one K/V buffer of doubled rows, so a forward stays one forward, every decoder and every
cache works, and nobody else knows. Scale 0 is the model itself at twice the price.

Reference: Nie et al., Scaling up Masked Diffusion Models on Text (unsupervised guidance), arXiv 2410.18514; LLaDA, arXiv 2502.09992.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import ModelError
from dllm_toolkit.models.wrapper import Wrapper, prompt_of
from dllm_toolkit.registry import register


@register("model", "guided")
class Guided(Wrapper):
    """`model` with classifier-free guidance of strength `scale` (LLaDA's cfg_scale; 0 is none)."""

    def __init__(self, model: Model, scale: float) -> None:
        super().__init__(model)
        if scale < 0:
            raise ModelError(f"scale must be 0 or more, got {scale}. It is the strength of guidance, 0 is none. Write scale: 0.5.")
        self.scale = scale

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        """A buffer of twice as many rows: conditional ones first."""
        return self.model.buffer(2 * rows, slots)

    def computed(self, kv: KVBuffer) -> Float[Tensor, "B"] | None:
        """Query tokens that really ran, a mean of both halves: a doubled row counts once, as in the engine's account."""
        both = super().computed(kv)
        return None if both is None else both.view(2, -1).mean(0)

    def forward(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        """Guided logits of the read slots. Raises ModelError if nobody says which lanes are prompt."""
        nothing = query.tokens.masked_fill(prompt_of(query, "a guided model"), self.spec.mask_id)
        doubled = Query(*(None if part is None else torch.cat((part, part)) for part in query))  # type: ignore[arg-type]
        doubled = doubled._replace(tokens=torch.cat((query.tokens, nothing)))
        conditional, unconditional = self.model(doubled, kv).chunk(2)
        return unconditional + (self.scale + 1) * (conditional - unconditional)
