"""Guidance is a model like any other: every decoder and cache keep the contract on it, and its logits are the formula's."""

from __future__ import annotations

import pytest
import torch

from dllm_toolkit import recipe
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.dream import dream
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.transformer import ModelError
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.contract_cache import CACHE_CHECKS
from dllm_toolkit.testing.contract_decoder import DECODER_CHECKS, Bench
from dllm_toolkit.testing.models import MASK, Counting
from dllm_toolkit.testing.record import gaps, record, unequal

DECODERS: dict[str, Decoder] = {
    "vanilla": vanilla(block_length=4),
    "fast_dllm": fast_dllm(4, threshold=0.6),
    "dream": dream(steps=5),
    "d2f": d2f(**cases.D2F),
}
TOYS = {toy.name: toy for toy in contract.toys()}
PLACES = [
    ("vanilla", "none", "full"),
    ("fast_dllm", "prefix", "full"),
    ("fast_dllm", "dual", "full"),
    ("dream", "dual", "full_shifted"),
    ("d2f", "block_causal", "block_causal"),
    ("d2f", "block_causal", "block_causal_shifted"),
]


def cache(name: str) -> cases.Case:
    return next(case for case in cases.CACHES if case.name == name)


@pytest.mark.parametrize(("decoder", "chosen", "toy"), PLACES)
def test_contract(decoder: str, chosen: str, toy: str) -> None:
    plain = contract.bench(DECODERS[decoder], cache(chosen).build(), TOYS[toy])
    shallow = None if plain.shallow is None else Guided(plain.shallow, 0.7)
    place = Bench(plain.decoder, plain.cache, Guided(plain.model, 0.7), shallow)
    failed = [str(result) for result in contract.run_checks(place, (*DECODER_CHECKS, *CACHE_CHECKS)) if not result.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("decoder", "chosen", "toy"), PLACES)
def test_scale_0_is_the_model_itself(decoder: str, chosen: str, toy: str) -> None:
    model = TOYS[toy].model
    one = record(Guided(model, 0.0), DECODERS[decoder], cache(chosen).build(), unequal())
    other = record(model, DECODERS[decoder], cache(chosen).build(), unequal())
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("toy", ["full", "full_shifted", "block_causal"])
def test_logits_are_those_of_the_formula(toy: str) -> None:
    """Each forward of an uncached decode against two dense ones: the canvas, and the canvas with its prompt masked."""
    model, scale = TOYS[toy].model, 1.5
    recording = record(Guided(model, scale), vanilla(block_length=4), cache("none").build(), unequal())
    moved = 0.0
    for ask in recording.asks:
        state, visible = ask.state, ask.plan.visible
        allow = visible.unsqueeze(1).expand(-1, visible.shape[1], -1)
        if model.spec.attention == "block_causal":
            allow = allow & (ask.region.block.unsqueeze(1) <= ask.region.block.unsqueeze(2))
        prompt = state.positions < state.begin.unsqueeze(1)
        with torch.inference_mode():
            conditional = model.logits(state.tokens, allow)
            unconditional = model.logits(state.tokens.masked_fill(prompt, MASK), allow)
        wanted = ask.read & ~state.done.unsqueeze(1)
        guided = unconditional + (scale + 1) * (conditional - unconditional)
        assert bool((gaps(ask.logits, guided)[wanted] < 1e-9).all())
        moved = max(moved, float(gaps(conditional, guided)[wanted].max()) if bool(wanted.any()) else 0.0)
    assert moved > 0.1, "guidance changed nothing: the toy shows nothing"


def test_guidance_doubles_rows_and_not_forwards() -> None:
    class Rows(Counting):
        seen: int = 0

        def __call__(self, query: Query, kv: KVBuffer | None = None) -> torch.Tensor:
            self.seen = query.tokens.shape[0]
            return super().__call__(query, kv)

    inner = Rows(TOYS["full"].model)
    output = decode(Guided(inner, 0.5), vanilla(steps=3), [[3, 1], [4]], max_new_tokens=6)
    assert output.stats.nfe == [3, 3] and inner.forwards == 3 and inner.seen == 4


def test_it_is_a_model_and_a_component() -> None:
    guided = Guided(TOYS["full"].model, 0.5)
    assert isinstance(guided, Model)
    node = {"_component_": "guided", "scale": 0.5, "model": {"_component_": "transformer", "vocab_size": 9, "mask_id": 8, "eos_ids": [7]}}
    node["model"].update({"pad_id": 6, "width": 16, "layers": 1, "heads": 2})  # type: ignore[attr-defined]
    built = recipe.build(node, Model)
    assert isinstance(built, Guided) and built.spec.vocab_size == 9 and built.scale == 0.5


def test_wrong_use() -> None:
    with pytest.raises(ModelError, match="scale must be 0 or more, got -1"):
        Guided(TOYS["full"].model, -1)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ModelError, match="which lanes hold the prompt"):
        Guided(TOYS["full"].model, 1)(Query(tokens, tokens))
