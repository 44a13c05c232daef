"""AdaBlock: end a block where a sentence ends, not after a fixed number of tokens.

    at the start s of a block, one forward, read w = window * L positions from s on:
        D <- positions of the window whose token is a delimiter (a newline, say)
        d <- the one of highest probability in D
        block <- s .. d            if c_d >= certainty
                 s .. s + B - 1    otherwise
    inside the block: commit {i : c_i >= threshold}, at least the best; the forward above is already the first step of it

          . . . the cat sat \\n On the mat ...        B = 8, delimiter \\n
          |<--- block --->|                           sure text behind a border need not wait, unsure text before it is not forced

Blocks are runs of positions on a canvas of masks and end where the logits say, so they only set what may be committed. A block-causal model
goes on seeing the canvas in its own blocks of `block_length`.

Reference: AdaBlock-dLLM, arXiv 2509.26432.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Schedule, check_ids
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample, Special
from dllm_toolkit.decoders.rules.schedule import blocks_of, check_lengths, first_masked, span
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, ModelSpec, Need, Rows, Tokens


@dataclass(frozen=True)
class Adapted:
    """The model's blocks, first and one past the last position of the open block, whether its end is still to be found, answer length."""

    block: Tokens
    start: Int[Tensor, "B"]
    stop: Int[Tensor, "B"]
    opening: Rows
    answer: Int[Tensor, "B"]


@register("schedule", "delimited")
@dataclass(frozen=True)
class Delimited(Schedule):
    """Blocks that end at a delimiter which the model is sure of, otherwise after `block_length` tokens.

    delimiters: ids of the tokens that end a block; they belong to a tokenizer, so there is no default ("eos" names the model's own).
    window: how far ahead one is looked for, as a share of the answer. certainty: the least probability of a delimiter that counts.

    Reference: AdaBlock-dLLM, arXiv 2509.26432.
    """

    cite = ("2509.26432",)
    needs = frozenset({Need.BIDIRECTIONAL})

    delimiters: tuple[Special, ...]
    block_length: int = 32
    window: float = 0.25
    certainty: float = 0.3

    def __post_init__(self) -> None:
        check_lengths(self.block_length)
        if len(self.delimiters) == 0:
            raise DecodeError(
                "delimiters must name at least one token, got none. A block ends at one of them. Write the id of the newline in your "
                "tokenizer, for instance delimiters: [198]."
            )
        if not 0 < self.window <= 1:
            raise DecodeError(f"window must be in (0, 1], got {self.window}. It is a share of the answer. Write window: 0.25.")
        if self.certainty < 0:
            raise DecodeError(f"certainty must be 0 or more, got {self.certainty}. It is a probability. Write certainty: 0.3.")

    def check_model(self, spec: ModelSpec) -> None:
        check_ids(spec, "delimiters", self.delimiters)

    def max_reads(self, answer_length: int) -> int:
        return max(min(self.block_length, answer_length), int(self.window * answer_length))

    def init(self, state: State) -> Adapted:
        start = first_masked(state)
        return Adapted(blocks_of(state, self.block_length), start, start.clone(), torch.ones_like(state.done), state.end - state.begin)

    def _window(self, own: Adapted, state: State) -> Int[Tensor, "B"]:
        """One past the last position in which a delimiter is looked for."""
        return torch.minimum(own.start + (own.answer.double() * self.window).long(), state.end)

    def _whole(self, own: Adapted, state: State) -> Int[Tensor, "B"]:
        """One past the last position of a block without a delimiter."""
        return torch.minimum(own.start + self.block_length, state.end)

    def region(self, state: State) -> Region:
        own: Adapted = state.parts.schedule
        reach = torch.maximum(self._window(own, state), self._whole(own, state))
        stop = torch.where(own.opening, reach, own.stop)
        return span(state, own.block, own.start, stop, stop, own.start)

    def refine(self, region: Region, proposal: Proposal, state: State) -> Region:
        own: Adapted = state.parts.schedule
        sure = region.eligible & (proposal.confidence >= self.certainty) & self._delimiting(proposal, state)
        last = select.best(proposal.confidence, sure & (state.positions < self._window(own, state).unsqueeze(1)))
        place = torch.where(last, state.positions, 0).amax(1)
        found = torch.where(last.any(1), place + 1, self._whole(own, state))
        here = state.positions < torch.where(own.opening, found, own.stop).unsqueeze(1)
        return replace(region, eligible=region.eligible & here, force=region.force & here)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Adapted:
        own: Adapted = state.parts.schedule
        found = torch.where(region.eligible, state.positions + 1, 0).amax(1)
        return replace(own, stop=torch.where(own.opening, found, own.stop), opening=torch.zeros_like(own.opening))

    def advance(self, state: State) -> tuple[Adapted, Rows]:
        own: Adapted = state.parts.schedule
        following = first_masked(state)
        move = (following >= own.stop) & state.settled
        start = torch.where(move, following, own.start)
        return replace(own, start=start, opening=own.opening | move), move & (following == state.masked.shape[1])

    def _delimiting(self, proposal: Proposal, state: State) -> Canvas:
        found = torch.zeros_like(state.masked)
        for item in self.delimiters:
            for one in state.spec.eos_ids if item == "eos" else (int(item),):
                found = found | (proposal.tokens == one)
        return found


@register("decoder", "ada_block")
def ada_block(
    delimiters: tuple[Special, ...],
    block_length: int = 32,
    threshold: float = 0.9,
    certainty: float = 0.3,
    window: float = 0.25,
    temperature: float = 0.0,
) -> BlockDecoder:
    """AdaBlock-dLLM (arXiv 2509.26432): Fast-dLLM's threshold in blocks that end at a delimiter.

    delimiters: ids of your tokenizer, as published the newline. certainty: 0.3 for LLaDA, 0.5 for Dream.
    """
    return BlockDecoder(
        schedule=Delimited(delimiters, block_length, window, certainty),
        commit=Gate(threshold),
        propose=Sample(temperature=temperature),
    )
