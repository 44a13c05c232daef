"""Pseudo-trajectory distillation (d3LLM): hide what the teacher itself still had to decide at a random point of its decode.

    n ~ U{0 .. N - 1} block, r ~ U[r_lo, .8], r_lo from 0 to .8 over the run
    in block n the first (1 - r) of its tokens in the teacher's order are shown, the rest is hidden; before it clean, after it masked
    loss = (CE(hidden) + CE(shown, hidden in turn) + w H_T(hidden, where right) [+ w H_T(shown ...)]) / 4

Only the order comes from the trajectory (`Batch.step_map`), so any block length can be trained on one recording; several are interpolated
over the run. `order: random` is dParallel with a varying ratio, `both_certain` the Dream variant. Published was a mean of the means of 16
batches of 4 rows with one ratio a batch; rows have ratios of their own here, and `normaliser: row_masked_count` gives each the same weight.

Reference: d3LLM, arXiv 2601.07568.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy
from dllm_toolkit.training.corruptors import Batch, active_block
from dllm_toolkit.training.losses import Normaliser
from dllm_toolkit.training.methods.dparallel import complementary
from dllm_toolkit.training.recorded import require_steps
from dllm_toolkit.training.terms import Certainty, CrossEntropy, Ramp, Term, check_blocks, check_temperature, interpolated
from dllm_toolkit.types import ModelSpec


@register("objective", "d3llm")
@dataclass(frozen=True)
class PseudoTrajectory(Composed):
    """Pseudo-trajectory distillation (d3LLM, arXiv 2601.07568). ratio_low: the least share of the block that is hidden, over the run."""

    block_length: int | tuple[int, ...] = 16
    ratio_low: Ramp = Ramp(0.0, 0.8)
    ratio_high: float = 0.8
    certainty: float = 2.0
    temperature: float = 0.5
    both_certain: bool = False
    order: Literal["trajectory", "random"] = "trajectory"
    normaliser: Normaliser = "masked_count"

    copies = 2

    def __post_init__(self) -> None:
        check_blocks(self.block_length)
        check_temperature(self.temperature)
        corrupt.check_interval(min(self.ratio_low.start, self.ratio_low.end), self.ratio_high)

    @property
    def needs_steps(self) -> bool:  # type: ignore[override]
        return self.order == "trajectory"

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        how, first_only = self.normaliser, not self.both_certain
        sure = Certainty(share=self.certainty / 4, normaliser=how, temperature=self.temperature, first_only=first_only)
        return CrossEntropy(share=0.25, normaliser=how), sure

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        lengths = self.block_length if isinstance(self.block_length, tuple) else (self.block_length,)
        active, after = active_block(batch, interpolated(lengths, progress), generator)
        uniform, low = corrupt.draw(tuple(batch.tokens.shape), generator), self.ratio_low.at(progress)
        ratio = low + (self.ratio_high - low) * corrupt.draw((len(batch.tokens),), generator)
        by_chance = active & (uniform < ratio.unsqueeze(1))
        masked = by_chance if self.order == "random" else late(require_steps(batch), active, ratio)
        return complementary(batch, spec, masked, active, after)


def late(step_map: Int[Tensor, "B L"], active: Bool[Tensor, "B L"], ratio: Tensor) -> Bool[Tensor, "B L"]:
    """What of `active` is decided last: all but its first int((1 - ratio) n) positions in the order of `step_map`, then of place.

    Positions that were never decided (-1, the fill behind an end-of-text) come after all others.
    """
    size, length = active.sum(1), active.shape[1]
    key = torch.where(step_map >= 0, step_map, 1 << 30).long() * length + torch.arange(length, device=active.device)
    rank = key.masked_fill(~active, torch.iinfo(torch.long).max).argsort(1).argsort(1)
    shown = ((1.0 - ratio) * size + 1e-4).long()  # (1 - .8) 10 is 2 tokens, not float32's 1.99
    return active & (rank >= shown.unsqueeze(1))
