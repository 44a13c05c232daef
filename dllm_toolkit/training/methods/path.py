"""Path distillation (dFactory): jump along the teacher's path. Given the state of step i, predict all that was decided before step j.

    i ~ U{0 .. S - 1}, j = min(S, i + U{1 .. jump})          S: steps of this row's decode
    hidden: what was decided at step i or later               supervised: what was decided in steps i .. j - 1
    loss = sum of -log p, the log-likelihood of the jump

What was never decided, the fill behind an end-of-text, is hidden as it was in the decode; it is supervised with the last step (`fill`),
so that the student still learns where texts end.

Reference: the trainer that came with LLaDA2.0 (arXiv 2512.15745).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import Doubled, Full, Layout
from dllm_toolkit.training.losses import Normaliser, ObjectiveError
from dllm_toolkit.training.recorded import require_steps
from dllm_toolkit.training.terms import CrossEntropy, Term, check_blocks
from dllm_toolkit.types import ModelSpec


@register("objective", "path")
@dataclass(frozen=True)
class PathDistillation(Composed):
    """Multi-step jumps along recorded decodes. jump: the most steps at once. attention: `full`, or `blocks` of `block_length`, doubled."""

    jump: int = 8
    attention: Literal["full", "blocks"] = "full"
    block_length: int = 16
    fill: bool = True
    normaliser: Normaliser = "none"

    needs_steps = True

    def __post_init__(self) -> None:
        check_blocks(self.block_length)
        if self.jump < 1:
            raise ObjectiveError(f"jump must be at least 1, got {self.jump}. It counts steps of a decode. Write jump: 8.")

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        return (CrossEntropy(normaliser=self.normaliser),)

    def layout(self, progress: float) -> Layout:
        return Full() if self.attention == "full" else Doubled(self.block_length)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        step = require_steps(batch)
        steps = step.masked_fill(~batch.answer, -1).amax(1) + 1  # [B]
        if self.fill:
            step = torch.where(step < 0, (steps - 1).clamp(min=0).unsqueeze(1), step)
        start = (corrupt.draw((len(step),), generator) * steps).long()
        stop = start + 1 + (corrupt.draw((len(step),), generator) * self.jump).long()
        hide = batch.answer & ((step >= start.unsqueeze(1)) | (step < 0))
        wanted = batch.answer & (step >= start.unsqueeze(1)) & (step < stop.unsqueeze(1))
        return [hidden(batch, spec, hide, wanted.float())]
