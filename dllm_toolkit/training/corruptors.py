"""Corruptors: which answer positions of a training row are hidden, and how much each hidden one counts.

    prompt       answer
    p p p p p | a a a a a a a a a a a a      clean
    p p p p p | a M a M M a a M a a M a      uniform        level t for the whole answer, weight 1/t
    p p p p p | a M a a M a M M M a M M      exact_count    k ~ U{1..n} of n positions, weight n/k: the same bound, less variance
    p p p p p | a a a a M a a M M M M M      active_block   blocks before are done, one is partly masked, the rest is masked
    p p p p p | a M a a M a M M M M a M      monotone       a level for each block that never falls (D2F)
    p p p p p | a a a a M a a M M M M M      pipelined      done blocks, then levels that rise to full (states of a D2F decode)

`mixture` picks one of several for each row. Everything is computed for all rows and selected, so no step waits for the device.

Reference: LLaDA (arXiv 2502.09992); D2F (arXiv 2508.09192).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.ops import corrupt
from dllm_toolkit.ops.masks import answer_blocks
from dllm_toolkit.registry import declare, register


class Batch(NamedTuple):
    """Training rows `[prompt | answer | padding]`. The answer of every row has the same length; EOS fills what the text does not.

    step_map: of answers that a decoder wrote, the step at which each position was decided (its trace's `born`); -1 where it was not, as in
    the prompt and in what fills a row behind its end.
    """

    tokens: Int[Tensor, "B L"]
    prompt_length: Int[Tensor, "B"]
    answer_length: int
    step_map: Int[Tensor, "B L"] | None = None

    @property
    def answer(self) -> Bool[Tensor, "B L"]:
        """The answer positions, EOS padding included."""
        return corrupt.answer_region(self.prompt_length, self.answer_length, self.tokens.shape[1])

    @property
    def inside(self) -> Bool[Tensor, "B L"]:
        """Prompt and answer: what attention may see. Padding to the right of the answer never exists when decoding."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return position < self.prompt_length.unsqueeze(1) + self.answer_length

    def text(self, eos_ids: Iterable[int]) -> Bool[Tensor, "B L"]:
        """The answer up to its first end of text, that one included."""
        answer = self.answer
        ended = torch.zeros_like(answer)
        for eos in eos_ids:
            ended = ended | (answer & (self.tokens == eos))
        return answer & (ended.cumsum(1) - ended.long() == 0)  # nothing ended before this position


class Corruption(NamedTuple):
    """Hidden positions, and the weight of each position's loss (0 wherever it is not supervised)."""

    masked: Bool[Tensor, "B L"]
    weight: Float[Tensor, "B L"]


class Corruptor(abc.ABC):
    """A forward process: batch and random numbers in, hidden positions and loss weights out."""

    @abc.abstractmethod
    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        """Choose the hidden positions among `batch.answer`. `generator` lives on the batch's device."""


declare("corruptor", Corruptor)


@register("corruptor", "uniform")
@dataclass(frozen=True)
class Uniform(Corruptor):
    """One level for the whole answer: p = (1 - floor) t + floor, t ~ U[0, 1); weight 1/p. LLaDA's process (floor 1e-3)."""

    floor: float = 1e-3
    stratified: bool = True

    def __post_init__(self) -> None:
        corrupt.check_interval(self.floor, 1.0)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        t = corrupt.uniform_levels(batch.tokens.shape[0], generator, stratified=self.stratified)
        level = ((1.0 - self.floor) * t + self.floor).unsqueeze(1)  # [B, 1]
        masked = corrupt.bernoulli(level, batch.answer, generator)
        return Corruption(masked, masked / level)


@register("corruptor", "exact_count")
@dataclass(frozen=True)
class ExactCount(Corruptor):
    """k ~ U{1..n} of the n answer positions, weight n/k: the bound of `uniform` with less variance, and no row without a mask."""

    stratified: bool = True

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        answer = batch.answer
        t = corrupt.uniform_levels(batch.tokens.shape[0], generator, stratified=self.stratified)
        available = answer.sum(1)
        count = corrupt.count_from_level(t, available)
        masked = corrupt.exact_count(count, answer, generator)
        return Corruption(masked, masked * (available / count.clamp(min=1)).unsqueeze(1))


def active_block(
    batch: Batch, block_length: int | Int[Tensor, "B 1"], generator: torch.Generator
) -> tuple[Bool[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """A random block of each answer, and what is behind it. The last block may be shorter."""
    blocks = (batch.answer_length + block_length - 1) // block_length
    chosen = (corrupt.draw((len(batch.tokens), 1), generator) * blocks).long()  # [B, 1], from 0
    offset = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) - batch.prompt_length.unsqueeze(1)
    index = offset.div(block_length, rounding_mode="floor")  # [B, L]; negative in the prompt
    return batch.answer & (index == chosen), batch.answer & (index > chosen)


@register("corruptor", "active_block")
@dataclass(frozen=True)
class ActiveBlock(Corruptor):
    """What block-by-block decoding shows the model: blocks before are done, one block is partly masked, the rest is masked.

    For each row a block length out of `block_lengths` (0: the whole answer) and one of the N blocks are drawn; k ~ U{1..size} of the
    block's positions are hidden (all of them with probability `fully_masked` instead), with weight N size / k, so that the sum
    estimates the row's likelihood bound. Masked positions after the block get weight `rest`: 0 leaves them unsupervised.
    """

    block_lengths: tuple[int, ...] = (8, 16, 32)
    fully_masked: float = 0.0
    rest: float = 0.0

    def __post_init__(self) -> None:
        if not self.block_lengths or min(self.block_lengths) < 0:
            raise corrupt.CorruptionError(
                f"block_lengths must be lengths in tokens, got {self.block_lengths}. 0 stands for the whole answer. "
                "Write block_lengths: [8, 16, 32]."
            )
        if self.rest < 0:
            raise corrupt.CorruptionError(f"rest must be 0 or more, got {self.rest}. It is the weight of a loss. Write rest: 0.25.")
        if not 0.0 <= self.fully_masked <= 1.0:
            raise corrupt.CorruptionError(
                f"fully_masked must be a probability, got {self.fully_masked}. It is the share of rows whose block starts from "
                "nothing. Write fully_masked: 0.1."
            )

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        rows, total = len(batch.tokens), batch.answer_length
        lengths = [min(size or total, total) for size in self.block_lengths]
        pick = corrupt.pick(corrupt.draw((rows,), generator), [1.0] * len(lengths))
        size = torch.full_like(batch.prompt_length, lengths[0])  # [B]
        for number, other in enumerate(lengths):
            size = torch.where(pick == number, other, size)
        active, after = active_block(batch, size.unsqueeze(1), generator)
        available = active.sum(1)
        count = corrupt.count_from_level(corrupt.draw((rows,), generator), available)
        whole = corrupt.draw((rows,), generator) < self.fully_masked
        count = torch.where(whole, available, count)
        hidden = corrupt.exact_count(count, active, generator)
        blocks = (total + size - 1) // size
        weight = hidden * (blocks * available / count).unsqueeze(1)
        return Corruption(hidden | after, weight + self.rest * after)


def _by_block(
    batch: Batch, block_length: int, generator: torch.Generator, levels: Callable[..., Float[Tensor, "B N"]], **settings: Any
) -> Corruption:
    """Bernoulli masks at each block's level, weight 1 / level. levels: draws them for so many rows and blocks."""
    blocks = -(-batch.answer_length // block_length)
    block = answer_blocks(batch.prompt_length, batch.tokens.shape[1], block_length)
    level = corrupt.spread(levels(len(batch.tokens), blocks, generator, **settings), block)
    masked = corrupt.bernoulli(level, batch.answer, generator)
    return Corruption(masked, masked / torch.where(masked, level, 1.0))


def _check_block_length(block_length: int) -> None:
    if block_length < 1:
        raise corrupt.CorruptionError(
            f"block_length must be at least 1, got {block_length}. It counts the tokens of a block. Write block_length: 16."
        )


@register("corruptor", "monotone")
@dataclass(frozen=True)
class Monotone(Corruptor):
    """D2F's process: t_1 ~ U[minimum, maximum], later blocks noisier by u (maximum - t_1) / (N - 1); weight 1/t_b.

    The official interval is [0.2, 0.7], so no block is ever shown fully masked although decoding starts every block that way;
    maximum 1.0 closes that gap.
    """

    block_length: int = 16
    minimum: float = 0.2
    maximum: float = 0.7

    def __post_init__(self) -> None:
        _check_block_length(self.block_length)
        corrupt.check_interval(self.minimum, self.maximum)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        return _by_block(batch, self.block_length, generator, corrupt.monotone_levels, minimum=self.minimum, maximum=self.maximum)


@register("corruptor", "independent")
@dataclass(frozen=True)
class Independent(Corruptor):
    """D2F's ablation: every block draws its own level in [minimum, maximum]; weight 1/t_b."""

    block_length: int = 16
    minimum: float = 0.2
    maximum: float = 0.7

    def __post_init__(self) -> None:
        _check_block_length(self.block_length)
        corrupt.check_interval(self.minimum, self.maximum)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        return _by_block(batch, self.block_length, generator, corrupt.independent_levels, minimum=self.minimum, maximum=self.maximum)


@register("corruptor", "pipelined")
@dataclass(frozen=True)
class Pipelined(Corruptor):
    """The states of a pipelined decode: clean blocks, then levels that rise to full within `span` blocks; weight 1/t_b.

    `minimum` is the lowest level of the front block; it bounds the weight at 1 / minimum.
    """

    block_length: int = 16
    span: int = 3
    minimum: float = 0.1

    def __post_init__(self) -> None:
        _check_block_length(self.block_length)
        corrupt.check_interval(self.minimum, 1.0)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        return _by_block(batch, self.block_length, generator, corrupt.pipelined_levels, span=self.span, minimum=self.minimum)


@register("corruptor", "mixture")
@dataclass(frozen=True)
class Mixture(Corruptor):
    """Each row is corrupted by one of `parts`, drawn with `probabilities` (which are normalised; default: equal)."""

    parts: tuple[Corruptor, ...]
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        shares = self.probabilities
        if not self.parts:
            raise corrupt.CorruptionError("a mixture needs parts, got none. Write parts: [{_component_: uniform}].")
        if shares is not None and (len(shares) != len(self.parts) or min(shares) < 0 or sum(shares) <= 0):
            raise corrupt.CorruptionError(
                f"probabilities must be one non-negative number for each part, got {shares} for {len(self.parts)} parts. "
                f"Write probabilities: {[1.0] * len(self.parts)}."
            )

    def __call__(self, batch: Batch, generator: torch.Generator) -> Corruption:
        rows = batch.tokens.shape[0]
        shares = self.probabilities or (1.0,) * len(self.parts)
        pick = corrupt.pick(corrupt.draw((rows,), generator), shares).unsqueeze(1)
        masked, weight = self.parts[0](batch, generator)
        for number, part in enumerate(self.parts[1:], start=1):
            other = part(batch, generator)
            masked = torch.where(pick == number, other.masked, masked)
            weight = torch.where(pick == number, other.weight, weight)
        return Corruption(masked, weight)
