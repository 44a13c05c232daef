"""From an autoregressive model to a diffusion model (DiffuLLaMA): let it see the future, a little more of it in every batch.

    t ~ U(eps, 1) a row, weight 1 / t, sum over masked tokens / number of masked tokens in the batch, shift kept
    attention: the past, and each pair of the future with probability min(1, progress / anneal)

anneal 0 is the full switch at once (DiffuLLaMA-7B, Dream). Dividing by the masked count is the released code's choice: the value is about
twice the bound per token. `layout` ends as full attention, and the model is exported so.

Reference: DiffuLLaMA, arXiv 2410.17891.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch, Uniform
from dllm_toolkit.training.layouts import Annealed, Full, Layout
from dllm_toolkit.training.losses import Normaliser
from dllm_toolkit.training.terms import CrossEntropy, Term
from dllm_toolkit.types import ModelSpec


@register("objective", "diffullama")
@dataclass(frozen=True)
class Adaptation(Composed):
    """Masked diffusion with attention that opens to the future (DiffuLLaMA, arXiv 2410.17891). anneal: the share of the run it takes."""

    anneal: float = 0.1
    normaliser: Normaliser = "masked_count"

    def __post_init__(self) -> None:
        corrupt.check_interval(0.0, self.anneal)

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        return (CrossEntropy(normaliser=self.normaliser),)

    def layout(self, progress: float) -> Layout:
        return Full() if progress >= self.anneal else Annealed(progress / self.anneal)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        return [hidden(batch, spec, *Uniform()(batch, generator))]
