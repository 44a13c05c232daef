"""Block diffusion: every block is denoised given the clean blocks before it, all blocks in one forward of the doubled layout.

                  level t                            copies              weight   normaliser             terms
    bd3lm         each block, stratified, clipped    1                   1 / t    answer tokens          CE
    sdar          each row                           1                   1 / t    answer tokens          CE
    fast_dllm_v2  each block                         mask, complement    1        supervised tokens      CE
    cap           each block, [0.3, 0.8]             mask, complement    1        supervised tokens      CE + lambda entropy where right

Blocks count from the prompt's end, as in D2F. `block_length` as a list is a ladder of equally long stages: LLaDA2.0's warm-up, stable phase
and decay, or progressive block sizes; a length that is written twice stays twice as long. BD3-LM's search for the interval of least
variance is left out, and so are released trainers' second draws for rows in which nothing was masked, after which 1 / t would not be the
bound. With a complement every answer token is supervised exactly once a pair.

References: BD3-LM (arXiv 2503.09573); SDAR (arXiv 2510.06303); Fast-dLLM v2 (arXiv 2509.26328); LLaDA2.0 and its confidence-aware
parallel training (arXiv 2512.15745); progressive blocks (arXiv 2602.09555).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dllm_toolkit.ops import corrupt
from dllm_toolkit.ops.masks import answer_blocks
from dllm_toolkit.registry import register
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.forward import Forward
from dllm_toolkit.training.layouts import Doubled
from dllm_toolkit.training.losses import Normaliser
from dllm_toolkit.training.terms import Certainty, CrossEntropy, Term, check_blocks, stage
from dllm_toolkit.types import ModelSpec

PLAIN = Forward()


@register("objective", "bd3lm")
@dataclass(frozen=True)
class BlockDiffusion(Composed):
    """Block diffusion; the defaults are BD3-LM (arXiv 2503.09573).

    minimum, maximum: the interval of masking rates; only the full one bounds the likelihood. level: drawn for each block, or for each
    row. weight: `bound` is 1 / t, `one` counts masked tokens alike. certainty: share of the entropy term. first_token: see `Doubled`.
    """

    block_length: int | tuple[int, ...] = 16
    minimum: float = 1e-3
    maximum: float = 1.0
    level: Literal["block", "row"] = "block"
    complementary: bool = False
    weight: Literal["bound", "one"] = "bound"
    normaliser: Normaliser = "answer_length"
    certainty: float = 0.0
    first_token: Literal["clean", "noisy"] = "clean"

    def __post_init__(self) -> None:
        check_blocks(self.block_length)
        corrupt.check_interval(self.minimum, self.maximum)

    @property
    def copies(self) -> int:  # type: ignore[override]
        return 2 if self.complementary else 1

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        sure = (Certainty(share=self.certainty),) if self.certainty else ()
        return (CrossEntropy(normaliser=self.normaliser), *sure)

    def layout(self, progress: float) -> Doubled:
        return Doubled(stage(self.block_length, progress), self.first_token)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        level = self.levels(batch, generator, stage(self.block_length, progress))
        masked = corrupt.bernoulli(level, batch.answer, generator)
        both = (masked, batch.answer & ~masked) if self.complementary else (masked,)
        return [hidden(batch, spec, one, one / level.clamp(min=1e-3) if self.weight == "bound" else None) for one in both]

    def levels(self, batch: Batch, generator: torch.Generator, block_length: int) -> Tensor:
        """The masking rate of every position [B, L], stratified over all cells that draw one."""
        rows, blocks = len(batch.tokens), -(-batch.answer_length // block_length) if self.level == "block" else 1
        cells = corrupt.uniform_levels(rows * blocks, generator).view(rows, blocks)
        size = block_length if self.level == "block" else batch.answer_length
        block = answer_blocks(batch.prompt_length, batch.tokens.shape[1], size)
        return corrupt.spread(self.minimum + (self.maximum - self.minimum) * cells, block)


@register("objective", "sdar")
def sdar(block_length: int | tuple[int, ...] = 16, forward: Forward = PLAIN) -> BlockDiffusion:
    """SDAR (arXiv 2510.06303): one masking rate a row; with a ladder of block lengths, progressive training (arXiv 2602.09555)."""
    return BlockDiffusion(block_length, level="row", forward=forward)


@register("objective", "fast_dllm_v2")
def fast_dllm_v2(
    block_length: int | tuple[int, ...] = 16, first_token: Literal["clean", "noisy"] = "clean", forward: Forward = PLAIN
) -> BlockDiffusion:
    """Fast-dLLM v2 (arXiv 2509.26328): complementary masks and unweighted cross-entropy, from an autoregressive model with its shift."""
    both = BlockDiffusion(block_length, 0.0, complementary=True, weight="one", normaliser="masked_count", forward=forward)
    return replace(both, first_token=first_token)


@register("objective", "cap")
def cap(
    block_length: int | tuple[int, ...] = 16, certainty: float = 2.0, minimum: float = 0.3, maximum: float = 0.8, forward: Forward = PLAIN
) -> BlockDiffusion:
    """Confidence-aware parallel training (LLaDA2.0, arXiv 2512.15745): be right, and be sure where you are right."""
    both = BlockDiffusion(block_length, minimum, maximum, complementary=True, weight="one", normaliser="masked_count", forward=forward)
    return replace(both, certainty=certainty)
