"""DEER's drafter learns to continue: the text up to a point is clean, the run behind it is masked, and behind the run there is nothing.

    answer     a b c d e f g h i EOS EOS EOS        written by the autoregressive model that will verify
    seen       a b c M e M M S . .   .   .          prefix, run, separator; what follows is cut off
    stage 1    a run of any length from any place, masked at rate t ~ U(1e-3, 1), weight 1 / t
    stage 2    a run of R ~ U{1 .. 96} tokens, all masked; weight a^(R - i) of the i-th, since a draft is read up to its first error

A run starts inside the text, as a draft does, and may pass its end; behind the first end of text nothing counts, since no verifier looks.
The separator keeps "the run ends" apart from "the text ends". A row's sum is divided by a constant, the length of the answer.

Reference: DEER, arXiv 2512.15176.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import corrupt
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, Shown
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.objectives import ObjectiveError, until_end
from dllm_toolkit.training.terms import CrossEntropy
from dllm_toolkit.types import ModelSpec


@register("objective", "deer_continuation")
@dataclass(frozen=True)
class Continuation(Composed):
    """Masks behind a clean prefix, and nothing behind them (DEER, arXiv 2512.15176). The defaults are stage 1.

    separator: id of the token behind the run, one that no text holds; null: none. longest: the most tokens of a run, null: to the answer's
    end. minimum: the lowest rate of masks. base: a, how much more a token counts than the one behind it.
    """

    separator: int | None = None
    longest: int | None = None
    minimum: float = 1e-3
    base: float = 1.0
    terms = (CrossEntropy(normaliser="answer_length"),)

    def __post_init__(self) -> None:
        corrupt.check_interval(self.minimum, 1.0)
        if self.base <= 0 or (self.longest is not None and self.longest < 1):
            got = f"got {self.base} and {self.longest}. Nothing would be learnt. Write base: 1.01 and longest: 96."
            raise ObjectiveError(f"base must be above 0 and longest at least 1, {got}")

    def check(self, model: Transformer) -> None:
        super().check(model)
        ids = set(range(model.spec.vocab_size)) - {model.spec.mask_id, *model.spec.eos_ids}
        if self.separator is not None and self.separator not in ids:
            got = f"got {self.separator}. It says where a draft ends. Write the id of a token that no text holds, or null."
            raise ObjectiveError(f"separator must be an id below {model.spec.vocab_size}, but no mask and no end of text, {got}")

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        rows, answer, text = len(batch.tokens), batch.answer_length, until_end(batch, spec)
        begin = (corrupt.draw((rows, 1), generator) * text.sum(1, keepdim=True)).long()
        most = answer - begin if self.longest is None else torch.full_like(begin, self.longest)
        cut = (begin + corrupt.count_from_level(corrupt.draw((rows, 1), generator), most)).clamp(max=answer)
        offset = torch.arange(batch.tokens.shape[1], device=begin.device) - batch.prompt_length.unsqueeze(1)
        level = self.minimum + (1.0 - self.minimum) * corrupt.uniform_levels(rows, generator).unsqueeze(1)
        masked = corrupt.bernoulli(level, (offset >= begin) & (offset < cut), generator)
        weight = (masked & text) / level * self.base ** ((cut - 1 - offset) * masked)
        tokens = batch.tokens.masked_fill(masked, spec.mask_id).masked_fill(batch.answer & (offset >= cut), -1)  # cut off
        return [Copy(tokens if self.separator is None else tokens.masked_fill(batch.answer & (offset == cut), self.separator), weight)]

    def show(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Shown:
        view = super().show(batch, spec, generator, progress)
        allow = view.seen.allow & (view.tokens >= 0).unsqueeze(1)
        return view._replace(seen=view.seen._replace(tokens=view.tokens.clamp(min=0), allow=allow))


@register("objective", "deer_refinement")
def deer_refinement(separator: int | None = None, longest: int = 96, base: float = 1.01) -> Continuation:
    """Stage 2 of DEER's drafter (arXiv 2512.15176): short runs from masks alone, and most weight on what is verified first."""
    return Continuation(separator, longest, minimum=1.0, base=base)
