"""Models around models: each keeps the decoder contract and its own, with several decoders and caches; wrappers compose, or say why not."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from dllm_toolkit import recipe, registry
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.certainty_prior import certainty_prior
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.d2cache import D2Cache
from dllm_toolkit.models.feature_reuse import FeatureReuse
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.smoothing import Smoothed
from dllm_toolkit.models.transformer import ModelError
from dllm_toolkit.models.wrapper import Wrapper
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.cases_features import WRAPPERS, Wrapping
from dllm_toolkit.testing.contract_decoder import Bench
from dllm_toolkit.testing.contract_wrapper import check_wrapper
from dllm_toolkit.testing.models import Oracle, tiny_transformer
from dllm_toolkit.testing.record import difference, record, unequal

DECODERS: dict[str, Decoder] = {
    "vanilla": vanilla(),
    "semi_ar": semi_ar(4),
    "fast_dllm": fast_dllm(4, threshold=0.6),
    "d2f": d2f(4, threshold=0.9, add_at=0.5, activate_at=0.75),
    "certainty_prior": certainty_prior(sigma=2.0),
}
TOYS = {toy.name: toy for toy in contract.toys()}
PLACES = [
    ("vanilla", "none", "full"),
    ("semi_ar", "dual", "full"),
    ("fast_dllm", "none", "full_shifted"),
    ("d2f", "block_causal", "block_causal"),
]
WRAPPED = pytest.mark.parametrize("case", WRAPPERS, ids=str)


def cache(name: str) -> cases.Case:
    return next(case for case in cases.CACHES if case.name == name)


def bench(case: Wrapping, decoder: str, chosen: str, model: Model) -> Bench:
    return Bench(DECODERS[decoder], cache(chosen).build(), case.around(model))


def fits(decoder: str, chosen: cases.Case, toy: str) -> bool:
    return contract.fits(DECODERS[decoder], chosen.build(), TOYS[toy]) is None


@WRAPPED
@pytest.mark.parametrize(("decoder", "chosen", "toy"), PLACES)
def test_contract(case: Wrapping, decoder: str, chosen: str, toy: str) -> None:
    spec = TOYS[toy].model.spec
    model = tiny_transformer(3, spec.attention, spec.shift, seed=2)  # two layers would leave one to be skipped
    failed = check_wrapper(case, model, bench(case, decoder, chosen, model))
    assert not failed, "\n".join(failed)


@WRAPPED
@pytest.mark.parametrize("chosen", cases.CACHES, ids=str)
def test_neutral_arguments_are_the_model_itself_with_every_cache(case: Wrapping, chosen: cases.Case) -> None:
    """E22 (guidance of scale 0), E10 (smoothing of weight 0), DC1 (intervals 1), and everything selected."""
    for toy in ("full", "full_shifted", "block_causal"):
        if not fits("fast_dllm", chosen, toy):
            continue
        model = TOYS[toy].model
        plain = record(model, DECODERS["fast_dllm"], chosen.build(), unequal())
        neutral = record(case.around(model, **case.neutral), DECODERS["fast_dllm"], chosen.build(), unequal())
        assert neutral.fingerprint() == plain.fingerprint()
        assert [difference(neutral, row, plain, row) for row in range(4)] == [None] * 4


@WRAPPED
def test_every_argument_is_live(case: Wrapping) -> None:
    arguments = [name for name in inspect.signature(case.maker).parameters if name != "model"]
    assert sorted(case.knobs) == sorted(arguments)
    model = tiny_transformer(3)
    one = record(case.around(model), DECODERS["vanilla"], cache("none").build(), unequal())
    for argument, value in case.knobs.items():
        other = record(case.around(model, **{argument: value}), DECODERS["vanilla"], cache("none").build(), unequal())
        assert any(difference(one, row, other, row) for row in range(4)), f"{argument}={value} changes nothing"


def test_every_wrapper_is_in_the_catalogue() -> None:
    registry.load_all()
    assert {case.maker for case in WRAPPERS} == set(Wrapper.__subclasses__())
    for case in WRAPPERS:
        assert registry.lookup("model", case.name) is case.maker and case.maker.__subclasses__() == []
        assert "arXiv" in f"{sys.modules[case.maker.__module__].__doc__}"


# dLLM-Cache


def test_one_layer_has_nothing_to_reuse() -> None:
    model = tiny_transformer(1)
    for decoder in ("vanilla", "semi_ar"):
        plain = record(model, DECODERS[decoder], cache("none").build(), unequal())
        mine = record(FeatureReuse(model, 50, 50, 0.0), DECODERS[decoder], cache("none").build(), unequal())
        assert [difference(mine, row, plain, row) for row in range(4)] == [None] * 4


@pytest.mark.parametrize("shift", [0, 1])
def test_dc1_all_of_the_answer_and_a_fresh_prompt_is_the_model_itself(shift: int) -> None:
    model = tiny_transformer(3, shift=shift)  # type: ignore[arg-type]
    plain = record(model, DECODERS["vanilla"], cache("none").build(), unequal())
    mine = record(FeatureReuse(model, 1, 50, 1.0), DECODERS["vanilla"], cache("none").build(), unequal())
    assert [difference(mine, row, plain, row) for row in range(4)] == [None] * 4


def test_dc2_a_ratio_of_0_freezes_the_layers_between_two_refreshes() -> None:
    """Memory and keys above the first layer change in the first forward and in every third one after it, and stay bit by bit otherwise."""
    changed: list[bool] = []
    last: list[torch.Tensor] = []

    def watch(query: Query, kv: torch.nn.Module) -> object:
        before = [one.clone() for one in (*kv.notes["feature_reuse"].buffers(), kv.keys[1:], kv.values[1:])]  # type: ignore[index,union-attr]

        def after() -> None:
            now = (*kv.notes["feature_reuse"].buffers(), kv.keys[1:], kv.values[1:])  # type: ignore[index,union-attr]
            pairs = [(a, b) for a, b in zip(before, now, strict=True) if a.is_floating_point()]
            changed.append(any(not torch.equal(a, b) for a, b in pairs))
            last[:] = list(now)

        return after

    model = FeatureReuse(tiny_transformer(3), 3, 3, 0.0)
    record(model, DECODERS["vanilla"], cache("none").build(), unequal(), tamper=watch)  # type: ignore[arg-type]
    assert len(changed) == 11 and changed == [number % 3 == 0 for number in range(11)]


def test_a_share_of_the_answer_is_computed_and_all_of_the_first_layer() -> None:
    model = FeatureReuse(tiny_transformer(3), prompt_interval=100, response_interval=100, ratio=0.25)
    stats = decode(model, vanilla(), [[3, 1, 4, 1]], max_new_tokens=9).stats
    assert stats.nfe == [9] and stats.lanes == [9 * 13]
    assert stats.computed[0] == pytest.approx((9 * 13 + 2 * (13 + 8 * 2)) / 3)  # floor(9 / 4) = 2 of 9 after the first


def test_values_that_turned_most_are_computed() -> None:
    """After a commit and with room for one position, it is the committed one: its value has turned, those of the masks much less."""
    model = tiny_transformer(2)
    tokens = torch.full((1, 9), 28)
    tokens[:, :3] = torch.tensor([3, 1, 4])
    positions = torch.arange(9).unsqueeze(0)
    allow = torch.ones(1, 9, 10, dtype=torch.bool)
    allow[..., -1] = False
    wrapped = FeatureReuse(model, 100, 100, 1 / 6)
    kv = wrapped.buffer(1, 10)
    query = Query(tokens, positions, positions, allow, positions, positions < 3)
    with torch.inference_mode():
        wrapped(query, kv)
        before = kv.notes["feature_reuse"].attention.clone()  # type: ignore[operator,union-attr]
        wrapped(query._replace(tokens=torch.where(positions == 6, 11, tokens)), kv)
    moved = (kv.notes["feature_reuse"].attention != before).any(-1)[0, 0, :9]  # type: ignore[operator,union-attr]
    assert moved.nonzero().flatten().tolist() == [6]


# d2Cache


def test_candidates_bound_what_is_computed() -> None:
    """No context: after the first forward the masks chosen and what was committed in the step before."""
    model = D2Cache(tiny_transformer(3), candidates=2, share=0.0)
    stats = decode(model, vanilla(), [[3, 1, 4, 1]], max_new_tokens=9).stats
    assert stats.nfe == [9] and stats.computed == [13 + 7 * 3 + 2]  # 2 masks and 1 token, at the end 1 mask and 1 token


def test_masks_near_known_positions_are_chosen_first() -> None:
    """Where density decides (a narrow kernel), the masks computed are the first ones behind the prompt."""
    seen: list[list[int]] = []
    model = D2Cache(tiny_transformer(2), candidates=2, sigma=0.05, share=0.0)
    inner = model.model
    real = inner.enter  # type: ignore[union-attr]
    inner.enter = lambda query: (seen.append(query.slots[0].tolist()), real(query))[1]  # type: ignore[union-attr,method-assign]
    decode(model, semi_ar(1), [[3, 1, 4]], max_new_tokens=5)
    assert seen == [[0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7]][: len(seen)] and len(seen) > 2


def test_attention_the_plain_way_is_attention() -> None:
    model = tiny_transformer(2)
    plain = record(model, DECODERS["semi_ar"], cache("none").build(), unequal())
    mine = record(D2Cache(model, 1000, 2.0, 1.0), DECODERS["semi_ar"], cache("none").build(), unequal())
    assert [difference(mine, row, plain, row) for row in range(4)] == [None] * 4


# Iteration smoothing


def test_smoothing_is_its_formula() -> None:
    """The second forward of a decode, against the model on embeddings that the first one's distributions give."""
    model, start = tiny_transformer(2), 0.25
    recording = record(Smoothed(model, start, 0.0, 1.0), DECODERS["vanilla"], cache("none").build(), unequal())
    first, second = recording.asks[0], recording.asks[1]
    state = second.state
    said = first.logits.softmax(-1) @ model.embed.weight
    wanted = state.masked & first.read
    positions = state.positions.expand_as(state.tokens)
    allow = (positions < state.end.unsqueeze(1)).unsqueeze(1).expand(-1, positions.shape[1], -1)
    added = torch.where(wanted.unsqueeze(-1), start * said, 0)
    with torch.inference_mode():
        logits = model(Query(state.tokens, positions, None, allow, None, None, added))
    alive = second.read & ~state.done.unsqueeze(1)
    torch.testing.assert_close(second.logits[alive], logits[alive], rtol=0, atol=1e-9)


