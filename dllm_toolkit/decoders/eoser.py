"""EOSER, early rejection of end-of-text: at first, an end-of-text token counts less than it claims.

    gamma_t <- low + (high - low) * time_t
    score_i <- gamma_t * score_i      where position i says end-of-text
    commit as some other rule does, by these scores: LLaDA's quota, or steps of doubling size (ASS)

    time: linear     t / (steps - 1)               t: step in the open span
          doubling   (2^(t+1) - 1) / 2^N           the share that ASS has decided after step t; N = floor(log2 masks)

Why: decoded all at once, an instruct model is surest of the end-of-text tokens that pad a short answer, commits them first, and has no room
left to think.

Reference: Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer Decoding Step,
arXiv 2509.23924.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.decoders.ascending_steps import Ascending, doublings
from dllm_toolkit.decoders.base import Commit, DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Progress, Quota
from dllm_toolkit.decoders.rules.propose import Sample, Special
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops.select import ensure_progress
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, PyTree


@dataclass(frozen=True)
class Rejection:
    """State of RejectEarly: where the row stands in the open span, and the state of the rule that chooses."""

    progress: Progress
    rule: PyTree


@register("commit", "reject_early")
@dataclass(frozen=True)
class RejectEarly(Commit):
    """Let `rule` choose by evidence in which end-of-text counts only `low` at first and `high` at the end.

    late: what is held back, "eos" or ids. steps: of the whole answer, for the linear pace; None: one a token. The factor is for scores that
    are not negative: probabilities or margins. Confidence and score are both multiplied, so thresholds are harder to pass too.

    Reference: EOSER, arXiv 2509.23924.
    """

    cite = ("2509.23924",)

    rule: Commit = field(default_factory=Quota)
    low: float = 0.4
    high: float = 1.0
    pace: Literal["linear", "doubling"] = "linear"
    steps: int | None = None
    late: tuple[Special, ...] = ("eos",)

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise DecodeError(
                f"low and high must satisfy 0 <= low <= high, got {self.low} and {self.high}. Evidence for end-of-text is multiplied by "
                "low at first and by high at the end. Write low: 0.4 and high: 1.0."
            )
        if self.steps is not None and self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")

    def init(self, state: State) -> Rejection:
        return Rejection(Progress.begin(state), self.rule.init(state))

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own: Rejection = state.parts.commit
        weighed = self._weighed(proposal, region, state)
        chosen = self.rule.select(weighed, region, state.with_part(commit=own.rule))
        # Here and not in the loop, which ranks by the scores as they were and would commit the very token that is held back.
        return ensure_progress(chosen, weighed.score, region.eligible, region.group, region.force)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Rejection:
        own: Rejection = state.parts.commit
        progress = own.progress.at(region).after()
        # A tensor of its own: the inner rule may remember the epoch too, and a compiled step notices when two fields are one tensor.
        progress = replace(progress, epoch=progress.epoch.clone())
        rule = self.rule.carry(self._weighed(proposal, region, state), region, state.with_part(commit=own.rule))
        return Rejection(progress, rule)

    def _weighed(self, proposal: Proposal, region: Region, state: State) -> Proposal:
        ids = tuple(one for item in self.late for one in (state.spec.eos_ids if item == "eos" else (int(item),)))
        ending = torch.zeros_like(state.masked)
        for one in ids:
            ending = ending | (proposal.tokens == one)
        gamma = (self.low + (self.high - self.low) * self._time(region, state)).unsqueeze(1)

        def weigh(evidence: Tensor) -> Tensor:
            # Not gamma * -inf where nothing was read: 0 * inf is no number.
            return torch.where(ending & evidence.isfinite(), evidence * gamma, evidence).to(evidence.dtype)

        return replace(proposal, confidence=weigh(proposal.confidence), score=weigh(proposal.score))

    def _time(self, region: Region, state: State) -> Float[Tensor, "B"]:
        own: Rejection = state.parts.commit
        progress = own.progress.at(region)
        if self.pace == "linear":
            last = progress.answer - 1 if self.steps is None else torch.full_like(progress.answer, self.steps - 1)
            return (progress.taken.double() / last.clamp(min=1)).clamp(max=1)
        one = torch.ones_like(progress.taken)
        decided = (one << (progress.taken + 1).clamp(max=30)) - 1
        return (decided.double() / (one << doublings(progress.masks))).clamp(max=1)


@register("decoder", "eoser")
def eoser(
    steps: int | None = None,
    block_length: int | None = None,
    low: float | None = None,
    high: float = 1.0,
    ascending: bool = False,
    stages: int = 1,
    late: tuple[Special, ...] = ("eos",),
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """EOSER (arXiv 2509.23924): LLaDA's quota with end-of-text held back early; `ascending` for EOSER + ASS, without `steps`.

    low: default 0.4, with `ascending` 0.01. stages: see `Ascending`. block_length None: the whole answer at once, as in the paper.
    stop_at_eos false: as released.
    """
    if ascending and steps is not None:
        raise DecodeError(
            f"steps does not go with ascending, got steps={steps}. Ascending steps double, so an answer of n tokens takes floor(log2 n). "
            "Remove steps."
        )
    if not ascending and stages != 1:
        raise DecodeError(f"stages goes with ascending, got stages={stages}. It divides steps of doubling size. Write ascending: true.")
    floor = low if low is not None else (0.01 if ascending else 0.4)
    rule: Commit = Ascending(stages) if ascending else Quota(steps)
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=RejectEarly(rule, floor, high, "doubling" if ascending else "linear", steps, late),
        propose=Sample(temperature=temperature),
        stop=stop,
    )
