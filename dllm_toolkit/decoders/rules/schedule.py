"""Where to decode: the whole answer, block after block, or several blocks in a pipeline.

Blocks are counted from each row's own `begin`, so unequal prompts need no left padding (or from position 0, where a model was trained so):

    row 0   p p p p | 1 1 1 1 | 2 2 2 2 | 3 3 3 3
    row 1   p p | 1 1 1 1 | 2 2 2 2 | 3 3 3 3 | . .
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Schedule
from dllm_toolkit.ops import masks, select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, Need, Rows, Tokens


def first_open_block(state: State, block: Tokens) -> Int[Tensor, "B"]:
    """The first block that still holds a mask; L + 1 where there is none."""
    beyond = state.masked.shape[1] + 1
    return torch.where(state.masked, block, beyond).amin(1)


def first_masked(state: State) -> Int[Tensor, "B"]:
    """The first masked position; L where there is none."""
    return torch.where(state.masked, state.positions, state.masked.shape[1]).amin(1)


def check_lengths(block_length: masks.Lengths | None) -> None:
    """Raises DecodeError for a block length that is not one or more lengths of 1 or more."""
    lengths = (block_length,) if isinstance(block_length, int) else block_length
    if lengths is not None and (len(lengths) == 0 or min(lengths) < 1):
        raise DecodeError(
            f"block_length must be 1 or more, got {block_length}. It counts tokens, of every block or of the first ones and all later "
            "ones. Write block_length: 32, or block_length: [8, 16, 32]."
        )


def blocks_of(state: State, block_length: masks.Lengths | None) -> Tokens:
    """Block index of every position, counted from where the model counts. None: as long as the model's own block, or the whole canvas.

    Several lengths are those of the first blocks; the last of them is that of all later ones.
    """
    rows, length = state.tokens.shape
    if state.spec.block_anchor == "absolute":
        return masks.absolute_blocks(rows, length, block_length or state.spec.block_size or length, state.tokens.device)
    return masks.answer_blocks(state.begin, length, block_length or length)


def span(
    state: State, block: Tokens, start: Int[Tensor, "B"], stop: Int[Tensor, "B"], reach: Int[Tensor, "B"], epoch: Int[Tensor, "B"]
) -> Region:
    """The region of a run of positions that need not be a block: start .. stop may be committed, start .. reach is read.

    Everything before `start` must be decided. `block` is what a block-causal model sees the canvas in; a run may span several blocks.
    """
    first, last, read_to = start.unsqueeze(1), stop.unsqueeze(1), reach.unsqueeze(1)
    within = state.inside & (state.positions >= first)
    here = within & (state.positions < last)
    visible = state.positions < state.end.unsqueeze(1)
    closed = state.positions < first
    if state.spec.attention != "full":
        length = block.shape[1]
        visible = visible & (block <= block.gather(1, (read_to - 1).clamp(0, length - 1)))
        closed = closed & (block < first_open_block(state, block).unsqueeze(1))
    return Region(
        read=within & (state.positions < read_to) & ~state.fixed,
        eligible=here & state.masked,
        group=torch.zeros_like(block),
        force=here,
        visible=visible,
        closed=closed,
        block=block,
        epoch=epoch,
    )


@dataclass(frozen=True)
class Blocks:
    """State of SemiAutoregressive: block of every position (constant), the open block, steps spent in it."""

    block: Tokens
    open: Int[Tensor, "B"]
    spent: Int[Tensor, "B"]
    answer: Int[Tensor, "B"]


@register("schedule", "semi_autoregressive")
@dataclass(frozen=True)
class SemiAutoregressive(Schedule):
    """One block at a time, left to right; the next opens when the present one holds no mask and has settled.

    `block_length` None opens the whole answer at once; several lengths are stages: [8, 8, 32] makes two blocks of 8, then blocks of 32.
    `reach` "answer" keeps the blocks behind the present one open: they are read and not closed, so a revise rule may still change them, and
    no cache keeps their keys.

    Three flags reproduce released loops; two count steps of the whole answer, shared out over its blocks. `hold` gives every block its
    share of steps: a full one stays open (LLaDA's loop), and a step may commit nothing while there are steps left (Dream's). `step_cap`
    leaves a block after its share even when masks are left in it; the next block's first step may still fill them, and what is masked at
    the end cuts the text short: Fast-dLLM's v1 dual-cache loop. `least_steps` is spent on each block, full or not: Fast-dLLM's first
    release always runs a second forward.

    Reference: LLaDA, arXiv 2502.09992, semi-autoregressive remasking.
    """

    cite = ("2502.09992",)
    needs = frozenset({Need.BIDIRECTIONAL})

    block_length: int | tuple[int, ...] | None = 32
    hold: int | None = None
    step_cap: int | None = None
    least_steps: int = 1
    reach: Literal["block", "answer"] = "block"

    def __post_init__(self) -> None:
        check_lengths(self.block_length)
        if self.reach == "answer" and self.step_cap is not None:
            raise DecodeError(
                f"reach: answer does not go with step_cap, got step_cap={self.step_cap}. Blocks that are left with masks would have to be "
                "filled for ever. Remove step_cap."
            )
        for name in ("hold", "step_cap"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DecodeError(f"{name} must be 1 or more, got {getattr(self, name)}. It counts steps of an answer. Write {name}: 64.")
        if self.least_steps < 1:
            raise DecodeError(f"least_steps must be 1 or more, got {self.least_steps}. It counts steps of a block. Write least_steps: 1.")

    def max_reads(self, answer_length: int) -> int:
        if self.block_length is None or self.reach == "answer":
            return answer_length
        longest = self.block_length if isinstance(self.block_length, int) else max(self.block_length)
        return min(longest, answer_length)

    def init(self, state: State) -> Blocks:
        block = blocks_of(state, self.block_length)
        return Blocks(block, first_open_block(state, block), torch.zeros_like(state.begin), state.masked.sum(1))

    def region(self, state: State) -> Region:
        own: Blocks = state.parts.schedule
        open_now = own.open.unsqueeze(1)
        inside = state.inside
        here = self._open(own) & inside
        if self.step_cap is not None:  # masks that earlier blocks left behind get one more chance when a block opens
            here = here | (inside & state.masked & (own.block < open_now) & (own.spent == 0).unsqueeze(1))
        force = here
        if self.hold is not None:
            force = here & self._spent(own, state, self.hold).unsqueeze(1)
        visible = state.positions < state.end.unsqueeze(1)
        if state.spec.attention != "full":
            visible = visible & (own.block <= open_now)
        closed = own.block < (self._first(own, state) if self.reach == "answer" else open_now)
        return Region(
            read=here & ~state.fixed,
            eligible=here & state.masked,
            group=torch.zeros_like(own.block),  # one open block: one promise of progress a row
            force=force,
            visible=visible,
            closed=closed & ~state.masked if self.step_cap is not None else closed,
            block=own.block,
            epoch=own.open,
        )

    def advance(self, state: State) -> tuple[Blocks, Rows]:
        own: Blocks = state.parts.schedule
        beyond = state.masked.shape[1] + 1
        open_now = own.open.unsqueeze(1)
        following = torch.where(state.masked & (own.block > open_now), own.block, beyond).amin(1)
        move = ~(state.masked & self._open(own)).any(1) & state.settled
        if self.hold is not None:
            move = move & self._spent(own, state, self.hold)
        if self.least_steps > 1:
            move = move & (own.spent + 1 >= self.least_steps)
        if self.step_cap is not None:
            move = move | self._spent(own, state, self.step_cap)
        opened = torch.where(move, following, own.open)
        return Blocks(own.block, opened, (own.spent + 1).masked_fill(move, 0), own.answer), opened == beyond

    def _open(self, own: Blocks) -> Canvas:
        open_now = own.open.unsqueeze(1)
        return own.block <= open_now if self.reach == "answer" else own.block == open_now

    @staticmethod
    def _first(own: Blocks, state: State) -> Int[Tensor, "B 1"]:
        """The block in which the answer begins; the prompt's tail may share it."""
        return own.block.gather(1, state.begin.clamp(max=own.block.shape[1] - 1).unsqueeze(1))

    @staticmethod
    def _spent(own: Blocks, state: State, steps: int) -> Rows:
        """Has the open block used up its share of `steps`, this step included?"""
        size = ((own.block == own.open.unsqueeze(1)) & state.inside).sum(1)
        return own.spent + 1 >= (steps * size).div(own.answer.clamp(min=1), rounding_mode="floor")


