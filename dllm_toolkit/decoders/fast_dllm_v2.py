"""Fast-dLLM v2: blocks of a block-causal model, each decoded part by part.

    for each block of the model (32), left to right
        for each of its parts (8), left to right
            until the part holds no mask:
                one forward over the block, which sees itself and everything before
                commit {i in the part : c_i >= threshold}, at least the best

        block 2 |  part 1   part 2   part 3   part 4
                | x x x x  x . x .  . . . .  . . . .        the whole block is seen, one part may commit

Two caches fit. `block_causal` keeps finished blocks and is exact. `nested` also keeps, within the open block, the parts that are not open
(the paper's sub-block cache): the block is computed when a part opens, after that the part alone. The released code takes each block's
first token from the block before, as an autoregressive model would; here it is a masked position like any other, read from the same row of
logits.

Reference: Wu et al., Fast-dLLM v2: Efficient Block-Diffusion LLM, arXiv 2509.26328.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import blocks_of, check_lengths, first_masked
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Need, Rows, Tokens


def runs(label: Tokens) -> Tokens:
    """Where the run of equal labels that a position lies in begins."""
    places = torch.arange(label.shape[1], device=label.device).expand_as(label)
    fresh = torch.cat((torch.ones_like(label[:, :1], dtype=torch.bool), label[:, 1:] != label[:, :-1]), dim=1)
    return torch.where(fresh, places, 0).cummax(1).values


@dataclass(frozen=True)
class InnerParts:
    """Block and part of every position (a part is named after its first position), and the open part."""

    block: Tokens
    part: Tokens
    open: Int[Tensor, "B"]


@register("schedule", "nested")
@dataclass(frozen=True)
class Nested(Schedule):
    """Blocks that a model sees as a whole and that are decoded in parts of `part_length`, left to right.

    block_length None: the model's own blocks where they count from position 0, otherwise the whole answer. A part never crosses a block
    border. Only whole blocks are closed: within one everybody sees everybody, so the keys of a full part still change.

    Reference: Fast-dLLM v2, arXiv 2509.26328.
    """

    cite = ("2509.26328",)
    needs = frozenset({Need.BIDIRECTIONAL})

    block_length: int | None = None
    part_length: int = 8

    def __post_init__(self) -> None:
        check_lengths(self.block_length)
        if self.part_length < 1:
            raise DecodeError(f"part_length must be 1 or more, got {self.part_length}. It counts tokens. Write part_length: 8.")

    def max_reads(self, answer_length: int) -> int:
        return min(self.part_length, self.block_length or answer_length, answer_length)

    def init(self, state: State) -> InnerParts:
        block = blocks_of(state, self.block_length)
        begin = runs(block)
        prompt = block == 0  # what lies before the first block is not cut into parts
        part = torch.where(prompt, begin, state.positions - (state.positions - begin) % self.part_length)
        return InnerParts(block, part, self._first(state, part))

    @staticmethod
    def _first(state: State, part: Tokens) -> Int[Tensor, "B"]:
        """The first part that still holds a mask; L where there is none."""
        length = part.shape[1]
        place = first_masked(state)
        return torch.where(place < length, part.gather(1, place.clamp(max=length - 1).unsqueeze(1)).squeeze(1), length)

    def region(self, state: State) -> Region:
        own: InnerParts = state.parts.schedule
        length = own.part.shape[1]
        open_now = own.open.unsqueeze(1)
        here = state.inside & (own.part == open_now)
        visible = state.positions < state.end.unsqueeze(1)
        closed = own.part < open_now
        if state.spec.attention != "full":
            block = own.block.gather(1, open_now.clamp(max=length - 1))
            visible = visible & (own.block <= block)
            closed = closed & (own.block < block)
        return Region(
            read=here & ~state.fixed,
            eligible=here & state.masked,
            group=torch.zeros_like(own.block),
            force=here,
            visible=visible,
            closed=closed,
            block=own.block,
            epoch=own.open,
        )

    def advance(self, state: State) -> tuple[InnerParts, Rows]:
        own: InnerParts = state.parts.schedule
        move = ~(state.masked & (own.part == own.open.unsqueeze(1))).any(1) & state.settled
        following = self._first(state, own.part)
        return replace(own, open=torch.where(move, following, own.open)), move & (following == own.part.shape[1])


@register("decoder", "fast_dllm_v2")
def fast_dllm_v2(
    block_length: int | None = None,
    part_length: int = 8,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> BlockDecoder:
    """Fast-dLLM v2 (arXiv 2509.26328): a threshold in parts of 8 of the model's blocks (block_length None)."""
    return BlockDecoder(
        schedule=Nested(block_length, part_length),
        commit=Gate(threshold),
        propose=Sample(temperature=temperature, top_p=top_p),
    )
