"""An objective of one's own: hide a suffix of the answer, and care most about the tokens that are still hard.

    dllm-toolkit train my_objective.yaml

A term says what is measured at a position, `noise` what is hidden, `layout` who sees whom. Everything else (teacher, schedules, averaging,
resuming, export) is that of every other objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_toolkit.ops import corrupt
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import BlockCausal, Layout
from dllm_toolkit.training.objectives import cross_entropy
from dllm_toolkit.training.terms import Selected, Term
from dllm_toolkit.types import ModelSpec


@dataclass(frozen=True)
class Focal(Term):
    """-(1 - p)^gamma log p: what the model knows already counts little."""

    gamma: float = 2.0

    def __call__(self, logits: Tensor, selected: Selected) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(logits, selected.tokens)
        return (1.0 - (-loss.detach()).exp()) ** self.gamma * loss, selected.weight


@dataclass(frozen=True)
class HardSuffix(Composed):
    """Focal loss on a hidden suffix of random length, under block-causal attention."""

    gamma: float = 2.0
    block_length: int = 16

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        return (Focal(gamma=self.gamma),)

    def layout(self, progress: float) -> Layout:
        return BlockCausal(self.block_length)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        kept = (corrupt.draw((len(batch.tokens), 1), generator) * batch.answer_length).long()
        place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        suffix = batch.answer & (place >= batch.prompt_length.unsqueeze(1) + kept)
        return [hidden(batch, spec, suffix)]
