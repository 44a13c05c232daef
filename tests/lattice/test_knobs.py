"""No dead arguments: for every argument of everything in the catalogue there is a value that changes a decode on some toy."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache as remember
from typing import Any, Literal

import pytest
import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import DualCache, NoCache
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.models.base import Model
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.models import VOCABULARY, Scripted, tiny_transformer
from dllm_toolkit.testing.record import record, unequal
from dllm_toolkit.types import Attention

FIRST = {}
for _case in cases.ALL:
    FIRST.setdefault((_case.kind, _case.maker), _case)
STANDARD = contract.standard_decoders()
KNOBS = [pytest.param(case, argument, id=f"{case}-{argument}") for case in FIRST.values() for argument in case.knobs]


# Decodes of the side that does not change, which the knobs of one maker share.
DECODED: dict[Any, Any] = {}


@remember
def more(attention: Attention, shift: Literal[0, 1], seed: int) -> Transformer:
    return tiny_transformer(2, attention, shift, seed)


@remember
def certain() -> Scripted:
    """Every position is sure of one token: probability exactly 1."""
    logits = torch.full((64, VOCABULARY), float("-inf"), dtype=torch.float64)
    logits[torch.arange(64), torch.arange(64) % 20] = 0.0
    return Scripted([logits])


def models(decoder: Decoder) -> Iterator[Model]:
    """The toys that a decoder accepts, then more of each kind, then one that is certain."""
    kinds = [toy for toy in contract.toys() if contract.fits(decoder, NoCache(), toy) is None]
    yield from (toy.model for toy in kinds)
    for seed in range(10, 14):
        yield from (more(toy.model.spec.attention, toy.model.spec.shift, seed) for toy in kinds)
    yield certain()


def unchanged(case: cases.Case, knob: cases.Knob, model: Model, decoder: Decoder, cache: Cache) -> Any:
    """The decode with a maker's own arguments and what the knob takes for granted, once for all knobs that take the same for granted."""
    # Objects by identity (they live as long as the catalogue): two filters of other weights look the same.
    plain = (bool, int, float, str, tuple, type(None))
    given = tuple((name, value if isinstance(value, plain) else id(value)) for name, value in sorted(knob.given.items()))
    inside = id(decoder) if case.kind == "cache" else repr(cache)
    key = (case.kind, case.name, repr(given), knob.place, id(model), inside)
    if key not in DECODED:
        DECODED[key] = record(model, decoder, cache, unequal()).fingerprint()
    return DECODED[key]


def decoder_of(case: cases.Case, knob: cases.Knob, **changes: Any) -> Decoder:
    made = case.build(**{**knob.given, **changes})
    if knob.place is not None:
        return knob.place(made)
    return made if isinstance(made, Decoder) else contract.standard_decoders(made)[0]


@pytest.mark.parametrize("case", list(FIRST.values()), ids=str)
def test_every_argument_has_a_knob(case: cases.Case) -> None:
    arguments = set(inspect.signature(case.maker).parameters) if _takes_arguments(case) else set()
    assert set(case.knobs) == arguments


def _takes_arguments(case: cases.Case) -> bool:
    # A frozen dataclass without fields still has the (self, /, *args, **kwargs) signature of object in some versions.
    return not (inspect.isclass(case.maker) and not getattr(case.maker, "__dataclass_fields__", {}))


@pytest.mark.parametrize(("case", "argument"), KNOBS)
def test_the_knob_turns_something(case: cases.Case, argument: str) -> None:
    knob = case.knobs[argument]
    if case.kind == "cache":
        return turns_a_cache(case, knob, argument)
    one, other = decoder_of(case, knob), decoder_of(case, knob, **{argument: knob.value})
    for cache in (NoCache(), DualCache()):  # what a schedule says of its open span shows in the lanes of a cache
        for model in models(one):
            if unchanged(case, knob, model, one, cache) != record(model, other, cache, unequal()).fingerprint():
                return
    pytest.fail(f"{argument}={knob.value!r} changes nothing on any toy: the argument is dead, or the value badly chosen")


def turns_a_cache(case: cases.Case, knob: cases.Knob, argument: str) -> None:
    """The same for a cache, where lanes may be all that changes."""
    one: Cache = case.build(**knob.given)
    other: Cache = case.build(**{**knob.given, argument: knob.value})
    for decoder in STANDARD:
        for toy in contract.toys():
            if contract.fits(decoder, one, toy) is not None:
                continue
            if unchanged(case, knob, toy.model, decoder, one) != record(toy.model, decoder, other, unequal()).fingerprint():
                return
    pytest.fail(f"{argument}={knob.value!r} changes nothing under any decoder: the argument is dead, or the value badly chosen")
