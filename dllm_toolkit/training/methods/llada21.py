"""Training to edit (LLaDA2.1): a model that names the right token at masks, at wrong tokens and at right ones.

    answer        a b c d e f g h          masks: block diffusion, level t a block, weight 1 / t
    seen          a M c x e M g h          of what is visible, a share is replaced by random tokens
    supervised      b   d   f              and, with weight `keep`, what is visible and right: a c e g h

A model that was only trained on masks has never seen a wrong token and copies it; after this its opinion at a visible token means
something, which is what `EditTokens` (decoders/token_editing.py) acts on. The mixing ratios are not published: by default half of the rows
have wrong tokens, 15 % of their visible ones. Wrong tokens are drawn at random; the paper's multi-turn forward, whose wrong tokens are the
model's own predictions, is left out.

Reference: LLaDA2.1, arXiv 2602.08676.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import Doubled
from dllm_toolkit.training.methods.block_diffusion import BlockDiffusion
from dllm_toolkit.training.terms import CrossEntropy, Term, check_blocks
from dllm_toolkit.types import ModelSpec


@register("objective", "llada21")
@dataclass(frozen=True)
class TokenEditing(Composed):
    """Mask-to-token and token-to-token training (LLaDA2.1, arXiv 2602.08676).

    rows: the share of rows that hold wrong tokens. rate: the share of their visible answer tokens that are wrong. keep: weight of the
    visible tokens that are right.
    """

    block_length: int = 16
    rows: float = 0.5
    rate: float = 0.15
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_blocks(self.block_length)
        corrupt.check_interval(0.0, self.rows)
        corrupt.check_interval(0.0, self.rate)
        corrupt.check_interval(0.0, self.keep)

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        return (CrossEntropy(normaliser="answer_length"),)

    def layout(self, progress: float) -> Doubled:
        return Doubled(self.block_length)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        (copy,) = BlockDiffusion(self.block_length).noise(batch, spec, generator, progress)
        visible = batch.answer & (copy.weight == 0)
        with_errors = (corrupt.draw((len(batch.tokens), 1), generator) < self.rows) & visible
        wrong = corrupt.bernoulli(torch.full_like(copy.weight[:, :1], self.rate), with_errors, generator)
        noise = (corrupt.draw(tuple(batch.tokens.shape), generator) * spec.vocab_size).long().clamp(max=spec.vocab_size - 1)
        noise = torch.where(noise == spec.mask_id, batch.tokens, noise)  # a mask is no wrong token
        weight = copy.weight + wrong.float() + self.keep * (with_errors & ~wrong)
        return [Copy(torch.where(wrong, noise, copy.tokens), weight)]
