"""Which masked positions become tokens: a quota, or a gate on their evidence.

Progress is not a rule's business: if a rule chooses nothing in a group that must move, the loop commits that group's best position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas


@dataclass(frozen=True)
class Progress:
    """Where a row stands in the present block: masks at its opening, steps taken in it, the epoch that this belongs to."""

    masks: Int[Tensor, "B"]
    taken: Int[Tensor, "B"]
    epoch: Int[Tensor, "B"]
    answer: Int[Tensor, "B"]  # masked positions of the whole answer at the start

    @classmethod
    def begin(cls, state: State) -> Progress:
        answer = state.masked.sum(1)
        return cls(answer.clone(), torch.zeros_like(answer), torch.full_like(answer, -1), answer)

    def at(self, region: Region) -> Progress:
        """The same, before the step that `region` describes: counts start anew when its epoch has moved on."""
        fresh = region.epoch != self.epoch
        masks = torch.where(fresh, region.eligible.sum(1), self.masks)
        return Progress(masks, self.taken.masked_fill(fresh, 0), region.epoch, self.answer)

    def after(self) -> Progress:
        return Progress(self.masks, self.taken + 1, self.epoch, self.answer)

    def steps(self, total: int | None) -> Int[Tensor, "B"]:
        """The block's share of `total` steps for the whole answer; None gives it one step a mask."""
        if total is None:
            return self.masks.clamp(min=1)
        return (total * self.masks).div(self.answer.clamp(min=1), rounding_mode="floor").clamp(min=1)

    def quota(self, total: int | None) -> Int[Tensor, "B"]:
        """How many of the block's masks fall to this step when they are spread evenly over its steps."""
        steps = self.steps(total)
        return self.masks.div(steps, rounding_mode="floor") + (self.taken < self.masks % steps).long()


@register("commit", "quota")
@dataclass(frozen=True)
class Quota(Commit):
    """Commit a fixed number of the best-ranked positions a step: LLaDA's linear schedule.

    With m masks when the block opens and n steps for it, step t commits floor(m / n) + [t < m mod n].
    `steps` is for the whole answer and shared out over blocks by their size; None means one token a step.

    Reference: LLaDA, arXiv 2502.09992.
    """

    cite = ("2502.09992",)

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")

    def init(self, state: State) -> Progress:
        return Progress.begin(state)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own: Progress = state.parts.commit
        if self.steps is None:
            return select.best(proposal.score, region.eligible)
        return select.top_k(proposal.score, region.eligible, own.at(region).quota(self.steps))

    def carry(self, proposal: Proposal, region: Region, state: State) -> Progress:
        own: Progress = state.parts.commit
        return own.at(region).after()


@register("commit", "gate")
@dataclass(frozen=True)
class Gate(Commit):
    """Commit every position whose evidence passes a bound, never fewer than `minimum` nor more than `maximum`.

    chosen = {i : e_i >= at_least}, then clamped to [minimum, maximum] best-ranked positions of the row. `strict` compares with >
    (D2F, LLaDA2.x). `on` says what is compared: the token's probability, or the score that positions are ranked by.

    Reference: Fast-dLLM, arXiv 2505.22618 (threshold).
    """

    cite = ("2505.22618",)

    at_least: float
    strict: bool = False
    on: Literal["confidence", "score"] = "confidence"
    minimum: int = 0
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.minimum < 0 or (self.maximum is not None and self.maximum < max(self.minimum, 1)):
            raise DecodeError(
                f"minimum and maximum must satisfy 0 <= minimum <= maximum, got {self.minimum} and {self.maximum}. They bound the "
                "tokens of one step. Write minimum: 1 and maximum: 4."
            )

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        evidence = proposal.confidence if self.on == "confidence" else proposal.score
        passed = (evidence > self.at_least) if self.strict else (evidence >= self.at_least)
        passed = passed & region.eligible
        if self.minimum == 0 and self.maximum is None:
            return passed
        count = passed.sum(1).clamp(min=self.minimum, max=self.maximum)
        return select.top_k(proposal.score, region.eligible, count)


@register("commit", "threshold")
def threshold(at_least: float = 0.9, strict: bool = False) -> Gate:
    """Commit every position with probability >= `at_least` (Fast-dLLM, arXiv 2505.22618); `strict` for > (D2F)."""
    return Gate(at_least=at_least, strict=strict)


@register("commit", "factor")
@dataclass(frozen=True)
class Factor(Commit):
    """Commit the longest prefix of the ranking that its own confidences license.

    With confidences c_1 >= c_2 >= ..., take the largest n such that (j + 1)(1 - c_j) <= f for every 2 <= j <= n; the first is always taken.
    `official_tail` repeats a slip of the released code: when only the last candidate fails, it is committed too
    (NVlabs/Fast-dLLM v1/llada/generate.py, get_transfer_index_dynamic).

    Reference: Fast-dLLM, arXiv 2505.22618, theorem 1.
    """

    cite = ("2505.22618",)

    factor: float = 1.0
    official_tail: bool = False

    def __post_init__(self) -> None:
        if self.factor < 0:
            raise DecodeError(f"factor must be 0 or more, got {self.factor}. It bounds (n + 1)(1 - c). Write factor: 1.0.")

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        place = select.rank(proposal.score, region.eligible)  # 0-based; L for the others
        count = region.eligible.sum(1, keepdim=True)
        licensed = proposal.confidence >= 1 - self.factor / (place + 2)
        failed = region.eligible & ~licensed & (place > 0)
        first_failure = torch.where(failed, place, count).amin(1, keepdim=True)
        if self.official_tail:
            first_failure = torch.where(first_failure == count - 1, count, first_failure)
        return region.eligible & (place < first_failure)
