"""Objectives that need no file of their own, as sums of one term: what makes teachers, and D2F. The contract: training/composed.py.

    MaskedDiffusion   CE at masked positions, under the model's own attention          LLaDA, arXiv 2502.09992
    Autoregressive    CE of every answer token given the ones before
    D2FDistillation   frozen teacher (adapter off, full attention) -> student (LoRA, block-causal)   D2F, arXiv 2508.09192

More of them, one paper a file: training/methods. What objectives are made of can be imported from here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, Shown
from dllm_toolkit.training.corruptors import Batch, Corruptor, ExactCount, Mixture, Monotone
from dllm_toolkit.training.layouts import BlockCausal, Layout, Own, full_allow, full_blocks
from dllm_toolkit.training.losses import Loss, Normaliser, ObjectiveError, cross_entropy, normalise, reverse_kl, soft_cross_entropy
from dllm_toolkit.training.terms import CrossEntropy, ForwardKL, ReverseKL, Term, check_temperature
from dllm_toolkit.types import Attention, ModelSpec

__all__ = [
    "Autoregressive", "D2FDistillation", "Loss", "MaskedDiffusion", "Normaliser", "Objective", "ObjectiveError", "cross_entropy",
    "full_allow", "full_blocks", "normalise", "reverse_kl", "soft_cross_entropy",
]  # fmt: skip

Objective = Composed  # there is no other kind


class _AsItDecodes(Composed):
    """Under the attention rule that the model has, and keeps."""

    def layout_of(self, spec: ModelSpec, progress: float) -> Layout:
        return Own(spec)

    def decodes(self) -> tuple[Attention, int | None] | None:
        return None


@register("objective", "masked_diffusion")
@dataclass(frozen=True)
class MaskedDiffusion(_AsItDecodes):
    """Predict the hidden tokens of the answer: sum over masked i of w_i CE_i, with the corruptor's weights.

    With `exact_count` (or `uniform`) noise and normaliser answer_length this is the negative log-likelihood bound per token. The prompt
    is never masked; EOS padding is masked, predicted and counted, which is how the model learns to stop.
    """

    noise: Corruptor = ExactCount()  # type: ignore[assignment]
    normaliser: Normaliser = "answer_length"

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        return (CrossEntropy(normaliser=self.normaliser),)

    def check(self, model: Transformer) -> None:
        if model.spec.attention == "causal":
            raise ObjectiveError(
                "masked diffusion needs a model that sees both sides of a mask, got attention 'causal'. "
                "A causal model cannot fill gaps. Write attention: full, or objective: autoregressive."
            )
        super().check(model)

    def counted(self, batch: Batch, view: Shown) -> dict[str, tuple[Tensor, Tensor]]:
        return {"masked_share": ((view.tokens != batch.tokens).sum(), batch.answer.sum())}


@register("objective", "autoregressive")
@dataclass(frozen=True)
class Autoregressive(_AsItDecodes):
    """Predict every answer token from the ones before it, the first EOS included. `padding`: also the EOS fill behind it."""

    padding: bool = False

    terms = (CrossEntropy(normaliser="sum_of_weights"),)
    accuracy = "token_accuracy"

    def check(self, model: Transformer) -> None:
        if model.spec.attention != "causal" or model.spec.shift != 1:
            raise ObjectiveError(
                f"autoregressive training needs attention 'causal' and shift 1, got {model.spec.attention!r} and "
                f"shift {model.spec.shift}. Otherwise a position sees the token it predicts. Write attention: causal, shift: 1."
            )

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        counts = batch.answer if self.padding else batch.text(spec.eos_ids)
        return [Copy(batch.tokens, counts.float())]


@register("objective", "d2f")
@dataclass(frozen=True)
class D2FDistillation(Composed):
    """A block-causal student learns the full-attention teacher's distribution at masked positions. Both read the same noised row.

        loss = sum over masked i of w_i D(teacher_i, student_i) / number of masked positions,   w_i = 1 / t_block(i)

    The defaults are the official code (D2F-train/utils/loss.py at 771f745): forward KL, 1/t weights, mean over masked tokens, EOS padding
    kept. The paper's Eq. 3 is `divergence: reverse_kl`, `weighted: false`. `self_align: false` replaces the teacher by the true tokens.
    No T^2 here: a temperature makes the gradient smaller. `kl` in the log is the divergence without the teacher's entropy, at that
    temperature.
    """

    block_length: int = 16
    noise: Corruptor | None = None  # type: ignore[assignment]
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    weighted: bool = True
    self_align: bool = True
    temperature: float = 1.0
    normaliser: Normaliser = "masked_count"

    one_head = True

    def __post_init__(self) -> None:
        if self.noise is None:
            object.__setattr__(self, "noise", Monotone(block_length=self.block_length))
        check_temperature(self.temperature)
        for part in self.noise.parts if isinstance(self.noise, Mixture) else (self.noise,):
            length = getattr(part, "block_length", self.block_length)
            if length != self.block_length:
                raise ObjectiveError(
                    f"the noise has blocks of {length} tokens and the attention has blocks of {self.block_length}. "
                    f"They are one grid in D2F. Write block_length: {self.block_length} in the noise too."
                )

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        if not self.self_align:
            return (CrossEntropy(normaliser=self.normaliser),)
        kind = ForwardKL if self.divergence == "forward_kl" else ReverseKL
        return (kind(self.temperature**-2, self.normaliser, temperature=self.temperature),)

    def layout(self, progress: float) -> Layout:
        return BlockCausal(self.block_length)

    def check(self, model: Transformer) -> None:
        if model.spec.attention == "causal":
            raise ObjectiveError(
                "D2F distils from a bidirectional teacher, got a model with attention 'causal'. "
                "A causal model cannot fill masks. Write a model trained with objective: masked_diffusion."
            )
        super().check(model)

    def drawn(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        (copy,) = super().drawn(batch, spec, generator, progress)
        return [copy if self.weighted else copy._replace(weight=(copy.weight > 0).to(copy.weight.dtype))]

    def found(self, model: Transformer, *columns: Any) -> tuple[Tensor, ...]:
        """What `measure` would say of the one term, with its gradient at once: no chunk of logits is kept, or computed again."""
        asked, target, weight, _, teacher = columns
        if teacher is None:
            one = self.forward.cross_entropy(model, asked, target)
            return one.guess, one.value, weight
        one = self.forward.divergence(model, asked, teacher, self.divergence, self.temperature)
        assert one.entropy is not None
        gap = one.value.detach() - (one.entropy if self.divergence == "forward_kl" else 0.0)
        return one.guess, self.temperature**2 * one.value, weight, gap, one.guess == one.teacher_guess