def test_the_weight_grows_to_its_bound() -> None:
    """The weight of a forward is the least of start + growth * number and most: two bounds that meet are one decode."""
    model, batch = tiny_transformer(2), unequal()
    weights = ((0.5, 0.0, 0.2), (0.2, 0.5, 0.2))
    runs = [record(Smoothed(model, *one), DECODERS["vanilla"], cache("none").build(), batch) for one in weights]
    assert [difference(runs[0], row, runs[1], row) for row in range(4)] == [None] * 4


# Composition


COMPOSED = {
    "guided around feature_reuse": lambda model: Guided(FeatureReuse(model, 4, 3, 0.3), 0.5),
    "guided around d2cache": lambda model: Guided(D2Cache(model, 2, 2.0, 0.2), 0.5),
    "smoothed around guided": lambda model: Smoothed(Guided(model, 0.5), 0.3),
    "guided around smoothed": lambda model: Guided(Smoothed(model, 0.3), 0.5),
    "smoothed around feature_reuse": lambda model: Smoothed(FeatureReuse(model, 4, 3, 0.3), 0.3),
    "smoothed around guided around d2cache": lambda model: Smoothed(Guided(D2Cache(model, 2, 2.0, 0.2), 0.5), 0.3),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_wrappers_compose(name: str) -> None:
    case = Wrapping(name, COMPOSED[name], {}, {}, saves="feature_reuse" in name or "d2cache" in name)  # type: ignore[arg-type]
    model = tiny_transformer(3)
    failed = [one for one in check_wrapper(case, model, bench(case, "semi_ar", "dual", model)) if not one.startswith(("w1", "w2"))]
    assert not failed, "\n".join(failed)


def test_a_guided_wrapper_of_scale_0_is_the_wrapper() -> None:
    inner = FeatureReuse(tiny_transformer(3), 4, 3, 0.3)
    one = record(inner, DECODERS["semi_ar"], cache("none").build(), unequal())
    other = record(Guided(inner, 0.0), DECODERS["semi_ar"], cache("none").build(), unequal())
    assert [difference(one, row, other, row) for row in range(4)] == [None] * 4
    mine, theirs = (decode(model, semi_ar(4), [[3, 1], [9]], max_new_tokens=6).stats for model in (inner, Guided(inner, 0.0)))
    assert mine.lanes == theirs.lanes and theirs.computed[0] < theirs.lanes[0]


@pytest.mark.parametrize("maker", [FeatureReuse, D2Cache])
def test_layers_are_called_one_by_one_so_nothing_may_be_between(maker: type[Wrapper]) -> None:
    with pytest.raises(ModelError, match="must be given a transformer, got Guided. .*other wrappers around it"):
        maker(Guided(tiny_transformer(), 0.5))  # type: ignore[call-arg]
    with pytest.raises(ModelError, match="must be given a transformer, got Oracle"):
        maker(Oracle())  # type: ignore[call-arg]


def test_wrong_arguments() -> None:
    model = tiny_transformer(1)
    for message, make in (
        ("prompt_interval must be 1 or more, got 0", lambda: FeatureReuse(model, prompt_interval=0)),
        ("response_interval must be 1 or more, got -1", lambda: FeatureReuse(model, response_interval=-1)),
        (r"ratio must be in \[0, 1\], got 1.5", lambda: FeatureReuse(model, ratio=1.5)),
        ("candidates must be 1 or more, got 0", lambda: D2Cache(model, candidates=0)),
        ("sigma must be above 0 and at most 1000, got 0", lambda: D2Cache(model, sigma=0)),
        (r"share must be in \[0, 1\], got -0.1", lambda: D2Cache(model, share=-0.1)),
        ("start, growth and most must be 0 or more, got -1, 0.02 and 0.3", lambda: Smoothed(model, start=-1)),
        ("a model is smoothed once", lambda: Smoothed(Guided(Smoothed(model), 0.5))),
        ("must be given a transformer, got Oracle", lambda: Smoothed(Oracle())),
    ):
        with pytest.raises(ModelError, match=message):
            make()
    tokens = torch.zeros(1, 3, dtype=torch.long)
    for case in WRAPPERS:
        wrapped = case.around(model)
        query = Query(tokens, tokens, tokens, torch.ones(1, 3, 4, dtype=torch.bool), tokens)
        with pytest.raises(ModelError, match="which lanes hold the prompt"):
            wrapped(query, wrapped.buffer(1, 4))


@WRAPPED
def test_it_is_a_model_and_a_component(case: Wrapping) -> None:
    inner = {"_component_": "transformer", "vocab_size": 9, "mask_id": 8, "eos_ids": [7], "pad_id": 6, "width": 16, "layers": 1, "heads": 2}
    built = recipe.build({"_component_": case.name, "model": inner, **case.arguments}, Model)
    assert isinstance(built, case.maker) and isinstance(built, Model) and built.spec.vocab_size == 9
    if case.inexact:  # training and scoring have no buffer: they meet the model itself
        tokens = torch.tensor([[1, 2, 8]])
        query = Query(tokens, torch.arange(3).unsqueeze(0), None, None, None)
        assert torch.equal(built(query), built.model(query))


@WRAPPED
@pytest.mark.parametrize("shift", [0, 1])
def test_low_precision_runs(case: Wrapping, shift: int) -> None:
    """Memory is in the model's own precision, choices are made in float32; every position is decided."""
    model = case.around(tiny_transformer(2, shift=shift)).to(torch.bfloat16)  # type: ignore[arg-type]
    output = decode(model, vanilla(), [[3, 1, 4], [9]], max_new_tokens=[5, 3])
    assert output.stats.commits == [5, 3] and model.buffer(1, 4).keys.dtype == torch.bfloat16
