"""Closed forms of decoding a perfect model (arXiv 2510.04767): every commit rule gives the accuracy that theory says."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.confidence_adaptive import confidence_adaptive
from dllm_toolkit.decoders.dream import dream
from dllm_toolkit.decoders.entropy_bounded import entropy_bounded
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import cases
from dllm_toolkit.testing.case import Case
from dllm_toolkit.testing.ideal import (
    Ideal,
    correlation,
    entropies,
    one_step_accuracy,
    replace_accuracy,
    right_answers,
    shuffle_accuracy,
)
from dllm_toolkit.testing.models import toy_spec
from dllm_toolkit.types import Need

PROMPT = [20, 21]
NEW = 12
ROWS = 2048


def items(n: int) -> list[int]:
    return list(range(3, 3 + n))


def accuracy(decoder: Decoder, operation: str, n: int, rows: int = ROWS, new: int = NEW) -> float:
    """Share of the rows whose answer is right; every row has noise of its own, always the same."""
    answers = right_answers(operation, items(n), new)
    length = len(answers[0])
    output = decode(Ideal(answers, len(PROMPT)), decoder, [PROMPT] * rows, max_new_tokens=length)
    return sum(tuple(tokens) in set(answers) for tokens in output.tokens) / rows


def close(found: float, expected: float, rows: int = ROWS) -> bool:
    """Within four standard errors; the noise is fixed, so this is no matter of luck."""
    return abs(found - expected) <= 4 * math.sqrt(max(expected * (1 - expected), 1e-12) / rows) + 1e-9


# --- the numbers themselves (specification: section 4 and identity I16)


def test_published_numbers() -> None:
    assert correlation(right_answers("shuffle", items(4), NEW)) == pytest.approx(3.41504, abs=1e-5)
    assert correlation(right_answers("replace_any", items(4), NEW)) == pytest.approx(1.24511, abs=1e-5)
    assert shuffle_accuracy(4, 4) == pytest.approx(0.09375) and shuffle_accuracy(4, 2) == pytest.approx(0.375)
    assert shuffle_accuracy(4, 1) == 1.0
    assert replace_accuracy(10**6) == pytest.approx(1 / math.e, abs=1e-5)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_closed_forms_agree_with_enumeration(n: int) -> None:
    shuffled, replaced = right_answers("shuffle", items(n), NEW), right_answers("replace_any", items(n), NEW)
    assert correlation(shuffled) == pytest.approx(n * math.log2(n) - math.log2(math.factorial(n)))
    assert correlation(replaced) == pytest.approx((n - 1) * (math.log2(n) - math.log2(n - 1)))
    assert one_step_accuracy(shuffled) == pytest.approx(shuffle_accuracy(n, n)) == pytest.approx(math.factorial(n) / n**n)
    assert one_step_accuracy(replaced) == pytest.approx(replace_accuracy(n))
    for operation in ("copy", "reverse", "sort"):
        certain = right_answers(operation, items(n), NEW)
        assert correlation(certain) == 0 and one_step_accuracy(certain) == 1


def test_two_a_step_is_a_double_factorial() -> None:
    for n in (4, 6, 8):
        odd, even = math.prod(range(1, n, 2)), math.prod(range(2, n + 1, 2))
        assert shuffle_accuracy(n, 2) == pytest.approx(odd / even)


def test_correlation_tends_to_log2_e() -> None:
    assert (999) * (math.log2(1000) - math.log2(999)) == pytest.approx(math.log2(math.e), abs=1e-3)


def test_bound_of_several_steps_falls_as_steps_are_refined() -> None:
    """sum over steps of |S_t| log2 k_t - log2 n!; 0 with one name a step."""
    n = 6

    def bound(sizes: list[int]) -> float:
        left, bits = n, 0.0
        for size in sizes:
            bits += size * math.log2(left)
            left -= size
        return bits - math.log2(math.factorial(n))

    bounds = [bound(sizes) for sizes in ([6], [3, 3], [3, 1, 2], [2, 1, 1, 1, 1], [1] * 6)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] == pytest.approx(correlation(right_answers("shuffle", items(n), NEW)))
    assert bounds[-1] == pytest.approx(0)


# --- the model


def test_the_ideal_model_answers_with_exact_conditionals() -> None:
    from dllm_toolkit.models.base import Query

    answers = right_answers("shuffle", items(3), NEW)
    model = Ideal(answers, 2)
    tokens = torch.tensor([[20, 21, model.spec.mask_id, 4, model.spec.mask_id], [20, 21, 5, 4, model.spec.mask_id]])
    chances = model(Query(tokens, torch.arange(5).expand(2, 5))).exp()
    assert chances[0, 2, [3, 4, 5]].tolist() == [0.5, 0.0, 0.5] and chances[0, 4, [3, 4, 5]].tolist() == [0.5, 0.0, 0.5]
    assert chances[1, 4, [3, 4, 5]].tolist() == [1.0, 0.0, 0.0]
    assert entropies(answers) == pytest.approx([math.log2(3)] * 3)


# --- every rule on what has one answer


RULES = {
    "quota of one": vanilla(),
    "all at once": vanilla(steps=1),
    "random order": vanilla(steps=2, remasking="random"),
    "margin": BlockDecoder(SemiAutoregressive(None), Quota(2), Sample(score="margin"), stop=WhenFull()),
    "entropy": dream(steps=2, algorithm="entropy"),
    "threshold": fast_dllm(block_length=None, threshold=0.9, stop_at_eos=False),
    "factor": fast_dllm(block_length=None, factor=1.0, stop_at_eos=False),
    "entropy bounded": entropy_bounded(block_length=None, budget=0.1),
    "confidence adaptive": confidence_adaptive(block_length=4, threshold=0.95, maximum=4),
    "blocks": vanilla(steps=2, block_length=2),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("operation", ["copy", "reverse", "sort"])
def test_one_right_answer_is_found_by_every_rule(name: str, operation: str) -> None:
    assert accuracy(RULES[name], operation, 4, rows=2) == 1.0


# --- sampled orders


def sampled(n: int, per_step: int, score: str) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(None), Quota(n // per_step), Sample(temperature=1.0, score=score), stop=WhenFull())  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["probability", "margin", "negative_entropy", "random"])
@pytest.mark.parametrize(("n", "per_step"), [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_sampled_shuffle(n: int, per_step: int, score: str) -> None:
    assert close(accuracy(sampled(n, per_step, score), "shuffle", n), shuffle_accuracy(n, per_step))


@pytest.mark.parametrize("n", [3, 4, 6])
def test_sampled_replace_in_one_step(n: int) -> None:
    assert close(accuracy(sampled(n, n, "random"), "replace_any", n), replace_accuracy(n))


@pytest.mark.parametrize("operation", ["insert_anywhere", "remove_any"])
def test_sampled_insert_and_remove_in_one_step(operation: str) -> None:
    answers = right_answers(operation, items(4), NEW)
    assert close(accuracy(sampled(len(answers[0]), len(answers[0]), "random"), operation, 4), one_step_accuracy(answers))


def test_one_at_a_time_is_always_right() -> None:
    for operation in ("shuffle", "replace_any", "insert_anywhere", "remove_any"):
        length = len(right_answers(operation, items(4), NEW)[0])
        assert accuracy(sampled(length, 1, "random"), operation, 4, rows=256) == 1.0


# --- thresholds


@pytest.mark.parametrize("n", [3, 4, 5])
def test_threshold_on_shuffle(n: int) -> None:
    """Above one half at most the last name passes by itself, so names come one by one; at one half the last two come together."""
    for threshold in (0.51, 0.9):
        decoder = fast_dllm(block_length=None, threshold=threshold, temperature=1.0, stop_at_eos=False)
        assert accuracy(decoder, "shuffle", n, rows=256) == 1.0
    decoder = fast_dllm(block_length=None, threshold=0.5, temperature=1.0, stop_at_eos=False)
    assert close(accuracy(decoder, "shuffle", n), 0.5)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_threshold_on_greedy_replace(n: int) -> None:
    """Perfect if and only if nothing passes in the first step, in which every old name has probability (n-1)/n; `>=` commits there."""
    edge = (n - 1) / n
    for threshold, expected in ((edge + 1e-6, 1.0), (edge - 1e-6, 0.0), (0.5, 0.0)):
        decoder = fast_dllm(block_length=None, threshold=threshold, stop_at_eos=False)
        assert accuracy(decoder, "replace_any", n, rows=2) == expected


@pytest.mark.parametrize(("n", "per_step"), [(6, 3), (4, 4), (6, 6)])
def test_greedy_replace_with_more_than_two_a_step_never_works(n: int, per_step: int) -> None:
    """Each position is likelier to keep its old name, so the last names are all kept."""
    assert accuracy(vanilla(steps=n // per_step), "replace_any", n, rows=2) == 0.0


def test_greedy_replace_with_two_a_step_is_a_coin() -> None:
    """The last two names have even odds each. A temperature near zero is greedy with ties broken at random: right in half of the cases."""
    greedy = BlockDecoder(SemiAutoregressive(None), Quota(2), Sample(temperature=1e-3, score="random"), stop=WhenFull())
    assert close(accuracy(greedy, "replace_any", 4), 0.5)


def test_ties_go_to_the_lowest_id() -> None:
    """Without that noise the ids decide: both of the last two take the new name if its id is the lowest, and keep theirs otherwise."""
    right = [accuracy(vanilla(steps=2), "replace_any", 4, rows=1, new=new) for new in (2, NEW)]
    assert right == [0.0, 0.0]


@pytest.mark.parametrize("n", [4, 6])
def test_sampled_replace_in_two_steps(n: int) -> None:
    """The new name comes once in the first half, or not there and once in the second half."""
    half = n // 2
    first = half * (1 / n) * ((n - 1) / n) ** (half - 1)
    second = ((n - 1) / n) ** half * ((half - 1) / half) ** (half - 1)
    assert close(accuracy(sampled(n, half, "random"), "replace_any", n), first + second)


def test_factor_rule_is_sequential_where_nothing_is_sure() -> None:
    """(k + 1)(1 - c) <= 1 asks for c >= 1/2 from two names: the same edge as a threshold of one half, and one name below it."""
    decoder = fast_dllm(block_length=None, factor=0.9, temperature=1.0, stop_at_eos=False)
    assert accuracy(decoder, "shuffle", 4, rows=256) == 1.0


def test_entropy_budget_below_one_bit_is_sequential() -> None:
    decoder = entropy_bounded(block_length=None, budget=0.1, temperature=1.0)
    assert accuracy(decoder, "shuffle", 4, rows=256) == 1.0


# --- every decoder that ships


def _needs(case: Case) -> set[Need]:
    return {need for member in case.build().members() for need in member.needs}


@pytest.mark.parametrize("case", [case for case in cases.DECODERS if Need.CAUSAL not in _needs(case)], ids=str)
def test_every_decoder_copies_what_it_is_sure_of(case: Case) -> None:
    """Total correlation 0: however many tokens a method writes at once, they fit each other."""
    answers = right_answers("copy", [6, 11, 4, 9, 13, 8, 10, 14], NEW)
    spec = toy_spec("block_causal" if Need.BLOCK_CAUSAL in _needs(case) else "full")
    output = decode(Ideal(answers, len(PROMPT), spec), case.build(), [PROMPT] * 2, max_new_tokens=8)
    assert output.tokens == [list(answers[0])] * 2
