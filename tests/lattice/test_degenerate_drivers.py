"""Drivers at their limits: external verification writes the target's own text, or samples its distribution; stages leave the text alone.

Names follow the specification's lists: E19 and DE1 .. DE4 for external verification (V3 is DE2), TC1 and TC2 for staged programs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import dllm_toolkit.engine
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.sequence import AtSequence
from dllm_toolkit.decoders.rules.stop import AtEos
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.drivers.external_verify import _ACCEPT, ExternalVerify, _Rules
from dllm_toolkit.drivers.staged import Stage, Staged
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer, TransformerConfig
from dllm_toolkit.ops import masks, noise
from dllm_toolkit.recipe_hints import Lazy
from dllm_toolkit.state import State
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.contract_compile import GraphCounter
from dllm_toolkit.testing.models import Oracle, tiny_transformer, toy_spec
from dllm_toolkit.testing.record import infill, unequal
from dllm_toolkit.types import Attention, Result

TOYS = {toy.name: toy.model for toy in contract.toys()}
TARGET = TOYS["causal"]


def deer(drafter: Any, **arguments: Any) -> ExternalVerify:
    return ExternalVerify(Lazy.of(drafter), **arguments)


def ar_text(batch: Any, cache: Cache, **arguments: Any) -> Output:
    return decode(TARGET, autoregressive(**arguments), batch.prompts, templates=batch.templates, cache=cache, seed=batch.seeds)


# --- external verification, greedy


DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one forward": ("full", {}),
    "short": ("full", {"draft_length": 3}),
    "window": ("full", {"draft_canvas": "window", "separator": 7}),
    "in steps": ("full", {"draft": fast_dllm(4, threshold=0.6), "draft_steps": 3, "draft_cache": DualCache()}),
    "block-causal": ("block_causal", {"draft_cache": BlockCausalCache()}),
    "d2f": ("block_causal", {"draft": d2f(4, threshold=0.6), "draft_steps": 2, "draft_cache": BlockCausalCache()}),
    "shifted": ("full_shifted", {"draft_length": 5}),
}


@pytest.mark.parametrize("cache", [NoCache(), BlockCausalCache()], ids=["none", "block_causal"])
@pytest.mark.parametrize("batch", [unequal(), infill()], ids=["answers", "infill"])
@pytest.mark.parametrize("name", DRAFTS)
def test_e19_de1_greedy_is_the_targets_own_text(name: str, batch: Any, cache: Cache) -> None:
    toy, arguments = DRAFTS[name]
    plain = ar_text(batch, cache)
    output = deer(TOYS[toy], **arguments).run(
        TARGET, autoregressive(), batch.prompts, templates=batch.templates, cache=cache, seed=batch.seeds
    )
    assert output.tokens == plain.tokens and output.result == plain.result and output.end.tolist() == plain.end.tolist()
    assert output.stats.commits == plain.stats.commits
    extra = output.stats.extra
    assert output.stats.nfe == [a + b for a, b in zip(extra["target_forwards"], extra["draft_forwards"], strict=True)]
    # DE3: a round commits a token or more
    assert all(one <= other for one, other in zip(extra["target_forwards"], plain.stats.nfe, strict=True))


@pytest.mark.parametrize("length", [1, 3, 8, 32])
def test_a_drafter_that_agrees_saves_forwards(length: int) -> None:
    """Logits that depend on the position alone: every draft is the target's token, up to the end of the text."""
    batch = unequal()
    target, drafter = Oracle(toy_spec("causal", 1)), Oracle(toy_spec("full", 0))
    plain = decode(target, autoregressive(), batch.prompts, templates=batch.templates)
    output = deer(drafter, draft_length=length).run(target, autoregressive(), batch.prompts, templates=batch.templates)
    assert output.tokens == plain.tokens and output.stats.extra["accepted"] == output.stats.extra["drafted"]
    for row, tokens in enumerate(plain.stats.nfe):  # one token a forward
        assert output.stats.extra["target_forwards"][row] == -(-tokens // (length + 1)) or output.result[row] == Result.END_OF_TEXT


@pytest.mark.parametrize("name", ["one forward", "in steps"])
def test_de4_the_target_computes_no_position_twice(name: str) -> None:
    """Keys and values of accepted drafts are kept: after the first round a forward runs the last token and the drafts, nothing else."""
    toy, arguments = DRAFTS[name]
    batch = unequal()
    for drafter in (TOYS[toy], Oracle(toy_spec("full", 0))):
        target = TARGET if drafter is TOYS[toy] else Oracle(toy_spec("causal", 1))
        output = deer(drafter, **arguments).run(
            target, autoregressive(), batch.prompts, templates=batch.templates, cache=BlockCausalCache(), seed=batch.seeds
        )
        extra = output.stats.extra
        for row, prompt in enumerate(batch.prompts):
            assert extra["target_lanes"][row] == len(prompt) - 1 + extra["target_forwards"][row] + extra["drafted"][row]


def test_the_shipped_models_agree_and_save_forwards() -> None:
    from dllm_toolkit.evaluation.tasks import StoryArithmetic

    target, teacher = load("asset:autoregressive"), load("asset:teacher")
    prompts = [target.tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in StoryArithmetic(size=3, seed=11).problems()]
    plain = decode(target, autoregressive(), prompts, max_new_tokens=80, cache=BlockCausalCache())
    output = deer(teacher).run(target, autoregressive(), prompts, max_new_tokens=80, cache=BlockCausalCache())
    assert output.tokens == plain.tokens
    assert 4 * sum(output.stats.nfe) < sum(plain.stats.nfe)


def test_compiled_rounds_are_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    counters: dict[str, GraphCounter] = {}
    real = torch.compile

    def counted(function: Callable[..., Any], *, mode: str | None = None, **options: Any) -> Callable[..., Any]:
        return real(function, backend=counters.setdefault(getattr(function, "__name__", "forward"), GraphCounter()), **options)

    batch = unequal()
    driver = deer(TOYS["full"], draft_length=4)
    arguments = {"templates": batch.templates, "cache": BlockCausalCache(), "seed": batch.seeds}
    sampled = autoregressive(temperature=1.0)
    eager = driver.run(TARGET, sampled, batch.prompts, **arguments)
    torch._dynamo.reset()
    monkeypatch.setattr(dllm_toolkit.engine.torch, "compile", counted)
    compiled = driver.run(TARGET, sampled, batch.prompts, **arguments, compile=True)
    torch._dynamo.reset()
    assert compiled.tokens == eager.tokens and compiled.stats.extra == eager.stats.extra
    assert counters["decide"].graphs == counters["draw"].graphs == 1


# --- external verification, sampled


WORDS, EOS, PAD, MASK = 4, 4, 5, 6


def small(attention: Attention, shift: Any, seed: int, sharpness: float = 1.5) -> Transformer:
    """A model of four words, an end and a mask whose next word depends on what came before."""
    config = TransformerConfig(
        vocab_size=7,
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        mlp_width=16,
        mask_id=MASK,
        eos_ids=(EOS,),
        pad_id=PAD,
        max_positions=16,
        attention=attention,
        shift=shift,
    )
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = 1.0 if name.startswith("embed") else (sharpness if name.startswith("lm_head") else 2.0) / weight.shape[1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def exact_odds(model: Transformer, prompt: Sequence[int], length: int, decoder: Decoder) -> dict[tuple[int, ...], float]:
    """The probability of every text that left-to-right sampling can write, ended by EOS or by its length."""
    rule = _Rules(decoder)  # type: ignore[arg-type]
    odds: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for text, mass in odds.items():
            if text and text[-1] == EOS:
                grown[text] = mass
                continue
            canvas = torch.tensor([[*prompt, *text, 0]])
            logits = model.logits(canvas)[:, -1:]
            state: Any = type("Spec", (), {"spec": model.spec})
            for token, chance in enumerate(rule._distribution(logits, state)[0, 0].tolist()):
                if chance > 0:
                    grown[(*text, token)] = mass * chance
        odds = grown
    return odds


def surprise(counts: Counter[tuple[int, ...]], odds: dict[tuple[int, ...], float]) -> float:
    """p-value of the chi-square test of counts against odds; rare texts are put into one class."""
    total = sum(counts.values())
    assert set(counts) <= set(odds), "a text that the target can never write"
    common = [text for text, chance in odds.items() if chance * total >= 5]
    seen = torch.tensor([counts[text] for text in common] + [total - sum(counts[text] for text in common)], dtype=torch.float64)
    expected = torch.tensor([odds[text] * total for text in common], dtype=torch.float64)
    expected = torch.cat((expected, (total - expected.sum()).view(1)))
    if expected[-1] < 1e-9 * total:
        seen, expected = seen[:-1], expected[:-1]
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2))


