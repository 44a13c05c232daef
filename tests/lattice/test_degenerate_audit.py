"""Identities of the spec's list E1 .. E27 that the other files of this folder do not hold in the form of presets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dllm_toolkit.cache.policies import DualCache, NoCache
from dllm_toolkit.decoders.ascending_steps import ascending_steps
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.confidence_adaptive import Adaptive, confidence_adaptive
from dllm_toolkit.decoders.dparallel import dparallel
from dllm_toolkit.decoders.dream import dream
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.record import Batch, difference, record, unequal

Build = Callable[[], Decoder]
PAIRS: tuple[tuple[str, Build, Build], ...] = (
    ("E1 a threshold above one, as presets", lambda: fast_dllm(4, threshold=1.1), lambda: semi_ar(4)),
    ("E2 blocks as long as the answer", lambda: vanilla(block_length=11), vanilla),
    ("E3 a factor of 0, as presets", lambda: fast_dllm(4, factor=0.0), lambda: semi_ar(4)),
    (
        "E5 a bound that no entropy passes",
        lambda: dparallel(4, 0.0, strict=True),
        lambda: BlockDecoder(SemiAutoregressive(4), Quota(), propose=Sample(score="negative_entropy")),
    ),
    (
        "E11 one token a step, without the gate, as presets",
        lambda: confidence_adaptive(4, minimum=1, maximum=1, eos_share=0.0),
        lambda: semi_ar(4),
    ),
    ("E21 a cold order is Dream's own", lambda: dream(6, order_temperature=1e-9), lambda: dream(6)),
    (
        "E27 no share of the answer, no gate",
        lambda: BlockDecoder(SemiAutoregressive(4), Adaptive(0.6, 1, 3, 0.0)),
        lambda: BlockDecoder(SemiAutoregressive(4), Adaptive(0.6, 1, 3, 0.5, late=())),
    ),
    (
        "E27 no share of the answer, as a threshold",
        lambda: confidence_adaptive(4, 0.6, eos_share=0.0),
        lambda: BlockDecoder(SemiAutoregressive(4), Gate(0.6)),
    ),
)


@pytest.mark.parametrize(("one", "other"), [pytest.param(one, other, id=name) for name, one, other in PAIRS])
def test_pair(one: Build, other: Build) -> None:
    for toy in contract.toys()[:2]:
        for cache in (NoCache(), DualCache()):
            mine, theirs = (record(toy.model, build(), cache, unequal()) for build in (one, other))
            for row in range(4):
                assert difference(mine, row, theirs, row) is None, (toy.name, cache)
            assert mine.fingerprint() == theirs.fingerprint(), (toy.name, cache)


def test_an_answer_of_one_token_takes_one_ascending_step() -> None:
    """E27."""
    batch = Batch(((3, 1), (4,)), ((None,), (None,)), (0, 1))
    for toy in contract.toys()[:2]:
        assert record(toy.model, ascending_steps(), NoCache(), batch).last.step.tolist() == [1, 1]
