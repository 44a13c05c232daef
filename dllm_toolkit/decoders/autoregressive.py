"""Autoregressive decoding in the same engine and the same ledger: the baseline that every claim is measured against.

    read the first undecided position from the row of its predecessor, commit, repeat

Only decided positions are visible, so a step computes one lane: the token committed last. With `cache: block_causal` the K/V of
everything before is kept, which is exact for a causal model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_toolkit.decoders.base import Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.registry import register
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Need, Rows


@register("schedule", "next_token")
@dataclass(frozen=True)
class NextToken(Schedule):
    """One position at a time, left to right; the model sees what is decided and nothing else."""

    needs = frozenset({Need.CAUSAL})

    def max_reads(self, answer_length: int) -> int:
        return 1

    def region(self, state: State) -> Region:
        place = torch.where(state.masked, state.positions, state.masked.shape[1]).amin(1)
        here = (state.positions == place.unsqueeze(1)) & state.masked
        past = state.positions < place.unsqueeze(1)
        everywhere = state.positions.expand_as(state.tokens)
        return Region(
            read=here,
            eligible=here,
            group=torch.zeros_like(state.tokens),
            force=here,
            visible=past,
            closed=past,
            block=everywhere,
            epoch=place,
        )

    def advance(self, state: State) -> tuple[tuple[()], Rows]:
        return (), ~state.masked.any(1)


@register("decoder", "autoregressive")
def autoregressive(temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0) -> BlockDecoder:
    """Greedy (temperature 0) or sampled left-to-right decoding of a causal model, one token a forward."""
    return BlockDecoder(
        schedule=NextToken(),
        commit=Gate(0.0),
        propose=Sample(temperature=temperature, top_p=top_p, top_k=top_k),
    )
