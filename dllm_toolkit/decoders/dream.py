"""Dream's own samplers: a reverse process over the whole answer, discretised in time, ordered by a certainty score.

    t_0 = 1 > t_1 > ... > t_S = eps                         evenly spaced
    for step i:
        logits <- model(canvas);  tokens, score <- propose  temperature, then top-p, then top-k, then the score
        p <- 1 - t_(i+1) / t_i                              1 at the last step
        commit the floor(p m) best-ranked of the m masks    maskgit_plus, topk_margin, entropy
        or each mask by itself with probability p           origin

Everything is counted for each row alone; the released code averages the masks of a batch. By default a step commits at least one token,
because a forward that decides nothing is wasted; `idle_steps` spends all S forwards, as the released code does.

Reference: Ye et al., Dream 7B: Diffusion Large Language Models, arXiv 2508.15487.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dllm_toolkit.decoders.base import Commit, DecodeError
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Progress
from dllm_toolkit.decoders.rules.propose import Sample, Score
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas

Algorithm = Literal["maskgit_plus", "topk_margin", "entropy", "origin"]
SCORES: dict[Algorithm, Score] = {
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "negative_entropy",
    "origin": "random",
}


@register("commit", "timetable")
@dataclass(frozen=True)
class Timetable(Commit):
    """Commit the share of the remaining masks that a time step from t to s stands for: 1 - s / t, everything at the last step.

    steps: of the whole answer, shared out over blocks by their size; None is one a token. eps: the last time. draw false takes the
    best-ranked positions, their number rounded down (float32, as published); draw true takes each position whose score, uniform in
    (0, 1), is above s / t.

    Reference: Dream, arXiv 2508.15487.
    """

    cite = ("2508.15487",)

    steps: int | None = None
    eps: float = 1e-3
    draw: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")
        if not 0 <= self.eps < 1:
            raise DecodeError(f"eps must be in [0, 1), got {self.eps}. It is the time at which the process ends. Write eps: 0.001.")

    def init(self, state: State) -> Progress:
        return Progress.begin(state)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        before: Progress = state.parts.commit
        own = before.at(region)
        steps = own.steps(self.steps)
        width = (1 - self.eps) / steps.float()
        now = 1 - width * own.taken
        kept = ((now - width) / now).masked_fill(own.taken >= steps - 1, 0.0)  # s / t
        if self.draw:
            return region.eligible & (proposal.score > kept.unsqueeze(1))
        count = region.eligible.sum(1).float() * (1 - kept)
        return select.top_k(proposal.score, region.eligible, count.long())

    def carry(self, proposal: Proposal, region: Region, state: State) -> Progress:
        before: Progress = state.parts.commit
        return before.at(region).after()


@register("decoder", "dream")
def dream(
    steps: int | None = None,
    algorithm: Algorithm = "entropy",
    eps: float = 1e-3,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    order_temperature: float = 0.0,
    block_length: int | None = None,
    idle_steps: bool = False,
) -> BlockDecoder:
    """Dream sampling (arXiv 2508.15487): `steps` forwards for the answer (None: as many as tokens), no early stop.

    algorithm: what ranks positions, or `origin` for independent draws. order_temperature: Dream's alg_temp, 0 is the plain order.
    block_length: None is the whole answer at once, as published. idle_steps: run every step, also one that commits nothing.
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length, hold=_all(steps) if idle_steps else None),
        commit=Timetable(steps, eps, draw=algorithm == "origin"),
        propose=Sample(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            score=SCORES[algorithm],
            evidence="filtered",
            order_temperature=order_temperature,
        ),
        stop=WhenFull(),
    )


def _all(steps: int | None) -> int:
    if steps is None:
        raise DecodeError("idle_steps needs a number of steps, got steps=None. Without one there is nothing to hold. Write steps: 64.")
    return steps
