"""Certainty-forcing distillation (dParallel): the model's own right answers are easy; what is missing is being sure of many at once.

    n ~ U{0 .. N - 1}: blocks before n are clean, block n is masked with probability .5, all after it is masked
    copies: that mask, and its complement within block n        loss only inside block n
    loss = sum over both copies of  mean CE + beta mean H_T where the most probable token is right             T = .5

Meant for answers that the model wrote itself (training/recorded.py). beta: 2 for LLaDA, 1 for Dream, whose block is the whole answer
(`block_length: 0`). The released loop overwrites the masks of a batch with those of its last row; here every row has its own.

The means are over all positions of a step, whatever its batches and processes. Published was the mean of 64 rows' own means (one row a
batch, 8 batches, 8 devices, each divided by its own counts): that is `normaliser: row_masked_count`, with any batch size, and exact for the
entropy too.

Reference: dParallel, arXiv 2509.26488.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch, active_block
from dllm_toolkit.training.losses import Normaliser
from dllm_toolkit.training.terms import Certainty, CrossEntropy, Term, check_blocks, check_temperature
from dllm_toolkit.types import ModelSpec


@register("objective", "dparallel")
@dataclass(frozen=True)
class CertaintyForcing(Composed):
    """Certainty-forcing distillation (dParallel, arXiv 2509.26488). block_length 0: the whole answer is one block.

    normaliser: of both terms, see `normalise`.
    """

    block_length: int = 16
    ratio: float = 0.5
    beta: float = 2.0
    temperature: float = 0.5
    normaliser: Normaliser = "masked_count"

    copies = 2

    def __post_init__(self) -> None:
        check_blocks(self.block_length, least=0)
        check_temperature(self.temperature)
        corrupt.check_interval(self.ratio, 1.0)

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        return (
            CrossEntropy(normaliser=self.normaliser),
            Certainty(share=self.beta, normaliser=self.normaliser, temperature=self.temperature),
        )

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        active, after = active_block(batch, self.block_length or batch.answer_length, generator)
        level = torch.full_like(batch.prompt_length, self.ratio, dtype=torch.float32).unsqueeze(1)
        masked = corrupt.bernoulli(level, active, generator)
        return complementary(batch, spec, masked, active, after)


def complementary(
    batch: Batch, spec: ModelSpec, masked: Bool[Tensor, "B L"], active: Bool[Tensor, "B L"], after: Bool[Tensor, "B L"]
) -> list[Copy]:
    """Two copies: `masked` and the rest of `active`, each hidden with all that is `after`; supervised inside the block only."""
    return [hidden(batch, spec, one | after, one.float()) for one in (masked, active & ~masked)]
