"""Fast-dLLM: commit every token of the block whose probability licenses it, with a prefix or dual cache.

    threshold   commit {i : c_i >= tau}, at least the best
    factor      commit the longest ranked prefix with (n + 1)(1 - c_(n)) <= f, at least the best
    steps       with a threshold: no more than the step's even share of the masks, plus what earlier steps left unused

Why: if all n confidences exceed 1 - e and (n + 1) e <= 1, the product of marginals and the joint have the same argmax.

Reference: Wu et al., Fast-dLLM, arXiv 2505.22618. The caches are `cache: prefix` and `cache: dual`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Factor, Gate, Progress
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, PyTree


@dataclass(frozen=True)
class Saved:
    """State of Allowance: the row's progress, and how many tokens earlier steps were allowed but did not commit."""

    progress: Progress
    unused: Int[Tensor, "B"]


@register("commit", "allowance")
@dataclass(frozen=True)
class Allowance(Commit):
    """Commit what passes a threshold, but no more than an even share of the masks a step, plus what earlier steps did not use.

    Masks are spread over `steps` as in LLaDA; candidates are the best-ranked ones; at least the best is always committed. After the last
    step whatever is left is allowed, so the answer may take more steps than that.

    Reference: Fast-dLLM, arXiv 2505.22618 (Dream without a cache).
    """

    cite = ("2505.22618",)

    at_least: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")

    def init(self, state: State) -> Saved:
        return Saved(Progress.begin(state), torch.zeros_like(state.begin))

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        candidates = select.top_k(proposal.score, region.eligible, self._allowed(region, state))
        return candidates & (proposal.confidence >= self.at_least)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Saved:
        own: Saved = state.parts.commit
        used = self.select(proposal, region, state).sum(1).clamp(min=1)  # the loop commits the best one in any case
        unused = (self._allowed(region, state) - used).clamp(min=0)
        return Saved(own.progress.at(region).after(), unused)

    def _allowed(self, region: Region, state: State) -> Int[Tensor, "B"]:
        own: Saved = state.parts.commit
        progress = own.progress.at(region)
        late = progress.taken >= progress.steps(self.steps)
        unused = own.unused.masked_fill(region.epoch != own.progress.epoch, 0)
        return progress.quota(self.steps).masked_fill(late, 0) + unused


@dataclass(frozen=True)
class Opened:
    """State of FirstOfBlock: the epoch it has seen, and the state of the rule that follows."""

    epoch: Int[Tensor, "B"]
    then: PyTree


@register("commit", "first_of_block")
@dataclass(frozen=True)
class FirstOfBlock(Commit):
    """In the first step of a block commit its first masked position, however sure, and nothing else; afterwards do what `then` says.

    Fast-dLLM's Dream code does so with a cache, because a shifted model cannot read a block's first position from a forward over the block
    alone. The engine here remembers the hidden row that it needs, so this rule only reproduces that code.

    Reference: Fast-dLLM, arXiv 2505.22618.
    """

    cite = ("2505.22618",)

    then: Commit

    def init(self, state: State) -> Opened:
        return Opened(torch.full_like(state.begin, -1), self.then.init(state))

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own: Opened = state.parts.commit
        first = region.eligible & (region.eligible.cumsum(1) == 1)
        following = self.then.select(proposal, region, state.with_part(commit=own.then))
        return torch.where((region.epoch != own.epoch).unsqueeze(1), first, following)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Opened:
        own: Opened = state.parts.commit
        # A tensor of its own: `then` may remember the epoch too, and a compiled step notices when two fields become one tensor.
        return Opened(region.epoch.clone(), self.then.carry(proposal, region, state.with_part(commit=own.then)))


@register("decoder", "fast_dllm")
def fast_dllm(
    block_length: int | None = 32,
    threshold: float | None = None,
    factor: float | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
    fill_at_eos: bool = False,
    official_tail: bool = False,
    step_cap: int | None = None,
    trailing_forward: bool = False,
    first_of_block: bool = False,
) -> BlockDecoder:
    """Fast-dLLM (arXiv 2505.22618): parallel commits by `threshold` (default 0.9) or by `factor`, block after block.

    steps: with a threshold, spread the masks over this many steps of the answer and save what a step does not use, see `Allowance` (Dream
    without a cache). fill_at_eos: once an end-of-text is committed, what is behind it becomes end-of-text at once (dInfer).

    Five flags reproduce released code. stop_at_eos false: decode every block to its end. official_tail: a slip of its factor rule, see
    `Factor`. step_cap: its v1 dual-cache loop spends at most this many forwards on an answer and leaves masks, see `SemiAutoregressive`.
    trailing_forward: its first release runs a second forward on every block. first_of_block: its Dream code with a cache, see
    `FirstOfBlock`.
    """
    if threshold is not None and factor is not None:
        raise DecodeError(
            f"fast_dllm takes threshold or factor, got threshold={threshold} and factor={factor}. They are two commit rules. "
            "Write one of them, e.g. threshold: 0.9."
        )
    if factor is not None and steps is not None:
        raise DecodeError(
            f"steps goes with a threshold, got steps={steps} and factor={factor}. A factor bounds the tokens of a step by itself. "
            "Remove steps, or write threshold: 0.9 instead of the factor."
        )
    if fill_at_eos and not stop_at_eos:
        raise DecodeError(
            "fill_at_eos needs stop_at_eos, got stop_at_eos=False. What is behind an end-of-text is filled because the text ends there. "
            "Write stop_at_eos: true."
        )
    commit: Commit = Factor(factor, official_tail) if factor is not None else Gate(0.9 if threshold is None else threshold)
    if steps is not None:
        commit = Allowance(0.9 if threshold is None else threshold, steps)
    stop: Stop = AtEos(fill=fill_at_eos) if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length, step_cap=step_cap, least_steps=2 if trailing_forward else 1),
        commit=FirstOfBlock(commit) if first_of_block else commit,
        propose=Sample(temperature=temperature),
        stop=stop,
    )
