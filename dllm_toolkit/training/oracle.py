"""Extremely greedy parallel: an oracle that knows what the model will end up saying and commits whatever is right already.

    reference <- decode slowly: one token a step, greedy, to the end of the budget
    decode the same prompt again, block after block:
        commit exactly the masks whose proposed token is that of the reference
        write down (confidences of the open block, is each proposed token that of the reference?)
        nothing right: the surest mask takes the token of the reference           the promise of progress

The number of its steps is what parallel decoding could reach at best without changing the text; what it writes down is what a filter
learns from (`training/filter.py`). The paper fills the whole block where nothing is right.

Reference: Learn2PD, arXiv 2509.25188.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.learn2pd import block_windows, confidences
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.engine import Engine
from dllm_toolkit.models.base import Model
from dllm_toolkit.ops.select import ensure_progress
from dllm_toolkit.state import State, begin_state
from dllm_toolkit.types import Tokens


class Examples(NamedTuple):
    """One row a step of an oracle's decode: confidences of the open block, which proposals are final, which positions were masked."""

    confidence: Float[Tensor, "N n"]
    right: Bool[Tensor, "N n"]
    masked: Bool[Tensor, "N n"]


def oracle_examples(model: Model, prompts: Sequence[Sequence[int]], answer_length: int, block_length: int, cache: Cache) -> Examples:
    """Decode a batch of prompts slowly, then with the oracle, and return what a filter can learn from it."""
    # To the end of the budget: what `AtEos` fills in behind an end-of-text token is nothing that the model has said.
    output = decode(model, vanilla(block_length=block_length), prompts, max_new_tokens=answer_length, cache=cache)
    with torch.inference_mode():
        _, found = oracle_steps(model, prompts, output.canvas, answer_length, block_length, cache)
        return joined(found)


def joined(parts: Sequence[Examples]) -> Examples:
    """The rows of several sets of examples, in order."""
    return Examples(*(torch.cat(pieces).contiguous() for pieces in zip(*parts, strict=True)))


def oracle_steps(
    model: Model, prompts: Sequence[Sequence[int]], reference: Tokens, answer_length: int, block_length: int, cache: Cache
) -> tuple[State, list[Examples]]:
    """The oracle's decode towards `reference` (canvases of a slow decode), up to each end-of-text: last state, examples of each step."""
    schedule, stop, propose = SemiAutoregressive(block_length), AtEos(), Sample()
    rows: list[tuple[list[int], list[int | None]]] = [(list(prompt), [None] * answer_length) for prompt in prompts]
    state = begin_state(model.spec, rows, [0] * len(rows), length=reference.shape[1], device=reference.device)
    state = state.with_part(schedule=schedule.init(state), stop=stop.init(state))
    engine = Engine(model, cache, state)
    found: list[Examples] = []
    while not bool(state.done.all()):
        region = schedule.region(state)
        proposal = propose(engine.ask(state, region), state)
        right = proposal.tokens == reference
        alive = ~state.done
        block = torch.where(region.eligible, region.block, region.block.amax() + 1).amin(1)[alive]  # the open block of each row

        def window(values: Tensor, fill: float, alive: Tensor = alive, block: Tensor = block, index: Tokens = region.block) -> Tensor:
            windows, _ = block_windows(values.double(), index, block_length, fill)
            return windows[alive][torch.arange(len(block), device=block.device), block]

        found.append(
            Examples(
                window(confidences(proposal), 1.0).float(),
                window(right | ~proposal.read, 1.0) > 0,
                window(state.masked & region.eligible, 0.0) > 0,
            )
        )
        chosen = ensure_progress(region.eligible & right, proposal.score, region.eligible, region.group, region.force)
        state = state.write(chosen & alive.unsqueeze(1), reference)
        state = state.finish(stop.check(proposal, region, state), proposal)
        state = state.advance(*schedule.advance(state))
    return state, found
