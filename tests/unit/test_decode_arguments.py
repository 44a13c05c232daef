"""decode() refuses what it cannot decode with one message, and keeps to the step limit that it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dllm_toolkit.cache.policies import BlockCausalCache
from dllm_toolkit.decode import decode, trace
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.base import DecodeError
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.ops.lanes import pack
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.types import Result

MODEL = tiny_transformer()
PLAIN = MODEL.spec.vocab_size - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 3.5}, "max_new_tokens must be a whole number or a list of them, got 3.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 1 or more, got -1"),
        ({"max_new_tokens": [3]}, "one answer length a prompt, got 1 for 2"),
        ({"max_new_tokens": 10**12}, "prompt 0 is too long"),
        ({"max_new_tokens": 2, "seed": 1.5}, "seed must be a whole number"),
        ({"max_new_tokens": 2, "seed": [1]}, "one seed a prompt"),
        ({"max_new_tokens": 2, "max_steps": 0}, "max_steps must be 1 or more, got 0"),
        ({"max_new_tokens": 2, "max_steps": 2.5}, "max_steps must be a whole number"),
        ({"templates": [[None, 10**6], [None]]}, "template 0 pins an id outside the vocabulary, got 1000000"),
        ({"templates": [[None], [None, -1]]}, "template 1 pins an id outside the vocabulary, got -1"),
        ({"max_new_tokens": 2, "templates": [[None], [None]]}, "either max_new_tokens or templates"),
    ],
)
def test_what_cannot_be_decoded_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode(MODEL, vanilla(), [[PLAIN], [PLAIN, PLAIN]], **arguments)


def test_a_prompt_that_leaves_no_room_is_not_answered_with_zero_tokens() -> None:
    with pytest.raises(DecodeError, match="Shorten the prompt") as caught:
        decode(MODEL, vanilla(), [[PLAIN] * MODEL.spec.max_positions], max_new_tokens=1)
    assert "max_new_tokens: 0" not in str(caught.value)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_row_takes_more_steps_than_max_steps(limit: int) -> None:
    arguments = {"max_new_tokens": [6, 5], "max_steps": limit}
    output = decode(MODEL, vanilla(), [[PLAIN], [PLAIN, PLAIN]], throw=False, **arguments)
    assert output.stats.steps == output.stats.nfe == [limit, limit]
    assert output.result == [Result.MAX_STEPS, Result.FULL if limit == 5 else Result.MAX_STEPS]
    assert len(list(trace(MODEL, vanilla(), [[PLAIN], [PLAIN, PLAIN]], **arguments))) == limit
    with pytest.raises(DecodeError, match=f"did not finish in {limit} steps"):
        decode(MODEL, vanilla(), [[PLAIN], [PLAIN, PLAIN]], **arguments)
    assert decode(MODEL, vanilla(), [[PLAIN]], max_new_tokens=6, max_steps=6).result == [Result.FULL]


def test_seeds_of_any_size_and_sign() -> None:
    model = tiny_transformer(attention="causal", shift=1)
    sampled = [
        decode(model, autoregressive(temperature=1.0), [[PLAIN]], max_new_tokens=8, seed=seed, cache=BlockCausalCache()).tokens
        for seed in (-5, 2**80 - 5, 2**63 - 1, 3)
    ]
    assert sampled[0] == sampled[1] and sampled[2] != sampled[3]


def test_packed_lanes_of_one_row_have_the_strides_of_their_shape() -> None:
    """Compiled code is specialised on strides: a row of [1, width + 1] cut to width would ask for a graph of its own."""
    wanted = torch.tensor([[True, False, True, True]])
    assert pack(wanted, 3).stride() == pack(wanted.expand(2, -1), 3).stride() == (3, 1)
