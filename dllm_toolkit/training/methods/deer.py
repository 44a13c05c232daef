"""DEER's drafter (arXiv 2512.15176) learns to continue: clean text up to a point, a run of masks behind it, and nothing behind the run.

    answer     a b c d e f g h i EOS EOS EOS        written by the autoregressive model that will verify
    seen       a b c M e M M S . .   .   .          prefix, run, separator; what follows is cut off
    stage 1    a run of any length from any place, masked at rate t ~ U(1e-3, 1), weight 1 / t
    stage 2    a run of R ~ U{1 .. 96} tokens, all masked; weight a^(R - i) of the i-th, since a draft is read up to its first error

A run starts inside the text, as a draft does, and may pass its end; behind the first end of text nothing counts, since no verifier looks.
The separator keeps "the run ends" apart from "the text ends". A row's sum is divided by a constant, the length of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import corrupt, masks
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import Layout, Seen, single
from dllm_toolkit.training.losses import ObjectiveError
from dllm_toolkit.training.terms import CrossEntropy
from dllm_toolkit.types import ModelSpec


@dataclass(frozen=True)
class CutOff(Layout):
    """Everybody sees the row up to where it was cut off, which is where its tokens are negative."""

    def __call__(self, batch: Batch, tokens: torch.Tensor, shift: int, generator: torch.Generator) -> Seen:
        gone = (~batch.inside | (tokens < 0)).long()
        return single(tokens.clamp(min=0), masks.block_causal(gone), shift, gone)


@register("objective", "deer_continuation")
@dataclass(frozen=True)
class Continuation(Composed):
    """Masks behind a clean prefix, and nothing behind them (DEER, arXiv 2512.15176). The defaults are stage 1.

    separator: id of the token behind the run, one that no text holds; null: none. longest: the most tokens of a run, 0: to the answer's
    end. minimum: the lowest rate of masks. base: a, how much more a token counts than the one behind it.
    """

    separator: int | None = None
    longest: int = 0
    minimum: float = 1e-3
    base: float = 1.0
    terms = (CrossEntropy(normaliser="answer_length"),)

    def layout(self, progress: float) -> Layout:
        return CutOff()

    def check(self, model: Transformer) -> None:
        super().check(model)
        corrupt.check_interval(self.minimum, 1.0)
        if self.longest < 0 or self.base <= 0:
            raise ObjectiveError(f"longest must be 0 or more, base above 0, got {self.longest} and {self.base}. Write 96 and 1.01.")
        if self.separator not in {None, *range(model.spec.vocab_size)} - {model.spec.mask_id, *model.spec.eos_ids}:
            raise ObjectiveError(f"separator must be no mask and no end of text, got {self.separator}. Write another id, or null.")

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        rows, answer, text = len(batch.tokens), batch.answer_length, batch.text(spec.eos_ids)
        begin = (corrupt.draw((rows,), generator) * text.sum(1)).long()
        length = corrupt.count_from_level(corrupt.draw((rows,), generator), (answer - begin).clamp(max=self.longest or answer)).unsqueeze(1)
        place = torch.arange(text.shape[1], device=text.device) - (batch.prompt_length + begin).unsqueeze(1)  # 0: the run's first token
        level = self.minimum + (1.0 - self.minimum) * corrupt.uniform_levels(rows, generator).unsqueeze(1)
        masked = corrupt.bernoulli(level, (place >= 0) & (place < length), generator)
        weight = (masked & text) / level * self.base ** ((length - 1 - place) * masked)
        tokens = batch.tokens.masked_fill(masked, spec.mask_id).masked_fill(batch.answer & (place >= length), -1)
        return [Copy(tokens if self.separator is None else tokens.masked_fill(batch.answer & (place == length), self.separator), weight)]


@register("objective", "deer_refinement")
def deer_refinement(separator: int | None = None, longest: int = 96, base: float = 1.01) -> Continuation:
    """Stage 2 of DEER's drafter (arXiv 2512.15176): stage 1 with `minimum: 1`, short runs, and most weight on what is verified first."""
    return Continuation(separator, longest, minimum=1.0, base=base)
