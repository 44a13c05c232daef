"""How rows lie before the model: a layout says which lanes there are, who sees whom, and where the logits of each position are read.

    Own           [ prompt | noisy answer ]                          the attention that the model has, block-causal or causal too
    Full          [ prompt | noisy answer ]                          everybody sees everybody
    BlockCausal   [ prompt | noisy answer ]                          blocks see themselves and what is before them: a D2F student
    Annealed      [ prompt | noisy answer ]                          the past, and a growing share of the future: from AR to diffusion
    Doubled       [ noisy answer ][ prompt | clean answer ]          noisy blocks see themselves and the clean blocks before them

`read[b, i]` is the lane whose output row predicts the token at position i. It absorbs the shift of models like Dream (row i - 1 predicts
token i) and the doubled layout, so losses live on the canvas [B, L] and know of neither. The lanes of a noisy half have the rotary
positions of the canvas, as their clean copies do.

References: D2F (arXiv 2508.09192); BD3-LM (arXiv 2503.09573); Fast-dLLM v2 (arXiv 2509.26328); DiffuLLaMA (arXiv 2410.17891).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit.ops import masks
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.types import Attention, BlockAnchor, ModelSpec


class Seen(NamedTuple):
    """What the model is given: W lanes a row, and where each canvas position is read.

    allow: None is the past, for models that see nothing else. block: the rule once more, for attention over tiles: q sees k where
    block[k] <= block[q]. None for rules that are no order of blocks.
    """

    tokens: Int[Tensor, "B W"]
    positions: Int[Tensor, "B W"]
    allow: Bool[Tensor, "B W W"] | None
    read: Int[Tensor, "B L"]
    block: Int[Tensor, "B W"] | None = None


class Layout(abc.ABC):
    """Arranges noisy rows for the model."""

    @abc.abstractmethod
    def __call__(self, batch: Batch, tokens: Int[Tensor, "B L"], shift: int, generator: torch.Generator) -> Seen:
        """`batch` has the clean rows, `tokens` what is shown instead of them. `generator`: for rules that are drawn.

        What is drawn must not depend on the number of rows: of several processes each lays out its own, and all draw the same.
        """

    def lanes(self, length: int, answer_length: int) -> int:
        """W, for rows of `length` tokens."""
        return length

    def decodes(self) -> tuple[Attention, int | None]:
        """The attention rule and the block length that a student of this layout decodes with."""
        return "full", None

    def block_length(self) -> int | None:
        """The blocks that answers must be cut into without a rest, if any."""
        return None


def single(tokens: Int[Tensor, "B L"], allow: Bool[Tensor, "B L L"] | None, shift: int, block: Int[Tensor, "B L"] | None = None) -> Seen:
    """One lane a position."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Seen(tokens, place, allow, (place - shift).clamp(min=0), block)


def full_blocks(batch: Batch) -> Int[Tensor, "B L"]:
    """Everybody sees prompt and answer (block 0); the padding behind the answer is block 1, which only itself sees."""
    return (~batch.inside).long()


def full_allow(batch: Batch) -> Bool[Tensor, "B L L"]:
    """Everybody sees prompt and answer; nobody sees the padding behind the answer."""
    return batch.inside.unsqueeze(1).expand(*batch.tokens.shape, batch.tokens.shape[1])


def canvas_blocks(batch: Batch, block_length: int, anchor: BlockAnchor = "prompt") -> Int[Tensor, "B L"]:
    """Block of each position, 0 for the prompt; the padding behind the answer is a block of its own that only itself sees.

    anchor: blocks begin at the prompt's end, or at multiples of their length, wherever the prompt ends.

    k:  p p | 1 1 | 2 2 | .
    p   x x   . .   . .   .      under the rule of blocks the prompt never sees the answer
    1   x x   x x   . .   .
    2   x x   x x   x x   .
    .   x x   x x   x x   x      padding: no row of the softmax is empty
    """
    rows, length = batch.tokens.shape
    if anchor == "absolute":
        block = masks.absolute_blocks(rows, length, block_length, batch.tokens.device)
    else:
        block = masks.answer_blocks(batch.prompt_length, length, block_length)
    return block.masked_fill(~batch.inside, length + 1)


