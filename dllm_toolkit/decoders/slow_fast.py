"""SlowFast: find out slowly how far the predictions can be trusted, then decode that far quickly.

    cycle, from the first masked position s of the block:
        slow    at most `explore_steps` forwards over the rest of the block, in each
                    e_t <- one past the farthest position with c >= trust (s + 1 if there is none)
                    commit {i : c_i >= threshold} of the rest of the block, at least the best
                until the last `memory` estimates e_t spread by less than `spread`: e <- e_t
                if they never do: e <- their mean, rounded down
        fast    until s .. e holds no mask: commit {i : c_i >= threshold} of s .. e, at least the best

        s            e
        x x . x . . .|. . . x . . .       what is committed behind e stays, and lies in a later cycle
        <-- fast --->
        <-------- slow ----------->

The first fast forward sees everything anew; behind e nothing changes until the cycle ends, so a dual cache computes s .. e alone. The
spread is the standard deviation (of all, not of a sample). In the released code the slow phase goes on for all its steps after it has
converged.

Reference: Wei et al., Accelerating Diffusion Large Language Models with SlowFast Sampling: The Three Golden Principles, arXiv 2506.10848.
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
from dllm_toolkit.decoders.rules.schedule import blocks_of, check_lengths, first_masked, span
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Need, Rows, Tokens


@dataclass(frozen=True)
class Cycle:
    """Blocks; first position of the cycle, one past its last; still slow?; forwards of the slow phase; its latest estimates of the end."""

    block: Tokens
    start: Int[Tensor, "B"]
    stop: Int[Tensor, "B"]
    slow: Rows
    taken: Int[Tensor, "B"]
    ends: Int[Tensor, "B memory"]


@register("schedule", "cycles")
@dataclass(frozen=True)
class Cycles(Schedule):
    """Cycles of a slow phase, in which the rest of the block is open and the end of the cycle is found, and a fast one up to that end.

    block_length None: the whole answer. explore_steps: most forwards of a slow phase. trust: least probability of a position that the
    cycle may reach. memory: how many estimates must agree. spread: their standard deviation must be below it, in tokens.

    Reference: SlowFast, arXiv 2506.10848.
    """

    cite = ("2506.10848",)
    needs = frozenset({Need.BIDIRECTIONAL})

    block_length: int | None = None
    explore_steps: int = 6
    trust: float = 0.3
    spread: float = 1.0
    memory: int = 2

    def __post_init__(self) -> None:
        check_lengths(self.block_length)
        if not 1 <= self.memory <= self.explore_steps:
            raise DecodeError(
                f"memory and explore_steps must satisfy 1 <= memory <= explore_steps, got {self.memory} and {self.explore_steps}. That "
                "many estimates are compared. Write memory: 2 and explore_steps: 6."
            )
        if self.spread < 0:
            raise DecodeError(f"spread must be 0 or more, got {self.spread}. It is a standard deviation in tokens. Write spread: 1.0.")

    def max_reads(self, answer_length: int) -> int:
        return min(self.block_length or answer_length, answer_length)

    def init(self, state: State) -> Cycle:
        start = first_masked(state)
        ends = start.unsqueeze(1).expand(-1, self.memory).clone()
        return Cycle(blocks_of(state, self.block_length), start, start.clone(), torch.ones_like(state.done), torch.zeros_like(start), ends)

    def _stop(self, own: Cycle, state: State) -> Int[Tensor, "B"]:
        """One past the last open position: of the block while slow, of the cycle while fast."""
        length = own.block.shape[1]
        open_now = own.block.gather(1, own.start.clamp(max=length - 1).unsqueeze(1))
        block_stop = torch.where((own.block == open_now) & state.inside, state.positions + 1, 0).amax(1)
        return torch.where(own.slow, block_stop, own.stop)

    def region(self, state: State) -> Region:
        own: Cycle = state.parts.schedule
        stop = self._stop(own, state)
        return span(state, own.block, own.start, stop, stop, 2 * own.start + ~own.slow)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Cycle:
        own: Cycle = state.parts.schedule
        known = region.eligible & (proposal.confidence >= self.trust)
        end = torch.maximum(torch.where(known, state.positions + 1, 0).amax(1), own.start + 1)
        ends = torch.cat((own.ends[:, 1:], end.unsqueeze(1)), dim=1)
        taken = own.taken + 1
        mean = ends.double().mean(1)
        apart = (ends.double() - mean.unsqueeze(1)).square().mean(1).sqrt()
        agreed = (apart < self.spread) & (taken >= self.memory)
        found = torch.where(agreed, end, mean.long())
        return replace(
            own,
            stop=torch.where(own.slow, found, own.stop),
            slow=own.slow & ~agreed & (taken < self.explore_steps),
            taken=torch.where(own.slow, taken, own.taken),
            ends=torch.where(own.slow.unsqueeze(1), ends, own.ends),
        )

    def advance(self, state: State) -> tuple[Cycle, Rows]:
        own: Cycle = state.parts.schedule
        following = first_masked(state)
        move = (following >= self._stop(own, state)) & state.settled
        after = replace(own, start=torch.where(move, following, own.start), slow=own.slow | move, taken=own.taken.masked_fill(move, 0))
        return after, move & (following == state.masked.shape[1])


@register("decoder", "slow_fast")
def slow_fast(
    block_length: int | None = None,
    threshold: float = 0.9,
    explore_steps: int = 6,
    trust: float = 0.3,
    spread: float = 1.0,
    memory: int = 2,
    temperature: float = 0.0,
) -> BlockDecoder:
    """SlowFast sampling (arXiv 2506.10848). block_length None: the whole answer is one block, as published."""
    return BlockDecoder(
        schedule=Cycles(block_length, explore_steps, trust, spread, memory),
        commit=Gate(threshold),
        propose=Sample(temperature=temperature),
    )
