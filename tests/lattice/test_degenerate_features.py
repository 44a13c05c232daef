"""The decoders made for wrapped models, at the limits of their parameters. Those of the wrappers are in tests/contract/test_wrappers.py."""

from __future__ import annotations

from math import inf

import pytest
import torch

from dllm_toolkit.cache.policies import DualCache, NoCache, PrefixCache
from dllm_toolkit.decoders.annealed_threshold import Annealed, annealed_threshold
from dllm_toolkit.decoders.base import DecodeError, Decoder
from dllm_toolkit.decoders.certainty_prior import CertaintyPrior, certainty_prior
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.ops import select
from dllm_toolkit.ops.density import certainty_density
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.record import difference, infill, record, unequal

PAIRS: dict[str, tuple[Decoder, Decoder]] = {
    "E10 a threshold that starts where it ends": (annealed_threshold(4, 0.6, 0.02, start=0.6), fast_dllm(4, threshold=0.6)),
    "a threshold that does not fall": (annealed_threshold(4, 0.1, 0.0, start=0.6), fast_dllm(4, threshold=0.6)),
    "E1 nothing passes a bound above 1": (annealed_threshold(4, 2.0, 0.0), semi_ar(4)),
    "E2 no surroundings are left to right": (certainty_prior(sigma=0.01), semi_ar(1)),
    "no threshold is reached": (certainty_prior(4, threshold=inf), certainty_prior(4)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("toy", ["full", "full_shifted"])
def test_two_decoders_are_one(name: str, toy: str) -> None:
    one, other = PAIRS[name]
    (model,) = (each.model for each in contract.toys() if each.name == toy)
    whole = name.startswith("E2")  # a whole answer reads more than a block of one, and refreshes a cache less often
    for cache in [NoCache()] if whole else [PrefixCache(), DualCache()]:
        for batch in (unequal(), infill()):
            mine, theirs = record(model, one, cache, batch), record(model, other, cache, batch)
            if whole:
                assert torch.equal(mine.last.tokens, theirs.last.tokens) and torch.equal(mine.last.born, theirs.last.born)
                assert [len(mine.asks_of(row)) for row in range(4)] == [len(theirs.asks_of(row)) for row in range(4)]
            else:
                assert mine.fingerprint() == theirs.fingerprint()
                assert [difference(mine, row, theirs, row) for row in range(4)] == [None] * 4


def test_density_is_the_share_of_known_surroundings() -> None:
    known = torch.tensor([[True, True, False, False, True, False, False, False, False, False]])
    weights = [[2.718281828459045 ** (-((i - j) ** 2) / 8) for j in range(-30, 40)] for i in range(10)]
    there = [True] * 30 + known[0].tolist() + [False] * 30
    wanted = [sum(w for w, yes in zip(row, there, strict=True) if yes) / sum(weights[0]) for row in weights]
    torch.testing.assert_close(certainty_density(known, 2.0)[0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-5)
    longer = certainty_density(torch.nn.functional.pad(known, (0, 50)), 2.0)  # rows do not depend on how long others are
    assert torch.equal(longer[:, :10], certainty_density(known, 2.0))


def test_nucleus_is_the_fewest_that_hold_the_share() -> None:
    score = torch.tensor([[0.4, 0.1, 0.3, 0.2, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    among = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    for share, wanted in ((0.0, []), (0.1, [0]), (0.4, [0]), (0.5, [0, 2]), (0.75, [0, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert select.nucleus(score, among, share)[0].nonzero().flatten().tolist() == wanted, share
    assert not select.nucleus(score, among, 0.5)[1].any()


def test_wrong_arguments() -> None:
    for message, make in (
        ("sigma must be above 0 and at most 1000, got 0", lambda: CertaintyPrior(sigma=0)),
        ("decay must be 0 or more, got -0.1", lambda: Annealed(decay=-0.1)),
        ("takes steps or threshold, got steps=4 and threshold=0.9", lambda: certainty_prior(steps=4, threshold=0.9)),
    ):
        with pytest.raises(DecodeError, match=message):
            make()