def model_blocks(batch: Batch, spec: ModelSpec) -> Int[Tensor, "B L"]:
    """Blocks as a block-causal model counts them."""
    return canvas_blocks(batch, spec.block_size or batch.answer_length, spec.block_anchor)


@dataclass(frozen=True)
class Full(Layout):
    """Everybody sees prompt and answer; nobody sees the padding behind the answer."""

    def __call__(self, batch: Batch, tokens: Int[Tensor, "B L"], shift: int, generator: torch.Generator) -> Seen:
        return single(tokens, full_allow(batch), shift, full_blocks(batch))


@dataclass(frozen=True)
class Own(Layout):
    """The attention rule of a model: what it decodes with, and was trained with."""

    spec: ModelSpec

    def __call__(self, batch: Batch, tokens: Int[Tensor, "B L"], shift: int, generator: torch.Generator | None = None) -> Seen:
        if self.spec.attention == "causal":
            return single(tokens, None, shift)
        if self.spec.attention == "full":
            return single(tokens, full_allow(batch), shift, full_blocks(batch))
        block = model_blocks(batch, self.spec)
        return single(tokens, masks.block_causal(block), shift, block)


@dataclass(frozen=True)
class BlockCausal(Layout):
    """Blocks of `length` tokens from the prompt's end see themselves and everything before them, all of it noisy."""

    length: int

    def __call__(self, batch: Batch, tokens: Int[Tensor, "B L"], shift: int, generator: torch.Generator) -> Seen:
        block = canvas_blocks(batch, self.length)
        return single(tokens, masks.block_causal(block), shift, block)

    def decodes(self) -> tuple[Attention, int | None]:
        return "block_causal", self.length

    def block_length(self) -> int | None:
        return self.length


@dataclass(frozen=True)
class Annealed(Layout):
    """Causal attention, and each pair of the future with probability `share`, drawn anew for every batch, the same for all layers."""

    share: float

    def __call__(self, batch: Batch, tokens: Int[Tensor, "B L"], shift: int, generator: torch.Generator) -> Seen:
        allow = masks.annealed_causal(tokens.shape[1], self.share, generator)
        return single(tokens, allow & (batch.inside.unsqueeze(1) | ~batch.inside.unsqueeze(2)), shift)


@dataclass(frozen=True)
class Doubled(Layout):
    """[noisy answer | clean row]: every block is predicted from itself, noisy, and the clean rest, all blocks in one forward.

    first_token: with a shift, a block's first token is read from the row before it, `clean` as when decoding, or `noisy` as in ports of
    Fast-dLLM v2. The prompt is clean and lies in the clean half alone.
    """

    length: int
    first_token: Literal["clean", "noisy"] = "clean"

    def __call__(self, batch: Batch, tokens: Int[Tensor, "B L"], shift: int, generator: torch.Generator) -> Seen:
        rows, length = tokens.shape
        answer = batch.answer_length
        place = torch.arange(length, device=tokens.device).expand_as(tokens)
        noisy = batch.prompt_length.unsqueeze(1) + torch.arange(answer, device=tokens.device)  # [B, A] canvas position of noisy lanes
        block = canvas_blocks(batch, self.length)
        labels = torch.cat((block.gather(1, noisy), block), dim=1)  # [B, A + L]
        clean = torch.arange(answer + length, device=tokens.device).expand_as(labels) >= answer
        offset = place - batch.prompt_length.unsqueeze(1)
        read = offset - shift
        if shift:
            border = offset % self.length == 0 if self.first_token == "clean" else offset == 0
            read = torch.where(border, answer + place - 1, read)
        return Seen(
            torch.cat((tokens.gather(1, noisy), batch.tokens), dim=1),
            torch.cat((noisy, place), dim=1),
            masks.block_diffusion(labels, clean),
            torch.where(batch.answer, read, 0),
        )

    def lanes(self, length: int, answer_length: int) -> int:
        return answer_length + length

    def decodes(self) -> tuple[Attention, int | None]:
        return "block_causal", self.length

    def block_length(self) -> int | None:
        return self.length
