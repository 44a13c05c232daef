"""Prophet: the model often knows the answer long before it has written everything; commit the rest then.

    decode as LLaDA does, a quota of the surest tokens a step; in every step:
        g <- mean over the answer region of (best logit - second best)
        bound <- early, middle or late, by the share of the answer that is decided: below .33, below .67, after
        g >= bound: all masks take their proposed tokens, and the row is finished

The answer region is where the result stands, and task knowledge. The paper writes a suffix such as "The answer is" into the canvas and
looks at the positions behind it; here that is a template with pinned tokens and `region: after_pinned`.

Reference: Diffusion Language Models Know the Answer Before Decoding, arXiv 2508.19982.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.early import Margins, commit_rest
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AnyOf, AtEos
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State, Verdict
from dllm_toolkit.types import Canvas

Where = Literal["answer", "last", "after_pinned"]


def answer_region(state: State, where: Where, positions: int | None) -> Canvas:
    """The positions that hold the result: the whole answer, its last `positions`, or those behind a row's last pinned token."""
    if where == "answer":
        return state.inside
    pinned = state.inside & state.fixed
    last = torch.where(pinned, state.positions, -1).amax(1, keepdim=True)
    if where == "after_pinned":
        # Without a pinned token nothing follows one, and the row is judged by its whole answer.
        reach = state.tokens.shape[1] if positions is None else positions
        return state.inside & (last >= 0) & (state.positions > last) & (state.positions <= last + reach)
    return state.inside & (state.positions >= state.end.unsqueeze(1) - (positions or 0))


@register("stop", "phased_margin")
@dataclass(frozen=True)
class PhasedMargin(Stop):
    """Commit the rest once the answer region's mean logit gap reaches the bound of the present phase.

    region: where the result stands. answer: everywhere. last: the last `positions` of the answer. after_pinned: the first `positions`
    (None: all) behind the row's last pinned token. A row whose region holds nothing to decode is judged by its whole answer. end_at_eos:
    an early commit ends the text at its first end-of-text token; otherwise the budget stays whole, as published.

    Reference: Prophet, arXiv 2508.19982; its released code looks at 5 positions.
    """

    cite = ("2508.19982",)
    wants_answer = True

    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5
    region: Where = "after_pinned"
    positions: int | None = 5
    end_at_eos: bool = False

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions < 1:
            raise DecodeError(f"positions must be 1 or more, got {self.positions}. It counts places of the region. Write positions: 5.")
        if self.region == "last" and self.positions is None:
            raise DecodeError("positions must say how many with region last, got None. All would be region answer. Write positions: 5.")

    def init(self, state: State) -> Margins:
        return Margins.begin(state, answer_region(state, self.region, self.positions))

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        before: Margins = state.parts.stop
        own = before.after(proposal, state)
        share = own.progress(state)
        late = torch.full_like(share, self.late)
        bound = late.masked_fill(share < 0.67, self.middle).masked_fill(share < 0.33, self.early)
        return commit_rest(own, bound, self.end_at_eos, proposal, state)


@register("decoder", "prophet")
def prophet(
    steps: int | None = None,
    block_length: int | None = None,
    early: float = 7.5,
    middle: float = 5.0,
    late: float = 2.5,
    region: Where = "after_pinned",
    positions: int | None = 5,
    temperature: float = 0.0,
    stop_at_eos: bool = False,
) -> BlockDecoder:
    """Prophet (arXiv 2508.19982): LLaDA's quota, until the answer region is sure enough to commit the rest.

    steps: forwards of the whole answer (None: one token a step); block_length None: the whole answer at once. region, positions: see
    `PhasedMargin`; without pinned tokens it is the whole answer. stop_at_eos true: also stop at end-of-text, which the paper does not.
    """
    stop: Stop = PhasedMargin(early, middle, late, region, positions, end_at_eos=stop_at_eos)
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Quota(steps),
        propose=Sample(temperature=temperature),
        stop=AnyOf((AtEos(), stop)) if stop_at_eos else stop,
    )