@register("schedule", "whole_answer")
def whole_answer() -> SemiAutoregressive:
    """The whole answer is one block (LLaDA pure diffusion, Dream)."""
    return SemiAutoregressive(block_length=None)


@dataclass(frozen=True)
class Pipeline:
    """State of Pipelined: block of every position, size of each block, number of blocks, how many are opened."""

    block: Tokens
    size: Int[Tensor, "B G"]
    blocks: Int[Tensor, "B"]
    opened: Int[Tensor, "B"]


@register("schedule", "pipelined")
@dataclass(frozen=True)
class Pipelined(Schedule):
    """Several blocks at once: a new one opens when the last opened one is decoded far enough.

    decoded(b) = share of block b that is decided; the prompt counts as decoded.
      open   block b + 1 when decoded(b) >= add_at, at most one a step, none after an end-of-text token;
      force  block b + 1 must commit in every step once decoded(b) >= activate_at (fully activated); before that it commits only
             what the rule is sure of (semi-activated);
      close  block b when it and all before it are full, in order.

        b1 x x x x | b2 x x . x | b3 . x . . | b4 (not opened)
           closed     forced       semi-active

    When an end-of-text token is committed in block j of a block-causal model, blocks after j are dropped: no earlier block can see
    them, so the text before that token stays exactly the same. `finish_opened` keeps decoding them, as the released code does.
    `max_open` caps the blocks in flight; `whole_blocks` drops the last, shorter block (released code: floor(max_new / block)).
    `activate_at` None obliges the first unfinished block alone to commit (d3LLM). `past_eos` opens blocks as if an end-of-text token were
    any other.

    Reference: D2F, arXiv 2508.09192, algorithm 2; d3LLM, arXiv 2601.07568.
    """

    cite = ("2508.09192", "2601.07568")
    needs = frozenset({Need.BIDIRECTIONAL})

    block_length: int = 32
    add_at: float = 0.1
    activate_at: float | None = 0.95
    max_open: int | None = None
    finish_opened: bool = False
    whole_blocks: bool = False
    past_eos: bool = False

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise DecodeError(f"block_length must be 1 or more, got {self.block_length}. It counts tokens. Write block_length: 32.")
        for name in ("add_at", "activate_at"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise DecodeError(
                    f"{name} must be in [0, 1], got {getattr(self, name)}. It is a decoded share of a block. Write {name}: 0.5."
                )
        if self.max_open is not None and self.max_open < 1:
            raise DecodeError(f"max_open must be 1 or more, got {self.max_open}. It counts unfinished blocks. Write max_open: 4.")

    def max_reads(self, answer_length: int) -> int:
        return answer_length if self.max_open is None else min(answer_length, self.max_open * self.block_length)

    def init(self, state: State) -> Pipeline:
        block = blocks_of(state, self.block_length)
        # The last block that is decoded, counted like `block`; where blocks count from position 0 the prompt fills the first ones.
        origin = state.begin if state.spec.block_anchor == "prompt" else torch.zeros_like(state.begin)
        reach = state.end - origin + (0 if self.whole_blocks else self.block_length - 1)
        blocks = reach.div(self.block_length, rounding_mode="floor")
        opened = torch.minimum(first_open_block(state, block), blocks)
        return Pipeline(block, select.group_count(state.inside, block), blocks, opened)

    def _decoded(self, own: Pipeline, state: State) -> Tensor:
        """Decoded share of every block [B, G], float64 so that 7 / 10 >= 0.7 holds as it does in Python. Empty blocks are 1."""
        left = select.group_count(state.masked, own.block)
        return 1.0 - left.double() / own.size.clamp(min=1)

    def _last(self, own: Pipeline, state: State) -> tuple[Int[Tensor, "B"], Rows]:
        """The last block that is still worth decoding, and whether an end-of-text token keeps others from opening."""
        if self.past_eos:
            return own.opened, torch.zeros_like(state.done)
        beyond = state.masked.shape[1] + 1
        ending = torch.where(state.is_eos(), own.block, beyond).amin(1)
        last = own.opened
        if state.spec.attention != "full" and not self.finish_opened:
            last = torch.minimum(last, ending)
        return last, ending < beyond

    def region(self, state: State) -> Region:
        own: Pipeline = state.parts.schedule
        last, _ = self._last(own, state)
        last = last.unsqueeze(1)
        inside = state.inside
        # What lies before the first unfinished block is closed; a full block behind an unfinished one is not, because its
        # keys depend on what is still masked. Without masks everything opened is closed.
        first = torch.minimum(first_open_block(state, own.block), own.opened + 1).unsqueeze(1)
        opened = inside & (own.block <= last)
        if self.activate_at is None:
            force = opened & (own.block == first)
        else:
            force = opened & (self._decoded(own, state).gather(1, (own.block - 1).clamp(min=0)) >= self.activate_at)
        visible = state.positions < state.end.unsqueeze(1)
        if state.spec.attention != "full":
            visible = visible & (own.block <= last)
        return Region(
            read=opened & (own.block >= first) & ~state.fixed,
            eligible=opened & state.masked,
            group=own.block,
            force=force,
            visible=visible,
            closed=own.block < first,
            block=own.block,
            epoch=first.squeeze(1),
        )

    def advance(self, state: State) -> tuple[Pipeline, Rows]:
        own: Pipeline = state.parts.schedule
        last, ended = self._last(own, state)
        full = (self._decoded(own, state).gather(1, own.opened.unsqueeze(1)) >= self.add_at).squeeze(1)
        more = full & (own.opened < own.blocks) & ~ended
        if self.max_open is not None:
            first = torch.minimum(first_open_block(state, own.block), own.opened + 1)
            more = more & (own.opened + 1 - first < self.max_open)
        waiting: Canvas = state.masked & (own.block <= last.unsqueeze(1))
        nothing_left = ~waiting.any(1) & ((own.opened == own.blocks) | ended)
        return replace(own, opened=own.opened + more.long()), nothing_left
