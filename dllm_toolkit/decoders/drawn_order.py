"""Decoding in an order that is drawn beforehand, so that a step computes only what it needs: dKV-Cache-Greedy.

    order <- a random order of the masks of a block
    for step i:
        next  <- the masks whose turn it is
        near  <- the masks around them, `window` of each
        last  <- what step i - 1 decided
        logits of next <- model(next, near, last; keys of everything else)
        commit next

Where an order is known, the cost of a step does not depend on the length of the text. The cache need not know the order: the schedule
reads what comes next, and calls next, near and last its open span; the dual cache computes just that, and `refreshed` around it renews all.

Reference: dKV-Cache, arXiv 2505.15781 (the greedy variant).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from dllm_toolkit.decoders.base import DecodeError, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import noise, select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, PyTree, Rows


def masks_near(chosen: Canvas, among: Canvas, window: int) -> Canvas:
    """The members of `among` next to a chosen one: counted in members, half of the window on either side (the odd one on the left)."""
    rows, length = among.shape
    place = among.cumsum(1)  # 1-based place of each member
    by_place = torch.zeros(rows, length + 1, dtype=torch.long, device=among.device)
    by_place = by_place.scatter(1, torch.where(among, place, 0), (chosen & among).long())
    count = by_place.cumsum(1) - by_place[:, :1]  # chosen ones up to each place
    first = (place - window // 2 - 1).clamp(min=0)
    last = (place + (window + 1) // 2).clamp(max=length)
    return among & (count.gather(1, last) > count.gather(1, first))


@register("schedule", "drawn_order")
@dataclass(frozen=True)
class DrawnOrder(Schedule):
    """What `inner` opens, `per_step` positions a step, in a random order that depends on the row's seed and the positions alone.

    The open span is what is read, `window` masks around each of it, and what the last step decided.

    Reference: dKV-Cache, arXiv 2505.15781.
    """

    cite = ("2505.15781",)

    inner: Schedule = field(default_factory=SemiAutoregressive)
    per_step: int = 1
    window: int = 4

    def __post_init__(self) -> None:
        if self.per_step < 1:
            raise DecodeError(f"per_step must be 1 or more, got {self.per_step}. It counts tokens of a step. Write per_step: 1.")
        if self.window < 0:
            raise DecodeError(f"window must be 0 or more, got {self.window}. It counts masks around each read position. Write window: 4.")

    @property
    def noisy(self) -> bool:
        """The order is drawn, whatever the arguments."""
        return True

    def max_reads(self, answer_length: int) -> int:
        return min(self.per_step, self.inner.max_reads(answer_length))

    def init(self, state: State) -> PyTree:
        return self.inner.init(state)

    def region(self, state: State) -> Region:
        region = self.inner.region(state)
        salt = torch.full_like(state.seed, 0x04DE)[:, None]
        drawn = noise.uniform(salt, state.seed[:, None], state.positions).expand(state.masked.shape)
        chosen = select.top_k(drawn, region.eligible, torch.full_like(state.begin, self.per_step))
        last = ~state.masked & ~state.fixed & (state.born >= 0) & (state.born + 1 == state.step.unsqueeze(1))
        span = chosen | masks_near(chosen, region.eligible, self.window) | last
        return replace(region, read=chosen, eligible=chosen, force=region.force & chosen, open=span)

    def advance(self, state: State) -> tuple[PyTree, Rows]:
        return self.inner.advance(state)


@register("decoder", "drawn_order")
def drawn_order(block_length: int | None = 32, per_step: int = 1, window: int = 4, temperature: float = 0.0) -> BlockDecoder:
    """dKV-Cache-Greedy (arXiv 2505.15781): `per_step` tokens a step, in a random order within each block, drawn beforehand.

    window: masks around each next position that are computed with it. Its cache is `refreshed` around `dual`, every 2 forwards as
    published for this window.
    """
    return BlockDecoder(
        schedule=DrawnOrder(SemiAutoregressive(block_length), per_step, window),
        commit=Gate(0.0),
        propose=Sample(temperature=temperature),
    )
