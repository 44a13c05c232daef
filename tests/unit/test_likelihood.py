"""Likelihoods against enumeration on tiny models: all orders, all masks, all blocks."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.evaluation.likelihood import Likelihood, LikelihoodError, LikelihoodOptions, draw_masks, log_likelihoods
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops.masks import absolute_blocks, answer_blocks, block_causal
from dllm_toolkit.testing.models import MASK, WORDS, Counting, Toy, tiny_transformer

PROMPT, ANSWER = [3, 1, 4, 1, 5], [9, 2, 6, 5, 8, 7]
QUIET = LikelihoodOptions(greedy=False)


def log_p(model: Transformer, canvas: list[int], place: int, token: int) -> float:
    """log p(token) at a position of one canvas, by the dense logits that training uses."""
    spec, tokens = model.spec, torch.tensor([canvas])
    allow = None
    if spec.attention == "block_causal":
        assert spec.block_size is not None
        begin = torch.tensor([len(PROMPT)])
        block = answer_blocks(begin, len(canvas), spec.block_size)
        if spec.block_anchor == "absolute":
            block = absolute_blocks(1, len(canvas), spec.block_size, tokens.device)
        allow = block_causal(block)
    return float(model.logits(tokens, allow)[0, place].log_softmax(-1)[token])


def mean_over_orders(model: Transformer, prompt: list[int], answer: list[int], group: list[int]) -> float:
    """log p of the tokens of `group`, written one by one, everything behind the group hidden: the mean over all orders of writing them."""
    begin, totals = len(prompt), []
    for order in itertools.permutations(group):
        canvas = [*prompt, *(token if place < group[0] else MASK for place, token in enumerate(answer))]
        total = 0.0
        for place in order:
            total += log_p(model, canvas, begin + place, answer[place])
            canvas[begin + place] = answer[place]
        totals.append(total)
    return statistics.fmean(totals)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_bound_is_the_mean_over_all_orders(shift: int) -> None:
    """I1 and I2 of the loss: all masks, each at 1 / (l C(L, l)), are all orders."""
    model = tiny_transformer(shift=shift)
    answer = ANSWER[:4]
    (found,) = log_likelihoods(model, [(PROMPT, answer)], options=QUIET)
    assert found.exact and found.standard_error == 0 and found.forwards == 2**4 - 1
    assert found.value == pytest.approx(mean_over_orders(model, PROMPT, answer, [0, 1, 2, 3]), abs=1e-9)


# Six tokens: blocks of 3 from the prompt's end, or of 4 from position 0, where the prompt's last token shares a block with three of them.
@pytest.mark.parametrize(("anchor", "size", "blocks"), [("prompt", 3, ([0, 1, 2], [3, 4, 5])), ("absolute", 4, ([0, 1, 2], [3, 4, 5]))])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_causal_bound_is_the_sum_over_blocks_that_see_clean_ones(anchor, size, blocks, shift) -> None:
    """One doubled forward says of a block what a canvas with clean blocks before it says: teacher forcing is decoding."""
    model = tiny_transformer(attention="block_causal", block_size=size, shift=shift)
    model.config = replace(model.config, block_anchor=anchor)
    (found,) = log_likelihoods(model, [(PROMPT, ANSWER)], options=QUIET)
    expected = sum(mean_over_orders(model, PROMPT, ANSWER, list(block)) for block in blocks)
    assert found.exact and found.forwards == 2**3 - 1 and found.lanes == 7 * 2 * 11
    assert found.value == pytest.approx(expected, abs=1e-9)


def test_a_block_of_one_token_makes_a_block_causal_bound_the_likelihood() -> None:
    model = tiny_transformer(attention="block_causal", block_size=1)
    (found,) = log_likelihoods(model, [(PROMPT, ANSWER)], options=LikelihoodOptions(samples=1, greedy=False))
    canvas, total = [*PROMPT, *[MASK] * 6], 0.0
    for place, token in enumerate(ANSWER):
        total += log_p(model, canvas, 5 + place, token)
        canvas[5 + place] = token
    assert (found.forwards, found.exact) == (1, True) and found.value == pytest.approx(total, abs=1e-9)


def test_a_causal_likelihood_is_the_sum_of_log_softmax() -> None:
    model = tiny_transformer(attention="causal", shift=1)
    pairs = [(PROMPT, ANSWER), (PROMPT[:2], ANSWER[:3]), (PROMPT, [])]
    for found, (prompt, answer) in zip(log_likelihoods(model, pairs), pairs, strict=True):
        tokens = torch.tensor([[*prompt, *answer]])
        logits = model.logits(tokens)[0, len(prompt) :].log_softmax(-1)
        expected = float(logits.gather(1, torch.tensor(answer, dtype=torch.long).unsqueeze(1)).sum())
        assert found.value == pytest.approx(expected, abs=1e-9) and found.exact and found.forwards == bool(answer)
    written = [*PROMPT]
    for _ in range(4):
        written.append(int(model.logits(torch.tensor([[*written, 0]]))[0, -1].argmax()))
    greedy = written[len(PROMPT) :]
    right, wrong = log_likelihoods(model, [(PROMPT, greedy), (PROMPT, [*greedy[:3], (greedy[3] + 1) % WORDS])])
    assert right.greedy is True and wrong.greedy is False


def repeated(draw: str, samples: int, seeds: int) -> list[Likelihood]:
    options = LikelihoodOptions(samples=samples, draw=draw, greedy=False)
    return log_likelihoods(tiny_transformer(layers=1), [(PROMPT, ANSWER)] * seeds, options=options, seed=range(seeds), batch_size=400)


def test_the_monte_carlo_estimate_is_right_on_average_and_knows_its_error() -> None:
    (exact,) = log_likelihoods(tiny_transformer(layers=1), [(PROMPT, ANSWER)], options=QUIET)
    variance = {}
    for draw in ("independent", "stratified"):
        found = repeated(draw, samples=8, seeds=300)
        values, errors = [one.value for one in found], [one.standard_error or 0.0 for one in found]
        variance[draw] = statistics.variance(values)
        error_of_mean = math.sqrt(variance[draw] / len(values))
        assert abs(statistics.fmean(values) - exact.value) < 4 * error_of_mean and not found[0].exact
        claimed = statistics.fmean(one**2 for one in errors)
        # Within a quarter for independent draws; for stratified ones too large rather than too small.
        assert 0.75 * variance[draw] < claimed < (1.25 if draw == "independent" else 4) * variance[draw]
    assert variance["stratified"] < variance["independent"]


class TheMoreHiddenTheLessSure(Toy):
    """A model for which only the number of hidden tokens matters, as it mostly does for a trained one: -log p = hidden / 4 of any token."""

    def __call__(self, query, kv=None):
        hidden = (query.tokens == MASK).sum(1) / 4
        others = torch.log(torch.expm1(hidden.double()) / (self.spec.vocab_size - 1))
        logits = others.view(-1, 1, 1).repeat(1, query.read.shape[1], self.spec.vocab_size)
        return logits.scatter(2, torch.tensor(ANSWER).expand(len(hidden), -1).unsqueeze(2), 0.0)


def test_stratified_draws_take_out_what_the_number_of_hidden_tokens_does() -> None:
    spread = {}
    for draw in ("independent", "stratified"):
        options = LikelihoodOptions(samples=12, draw=draw, greedy=False)
        found = log_likelihoods(TheMoreHiddenTheLessSure(), [(PROMPT, ANSWER)] * 100, options=options, seed=range(100))
        # l hidden tokens cost 6 / l * l * l / 4 nats; the mean over l = 1 .. 6 is 21 / 4.
        assert statistics.fmean(one.value for one in found) == pytest.approx(-21 / 4, abs=0.3)
        spread[draw] = statistics.pvariance(one.value for one in found)
    # Twelve strata of six values: two in each, so the number is always the same.
    assert spread["stratified"] == pytest.approx(0, abs=1e-12) and spread["independent"] > 0.3


def test_one_sample_says_nothing_of_its_error_and_one_token_needs_no_more() -> None:
    model = Counting(tiny_transformer())
    options = LikelihoodOptions(samples=1, greedy=False)
    (one,) = log_likelihoods(model, [(PROMPT, ANSWER[:1])], options=options)
    assert model.forwards == 1 and one.exact
    assert one.value == pytest.approx(log_p(model.model, [*PROMPT, MASK], 5, ANSWER[0]), abs=1e-9)
    (two,) = log_likelihoods(model, [(PROMPT, ANSWER)], options=options)
    assert two.standard_error is None and not two.exact and two.forwards == 1


@pytest.mark.parametrize("attention", ["full", "block_causal", "causal"])
def test_a_pair_does_not_depend_on_its_company(attention: str) -> None:
    model = tiny_transformer(attention=attention, shift=int(attention == "causal"), block_size=6)
    pairs = [(PROMPT, ANSWER), ([7], [1]), ([1, 2, 3, 4, 5, 6, 7, 8], [*ANSWER, *ANSWER]), (PROMPT[:3], ANSWER[:2])]
    options, seeds = LikelihoodOptions(samples=20), [5, 6, 7, 8]
    together = log_likelihoods(model, pairs, options=options, seed=seeds, batch_size=7)
    for number, pair in enumerate(pairs):
        (alone,) = log_likelihoods(model, [pair], options=options, seed=seeds[number], batch_size=32)
        assert alone.value == pytest.approx(together[number].value, abs=1e-9)
        assert replace(alone, value=0, standard_error=0) == replace(together[number], value=0, standard_error=0)


@pytest.mark.parametrize(("attention", "block"), [("full", None), ("block_causal", 3)])
@pytest.mark.parametrize("shift", [0, 1])
def test_greedy_is_what_the_decoder_of_one_token_a_forward_writes(attention, block, shift) -> None:
    model = tiny_transformer(attention=attention, shift=shift, block_size=block)
    prompts = [[7, 3], PROMPT, [2]]
    written = decode(model, vanilla(block_length=block), prompts, max_new_tokens=6).tokens
    options = LikelihoodOptions(samples=4)
    found = log_likelihoods(model, list(zip(prompts, written, strict=True)), options=options)
    masks = 4  # 2^3 - 1 choices of a block are more than the 4 samples
    assert [one.greedy for one in found] == [True] * 3 and {one.forwards for one in found} == {masks + 6}
    changed = [[*answer[:5], (answer[5] + 1) % WORDS] for answer in written]
    assert not any(one.greedy for one in log_likelihoods(model, list(zip(prompts, changed, strict=True)), options=options))


def test_guidance_changes_the_bound_and_is_told_the_prompt() -> None:
    model = tiny_transformer()
    plain, neutral, strong = (
        log_likelihoods(one, [(PROMPT, ANSWER[:3])], options=QUIET)[0].value
        for one in (model, Guided(model, scale=0.0), Guided(model, scale=1.0))
    )
    assert neutral == pytest.approx(plain, abs=1e-9) and abs(strong - plain) > 0.01


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 40), st.sampled_from(["stratified", "independent"]), st.integers(0)
)
def test_a_loss_of_one_nat_a_token_gives_the_length(groups, samples, draw, seed) -> None:
    """The weights of any draw add up to the number of tokens, so the estimate is exact wherever all tokens are equally hard."""
    drawn = draw_masks(groups, LikelihoodOptions(samples=samples, draw=draw), seed & 0xFFFFFFFF)
    weight = drawn.exact + drawn.noisy
    assert float(weight.sum()) == pytest.approx(sum(groups), rel=1e-9)
    assert bool((weight[~drawn.masked] == 0).all()) and bool((weight[drawn.masked] > 0).all())
    assert drawn.sampled == (samples if any(2**size - 1 > samples for size in groups) else 0)


@pytest.mark.parametrize(
    ("pair", "model", "message"),
    [
        (([], [1]), {}, "prompt of pair 0 is empty"),
        (([1], [2] * 128), {}, "got 1 tokens of prompt and 128 of answer with 128 positions"),
        (([1], [99]), {}, "got 99 with 29 rows"),
        (([1], [MASK]), {}, "holds the mask token, got id 28"),
        (([1], [2]), {"attention": "block_causal"}, "block_size"),
        (([1], [2]), {"attention": "causal"}, "Write shift: 1"),
    ],
)
def test_what_cannot_be_judged_is_said_before_any_forward(pair, model, message) -> None:
    counting = Counting(tiny_transformer(**model))
    with pytest.raises(LikelihoodError, match=message):
        log_likelihoods(counting, [pair])
    assert counting.forwards == 0


def test_options_and_arguments_are_checked() -> None:
    with pytest.raises(LikelihoodError, match="samples must be at least 1"):
        LikelihoodOptions(samples=0)
    with pytest.raises(LikelihoodError, match="one seed a pair"):
        log_likelihoods(tiny_transformer(), [([1], [2])], seed=[1, 2])
    with pytest.raises(LikelihoodError, match="batch_size"):
        log_likelihoods(tiny_transformer(), [([1], [2])], batch_size=0)