def sampled_texts(driver: ExternalVerify | None, target: Transformer, decoder: Decoder, rows: int) -> Counter[tuple[int, ...]]:
    """Texts of `rows` sampled answers, and of two prompts in one batch; those of the first prompt are counted."""
    prompts = [[1, 2], [0]] * (rows // 2)
    arguments: Any = {"max_new_tokens": [3, 2] * (rows // 2), "seed": 17, "cache": BlockCausalCache()}
    output = decode(target, decoder, prompts, **arguments) if driver is None else driver.run(target, decoder, prompts, **arguments)
    texts = [row[: row.index(EOS) + 1] if EOS in row else row for row in output.tokens[::2]]
    return Counter(map(tuple, texts))


SAMPLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"temperature": 1.0}, {}),
    "warm": ({"temperature": 1.7}, {"draft_length": 1}),
    "nucleus": ({"temperature": 1.0, "top_p": 0.8}, {"draft_canvas": "window"}),
    "top 3": ({"temperature": 0.7, "top_k": 3}, {}),
    "in steps": ({"temperature": 1.0}, {"draft": fast_dllm(None, threshold=0.4, temperature=1.0), "draft_steps": 2}),
    "greedy draft": ({"temperature": 1.0}, {"draft": semi_ar(1), "draft_steps": 2}),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_de2_v3_sampling_has_the_targets_distribution(name: str) -> None:
    sampling, arguments = SAMPLED[name]
    target, drafter, decoder = small("causal", 1, 3), small("full", 0, 5), autoregressive(**sampling)
    odds = exact_odds(target, [1, 2], 3, decoder)
    assert abs(sum(odds.values()) - 1) < 1e-5 and len(odds) > 10
    assert surprise(sampled_texts(None, target, decoder, 4000), odds) > 1e-3  # the ruler itself
    assert surprise(sampled_texts(deer(drafter, **arguments), target, decoder, 4000), odds) > 1e-3


@pytest.mark.parametrize("wrong", ["accept everything", "sample p where refused"])
def test_the_chi_square_test_has_teeth(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classical mistakes of speculative sampling are seen at this number of samples."""
    target, drafter, decoder = small("causal", 1, 3), small("full", 0, 5), autoregressive(temperature=1.0)
    if wrong == "accept everything":
        drawn = noise.uniform
        lucky = torch.full((), 1e-9)
        monkeypatch.setattr(noise, "uniform", lambda *keys: lucky if int(keys[0].flatten()[0]) == _ACCEPT else drawn(*keys))
    else:
        real = torch.Tensor.clamp
        monkeypatch.setattr(
            torch.Tensor, "clamp", lambda self, *a, **k: real(self, *a, **k) * 0 if k == {"min": 0} else real(self, *a, **k)
        )
    counts = sampled_texts(deer(drafter), target, decoder, 4000)
    monkeypatch.undo()
    assert surprise(counts, exact_odds(target, [1, 2], 3, decoder)) < 1e-6


# --- staged programs


def greedy_by_hand(model: Transformer, prompt: Sequence[int], given: Sequence[int], length: int) -> list[int]:
    """Token by token through `model.logits`: what a block-causal model with blocks of one says of a mask behind the text."""
    text, spec = list(given), model.spec
    for _ in range(length - len(given)):
        canvas = torch.tensor([[*prompt, *text, spec.mask_id]])
        allow = masks.block_causal(masks.answer_blocks(torch.tensor([len(prompt)]), canvas.shape[1], 1))
        logits = model.logits(canvas, allow)[0, -1]
        logits[spec.mask_id] = float("-inf")
        text.append(int(logits.argmax()))
        if text[-1] in spec.eos_ids:
            break
    return text


@pytest.mark.parametrize("cache", [NoCache(), BlockCausalCache()], ids=["none", "block_causal"])
def test_tc1_tc2_a_fine_stage_is_left_to_right_and_leaves_the_first_alone(cache: Cache) -> None:
    model, batch, glue = TOYS["block_causal"], unequal(), (7, 3)
    coarse = fast_dllm(4, threshold=0.6)
    lengths = [16, 12, 9, 20]
    alone = decode(model, coarse, batch.prompts, max_new_tokens=5, cache=cache, seed=batch.seeds)
    program = Staged((Stage(max_new_tokens=5, append=glue), Stage(semi_ar(1))))
    output = program.run(model, coarse, batch.prompts, max_new_tokens=lengths, cache=cache, seed=batch.seeds)
    for row, prompt in enumerate(batch.prompts):
        wrote = [one for one in alone.tokens[row] if one not in model.spec.eos_ids]  # an end of the first stage is not the end
        given = [*wrote, *glue]
        assert output.tokens[row][: len(given)] == given
        text = greedy_by_hand(model, prompt, given, lengths[row])
        assert output.tokens[row][: len(text)] == text and set(output.tokens[row][len(text) :]) <= {model.spec.eos_ids[0]}
        born = output.born[row, len(prompt) : len(prompt) + len(text)].tolist()
        assert born[len(wrote) : len(given)] == [-1, -1] and all(one >= alone.stats.steps[row] for one in born[len(given) :])
        assert output.stats.nfe[row] == alone.stats.nfe[row] + len(text) - len(given)
    assert output.stats.extra == {"given": [2] * 4, "stages": [2] * 4}


def test_one_stage_is_decode() -> None:
    batch = unequal()
    lengths = [len(template) for template in batch.templates]
    arguments: Any = {"max_new_tokens": lengths, "seed": batch.seeds, "cache": DualCache()}
    plain = decode(TOYS["full"], fast_dllm(4, threshold=0.6, temperature=1.0), batch.prompts, **arguments)
    staged = Staged((Stage(),)).run(TOYS["full"], fast_dllm(4, threshold=0.6, temperature=1.0), batch.prompts, **arguments)
    assert staged.tokens == plain.tokens and staged.result == plain.result and torch.equal(staged.end, plain.end)
    assert all(getattr(staged.stats, name) == getattr(plain.stats, name) for name in ("nfe", "lanes", "steps", "commits", "forced"))


def test_a_tag_ends_a_stage_and_what_stood_behind_it_is_gone() -> None:
    model, batch = Oracle(toy_spec("full", 0)), unequal()
    prompt = next([3] * size for size in range(1, 60) if not set(model.answer(size, 9)) & set(model.spec.eos_ids))
    text = model.answer(len(prompt), 12)
    tag = tuple(text[3:5])
    program = Staged((Stage(until=tag, append=(7,)), Stage()))
    output = program.run(model, fast_dllm(8, threshold=0.0), [prompt], max_new_tokens=12)
    assert output.tokens[0][:6] == [*text[:5], 7] and output.stats.extra["stages"] == [2]
    # an Oracle knows positions only, so the second stage goes on with the text of its places
    assert output.tokens[0][6] == text[6]
    # a row that ends its text without the tag has answered
    never = Staged((Stage(until=(24, 24, 24)), Stage()))
    ended = TOYS["full_shifted"]
    one = never.run(ended, semi_ar(4), batch.prompts[:2], max_new_tokens=[8, 6])
    two = decode(ended, semi_ar(4), batch.prompts[:2], max_new_tokens=[8, 6])
    assert one.tokens == two.tokens and Result.END_OF_TEXT in one.result
    assert [count for count, result in zip(one.stats.extra["stages"], one.result, strict=True) if result == Result.END_OF_TEXT] == [1, 1]


def test_stages_share_no_noise() -> None:
    """The same canvas decoded again in a second stage must not be drawn with the first one's noise."""
    model = tiny_transformer()
    program = Staged((Stage(max_new_tokens=1), Stage(max_new_tokens=1), Stage(max_new_tokens=1)))
    drawn: list[list[State]] = []
    for seed in range(2):
        states: list[State] = []
        program.run(model, semi_ar(1, temperature=1.0), [[3]], max_new_tokens=3, seed=seed, callback=states.append)
        drawn.append(states)
    keys = [int(state.seed[0]) for states in drawn for state in states]
    assert len(set(keys)) == len(keys) == 6
    assert all(a != b for a, b in itertools.pairwise(keys))


def test_a_tag_is_a_reason_of_its_own() -> None:
    """Row by row: some end at the tag, some at the end of their text."""
    model = TOYS["full"]
    decoder = replace(semi_ar(2), stop=AtSequence((12, 12), AtEos()))
    batch = unequal()
    output = decode(model, decoder, batch.prompts, templates=batch.templates)
    free = decode(model, semi_ar(2), batch.prompts, templates=batch.templates)
    for row, result in enumerate(output.result):
        text = output.tokens[row][: int(output.end[row] - output.begin[row])]
        assert (result == Result.STOP_SEQUENCE) == (text[-2:] == [12, 12]) and text == free.tokens[row][: len(text)]
    assert Result.STOP_SEQUENCE in output.result and len(set(output.result)) > 1
