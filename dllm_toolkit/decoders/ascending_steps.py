"""ASS, ascending step size: 1, 2, 4, 8, ... tokens a step, so an answer of n tokens takes floor(log2 n) forwards.

    N <- floor(log2 n)
    step t = 0 .. N - 2   commit the 2^t best-ranked positions
    step N - 1            commit all that is left, n - (2^(N-1) - 1)

    stages = 1    every step chooses from the whole answer                 n = 32:  1 2 4 8 17
    stages = 3    the last stages - 1 steps fill one part each, from       n = 32:  | 1 2 4 | 8 | 17 |
                  left to right; the steps before them share the first

Why: early steps are the risky ones; the more text stands, the more tokens can be decided together.

Reference: Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer Decoding Step,
arXiv 2509.23924.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


def doublings(count: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """floor(log2 count), exactly; at least 1."""
    powers = torch.ones_like(count).unsqueeze(1) << torch.arange(1, 31, device=count.device)
    return (count.unsqueeze(1) >= powers).sum(1).clamp(min=1)


@dataclass(frozen=True)
class Ascent:
    """What was open when the present span opened, steps taken in it, and the epoch that this belongs to."""

    opened: Canvas
    taken: Int[Tensor, "B"]
    epoch: Int[Tensor, "B"]


@register("commit", "ascending")
@dataclass(frozen=True)
class Ascending(Commit):
    """Commit 1, 2, 4, ... of the best-ranked positions, and in step floor(log2 n) all that is left of the n masks of the open span.

    stages: the last `stages` - 1 steps fill one part of the span each, from left to right; 1 lets every step choose anywhere.

    Reference: ASS, arXiv 2509.23924.
    """

    cite = ("2509.23924",)

    stages: int = 1

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise DecodeError(f"stages must be 1 or more, got {self.stages}. 1 lets every step choose anywhere. Write stages: 1.")

    def init(self, state: State) -> Ascent:
        return Ascent(torch.zeros_like(state.masked), torch.zeros_like(state.begin), torch.full_like(state.begin, -1))

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own = self._now(region, state)
        steps = doublings(own.opened.sum(1))
        last = own.taken >= steps - 1
        step = own.taken.clamp(max=30)
        one = torch.ones_like(step)
        quota = torch.where(last, state.tokens.shape[1], one << step)
        among = region.eligible
        if self.stages > 1:
            # Step t's part ends where 2^(t+1) - 1 masks lie before it; the first part is shared by the steps that have none of their own.
            border = (one << torch.maximum(step + 1, steps - self.stages + 1)) - 1
            reached = own.opened & (own.opened.cumsum(1) <= border.unsqueeze(1))
            among = among & (reached | last.unsqueeze(1))
        return select.top_k(proposal.score, among, quota)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Ascent:
        own = self._now(region, state)
        return Ascent(own.opened, own.taken + 1, own.epoch)

    def _now(self, region: Region, state: State) -> Ascent:
        own: Ascent = state.parts.commit
        fresh = region.epoch != own.epoch
        opened = torch.where(fresh.unsqueeze(1), region.eligible, own.opened)
        # A tensor of its own: a compiled step notices when two fields are one tensor.
        return Ascent(opened, own.taken.masked_fill(fresh, 0), region.epoch.clone())


@register("decoder", "ascending_steps")
def ascending_steps(
    block_length: int | None = None,
    stages: int = 1,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """ASS (arXiv 2509.23924): an answer in log2 steps of doubling size. Made for models trained for consistent trajectories.

    stages: the released code's block_num. block_length None: the whole answer at once, as in the paper. stop_at_eos false: as released.
    """
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Ascending(stages),
        propose=Sample(temperature=temperature),
        stop=stop,
    )
