"""DSCD, the discrete-space consistency distillation of CD4LM: a student that sees little agrees with a teacher that sees more.

    r_s ~ U[.4, .9], r_t = clip(r_s U[.3, .7], .1, .6); one random order of the answer
    student: the first n_s of the order hidden        teacher: the first n_t <= n_s of the same order hidden
    loss = lambda T^2 mean KL(teacher || student) + (1 - lambda) mean CE, over what the student does not see
    lambda: .9 for a tenth of the run, then half a cosine to .5

About half of these positions are revealed to the teacher, whose output there was never trained. `revealed` says what to do with them: `raw`
takes it (the released code), `onehot` puts the token there, `exclude` leaves them to the cross-entropy. The released code also clamps both
parts to [0, 5], which stops learning where the loss is high; gradient clipping does that work here.

Reference: CD4LM, arXiv 2601.02236.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, Shown, hidden
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.terms import CrossEntropy, ForwardKL, Ramp, Term
from dllm_toolkit.types import ModelSpec


def counts(level: Float[Tensor, "B"], part: Float[Tensor, "B"], length: int) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """How many of `length` positions student and teacher do not see, for a student's ratio `level` and the teacher's share `part` of it."""
    if length <= 10:
        two = torch.full_like(level, min(2, length), dtype=torch.long)
        return two, torch.ones_like(two)
    student = level.clamp(max=0.5) if length < 20 else level
    teacher = (student * part).clamp(0.1, 0.6)
    n = (student * length).long().clamp(min=max(2, -(-length // 10)))
    return n, torch.minimum((teacher * length).long(), n)


@register("objective", "dscd")
@dataclass(frozen=True)
class DSCD(Composed):
    """Consistency distillation between two states of one answer (CD4LM, arXiv 2601.02236)."""

    temperature: float = 2.0
    revealed: Literal["raw", "onehot", "exclude"] = "raw"
    share: Ramp = Ramp(0.9, 0.5, hold=0.1, shape="cosine")

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        rest = Ramp(1.0 - self.share.start, 1.0 - self.share.end, self.share.hold, self.share.shape)
        return ForwardKL(share=self.share, temperature=self.temperature), CrossEntropy(share=rest)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        rows = len(batch.tokens)
        level, part = 0.4 + 0.5 * corrupt.draw((rows,), generator), 0.3 + 0.4 * corrupt.draw((rows,), generator)
        many, few = counts(level, part, batch.answer_length)
        masked, light = corrupt.nested_counts((many, few), batch.answer, generator)
        counted = masked & light if self.revealed == "exclude" else masked
        return [hidden(batch, spec, masked)._replace(hint=hidden(batch, spec, light).tokens, teacher_weight=counted.float())]

    def teach(self, model: Transformer, batch: Batch, view: Shown) -> Shown:
        view = super().teach(model, batch, view)
        if self.revealed != "onehot":
            return view
        assert view.teacher is not None and view.rows is not None
        target, hint = batch.tokens.flatten()[view.rows], view.hint.flatten()[view.rows]
        known = (hint == target).unsqueeze(-1)  # nothing else can be hidden: the mask token is no token of a text
        sure = 1e4 * F.one_hot(target, view.teacher.shape[-1]).to(view.teacher.dtype)
        return view._replace(teacher=torch.where(known, sure, view.teacher))
