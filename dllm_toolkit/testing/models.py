"""Toy models for tests: small, exact (float64) and *sensitive to their context*.

A toy that ignores its context makes every test of a cache vacuous: with default initialisation an approximate cache gives the same
tokens as none. `tiny_transformer` therefore gets attention weights that matter and a head sharp enough that probabilities spread over
0.2 .. 1, so thresholds bite, and an end-of-text token turns up now and then, so stop rules run. A test asserts all of that.

    Oracle            logits are a hash of the position; the answer is known
    Scripted          logits come from a list
    Counting(model)   counts forwards and lanes from the outside
    tiny_transformer  the real Transformer, 32 features wide
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.transformer import Transformer, TransformerConfig
from dllm_toolkit.ops import noise
from dllm_toolkit.types import Attention, ModelSpec

VOCABULARY = 29
MASK, EOS, PAD, OTHER_EOS = 28, 27, 26, 25
WORDS = 25
"""Ids below this one are ordinary tokens."""


def toy_spec(attention: Attention = "full", shift: Literal[0, 1] = 0, layers: int = 1) -> ModelSpec:
    """What all toys say of themselves: 29 tokens, two end-of-text ids, room for 128 positions."""
    return ModelSpec(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        eos_ids=(EOS, OTHER_EOS),
        pad_id=PAD,
        layers=layers,
        heads=1,
        kv_heads=1,
        head_dim=2,
        width=2,
        max_positions=128,
        attention=attention,
        shift=shift,
    )


def tiny_transformer(
    layers: int = 2, attention: Attention = "full", shift: Literal[0, 1] = 0, seed: int = 2, block_size: int | None = None
) -> Transformer:
    """A context-sensitive Transformer of width 32 in float64, always the same for the same arguments."""
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        width=32,
        layers=layers,
        heads=4,
        kv_heads=2,
        mlp_width=64,
        mask_id=MASK,
        eos_ids=(EOS, OTHER_EOS),
        pad_id=PAD,
        max_positions=128,
        attention=attention,
        block_size=block_size,
        shift=shift,
    )
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            # Attention weights this large make what a position sees matter; a head this sharp makes probabilities spread.
            scale = 2.5 if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")) else 1.0
            scale = 4.0 if name.startswith("lm_head") else scale
            width = 1.0 if name.startswith("embed") else weight.shape[1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * scale / width)
    for token in (EOS, OTHER_EOS):
        model.lm_head.weight[token] *= 1.2
    return model


class Toy:
    """What models without weights share: a spec and the smallest K/V buffer."""

    def __init__(self, spec: ModelSpec | None = None) -> None:
        self.spec = spec or toy_spec()
        self.device = torch.device("cpu")

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return KVBuffer(rows, slots, layers=1, kv_heads=1, head_dim=2, hidden_width=None, dtype=torch.float64, device="cpu")

    def _predicted(self, query: Query, kv: KVBuffer | None) -> Int[Tensor, "B R"]:
        """The canvas position whose token each read lane predicts; the length of the canvas, or more, for dead lanes."""
        if kv is None or query.slots is None:
            return (query.positions if query.read is None else query.read) + self.spec.shift
        # A read slot stands for the position that was written into it; that of a canvas position, for the position itself.
        slots = torch.arange(kv.slots).expand(query.slots.shape[0], -1).scatter(1, query.slots, query.positions)
        slots = torch.cat((slots[:, :-1], torch.full_like(slots[:, :1], kv.slots)), dim=1)
        read = slots if query.read is None else slots.gather(1, query.read)
        return torch.where(read < kv.slots, read + self.spec.shift, read)


class Oracle(Toy):
    """Logits are a hash of (position, token) and nothing else: order, batch and cache cannot change the answer.

    sharpness: the largest logit; 10 spreads the best probability over about 0.3 .. 0.9.
    """

    def __init__(self, spec: ModelSpec | None = None, sharpness: float = 10.0) -> None:
        super().__init__(spec)
        self.sharpness = sharpness

    def at(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape V"]:
        """The logits of the given positions."""
        tokens = torch.arange(self.spec.vocab_size)
        draws = noise.uniform(torch.tensor(7), positions.unsqueeze(-1), tokens).double()
        return draws**3 * self.sharpness

    def answer(self, first: int, length: int) -> list[int]:
        """The tokens that a greedy decoder must give for these positions."""
        logits = self.at(torch.arange(first, first + length))
        logits[:, self.spec.mask_id] = float("-inf")
        return logits.argmax(-1).tolist()

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        return self.at(self._predicted(query, kv))


class Scripted(Toy):
    """The n-th forward answers with the n-th item of `script`, [L, V] or [B, L, V] on the canvas; the last item repeats."""

    def __init__(self, script: Sequence[Tensor], spec: ModelSpec | None = None) -> None:
        super().__init__(spec)
        self.script = list(script)
        self.forwards = 0

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        logits = self.script[min(self.forwards, len(self.script) - 1)]
        self.forwards += 1
        where = self._predicted(query, kv).clamp(max=logits.shape[-2] - 1)
        if logits.ndim == 2:
            return logits[where]
        return logits.gather(1, where.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


class Counting:
    """A model that counts what reaches it, independently of the engine's own account.

    nfe, lanes [B]: forwards with at least one lane of the row, and its lanes; forwards: calls. rows: of the decode, where branches have
    rows of their own in the buffer.
    """

    def __init__(self, model: Model, rows: int | None = None) -> None:
        self.model, self.rows = model, rows
        self.spec = model.spec
        self.device = getattr(model, "device", torch.device("cpu"))
        self.forwards = 0
        self.nfe: Tensor | int = 0
        self.lanes: Tensor | int = 0

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return self.model.buffer(rows, slots)

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        self.forwards += 1
        if kv is None or query.slots is None:
            used = torch.full((query.tokens.shape[0],), query.tokens.shape[1])
        else:
            used = (query.slots < kv.slots - 1).sum(1)
        if self.rows is not None:
            used = used.view(self.rows, -1).sum(1)
        self.nfe = self.nfe + (used > 0).long()
        self.lanes = self.lanes + used
        return self.model(query, kv)
