"""Losses against exact enumeration (I1-I4, I6), normalisers, the direction of the KL, masks, and what each objective refuses."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_toolkit.models.transformer import transformer
from dllm_toolkit.ops.masks import block_causal
from dllm_toolkit.training.composed import Composed, Copy, Shown
from dllm_toolkit.training.corruptors import ActiveBlock, Batch, ExactCount, Independent, Uniform
from dllm_toolkit.training.layouts import canvas_blocks
from dllm_toolkit.training.objectives import (
    Autoregressive,
    D2FDistillation,
    MaskedDiffusion,
    ObjectiveError,
    cross_entropy,
    full_allow,
    normalise,
    reverse_kl,
    soft_cross_entropy,
)

V, L, MASK = 3, 3, 3
JOINT = torch.rand((V,) * L, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
JOINT /= JOINT.sum()


class Exact:
    """A model that knows the joint distribution: logits are log p(x_i | everything that is not masked). One prompt token in front."""

    spec = SimpleNamespace(attention="full", shift=0, mask_id=MASK, eos_ids=(), block_size=None, vocab_size=V + 1)
    layers = ()
    norm = lm_head = torch.nn.Identity()

    def lanes(self, query: Any, kv: Any) -> None:
        return None

    def enter(self, query: Any) -> torch.Tensor:
        return self.logits(query.tokens)

    def logits(self, tokens: torch.Tensor, allow: torch.Tensor | None = None) -> torch.Tensor:
        rows = []
        for row in tokens[:, 1:].tolist():
            kept = JOINT[tuple(slice(None) if token == MASK else slice(token, token + 1) for token in row)]
            answer = []
            for position in range(L):
                others = [axis for axis in range(L) if axis != position]
                marginal = torch.zeros(V + 1, dtype=torch.float64)
                values = kept.sum(others) / kept.sum()
                if row[position] == MASK:
                    marginal[:V] = values
                else:
                    marginal[row[position]] = 1.0
                answer.append(marginal)
            rows.append(torch.stack([torch.ones(V + 1, dtype=torch.float64), *answer]))
        return torch.stack(rows).clamp(min=1e-300).log()


SEQUENCES = list(itertools.product(range(V), repeat=L))
SUBSETS = [torch.tensor(bits, dtype=torch.bool) for bits in itertools.product((0, 1), repeat=L) if any(bits)]


def row(x: tuple[int, ...]) -> Batch:
    return Batch(torch.tensor([[0, *x]]), torch.tensor([1]), L)


def shown(objective: Composed, batch: Batch, masked: torch.Tensor, weight: torch.Tensor, model: Any) -> Shown:
    copy = Copy(batch.tokens.masked_fill(masked, model.spec.mask_id), weight)
    return objective.shown(batch, [copy], model.spec, torch.Generator(), 1.0)


def bound(model: Any, x: tuple[int, ...], subset: torch.Tensor) -> float:
    """The weighted loss of one set of masks, times its probability given their number."""
    objective, count = MaskedDiffusion(normaliser="none"), int(subset.sum())
    masked = torch.cat((torch.tensor([False]), subset)).unsqueeze(0)
    view = shown(objective, row(x), masked, masked * torch.as_tensor(L / count, dtype=torch.float64), model)
    return float(objective.loss(model, row(x), view).value) / (L * math.comb(L, count))


@pytest.mark.parametrize("x", SEQUENCES[::4])
def test_exact_count_bound_is_the_negative_log_likelihood(x) -> None:
    """I1, I2: k uniform, subset uniform, weight L/k; with exact conditionals the expected loss is -log p(x)."""
    expected = sum(bound(Exact(), x, subset) for subset in SUBSETS)
    assert expected == pytest.approx(-math.log(JOINT[x]), abs=1e-12)


def test_the_corruptors_draw_the_masks_and_weights_of_that_enumeration() -> None:
    """ExactCount: P(S) = 1 / (L C(L, k)), weight L/k. Uniform(floor): E[weight; S] = the clipped coefficients of I3."""
    draws = 200_000
    rows = Batch(torch.zeros(draws, L + 1, dtype=torch.long), torch.ones(draws, dtype=torch.long), L)
    for corruptor, coefficients in (
        (ExactCount(stratified=False), {1: 1 / 3, 2: 1 / 6, 3: 1 / 3}),
        (Uniform(floor=1e-3, stratified=False), {1: 0.332667, 2: 0.166833, 3: 0.333667}),
    ):
        masked, weight = corruptor(rows, torch.Generator().manual_seed(1))
        for subset in SUBSETS:
            chosen = (masked[:, 1:] == subset).all(1)
            # The share of the bound that this subset's cross-entropies get: 1 / (k C(L, k)) for the continuous schedule.
            values = chosen * weight[:, 1:].double().amax(1)
            assert abs(values.mean() - coefficients[int(subset.sum())]) < 5 * values.std() / draws**0.5


@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_block_bound_is_the_negative_log_likelihood(block_length) -> None:
    """I6: whatever the block length, with exact conditionals the block process estimates -log p(x); block 1 is the autoregressive loss."""
    x, draws = (2, 0, 1), 3000
    rows = Batch(torch.tensor([[0, *x]]).expand(draws, -1), torch.ones(draws, dtype=torch.long), L)
    masked, weight = ActiveBlock((block_length,))(rows, torch.Generator().manual_seed(2))
    cross = cross_entropy(Exact().logits(rows.tokens.masked_fill(masked, MASK)), rows.tokens)
    values = (cross * weight).sum(1)
    assert abs(values.mean() + math.log(JOINT[x])) < 5 * values.std() / draws**0.5


def test_another_models_bound_is_no_lower() -> None:
    """Averaged over x with p, the bound of any model is at least the entropy."""

    class Worse(Exact):
        def logits(self, tokens, allow=None):
            return super().logits(tokens, allow) * 0.7

    entropy = -(JOINT * JOINT.log()).sum()
    assert sum(float(JOINT[x]) * sum(bound(Worse(), x, s) for s in SUBSETS) for x in SEQUENCES) > entropy


def test_normalisers_have_their_own_closed_forms() -> None:
    """I4, T18: constant CE c with weight L/k over k = 1..L."""
    c, length = 1.7, 4
    weight = torch.stack([(torch.arange(length) < k) * (length / k) for k in range(1, length + 1)]).double()
    values = torch.full_like(weight, c)
    answer = torch.ones_like(weight, dtype=torch.bool)
    harmonic = sum(1 / k for k in range(1, length + 1))
    assert float(normalise(values, weight, answer, "answer_length")) == pytest.approx(c)
    assert float(normalise(values, weight, answer, "batch_length")) == pytest.approx(c)
    assert float(normalise(values, weight, answer, "row_masked_count")) == pytest.approx(c * harmonic)
    assert float(normalise(values, weight, answer, "masked_count")) == pytest.approx(c * 16 / 10)
    assert float(normalise(values, weight, answer, "sum_of_weights")) == pytest.approx(c)
    assert float(normalise(values, weight, answer, "none")) == pytest.approx(c * 16)


@pytest.mark.parametrize("how", ["answer_length", "batch_length", "masked_count", "row_masked_count", "sum_of_weights", "none"])
def test_an_empty_selection_gives_zero_with_a_gradient(how) -> None:
    values = torch.ones(2, 3, requires_grad=True)
    loss = normalise(values, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), how)
    loss.backward()
    assert loss == 0 and values.grad is not None and not values.grad.any()


def test_direction_of_the_divergences() -> None:
    """T19: an asymmetric pair of distributions."""
    teacher = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64).log()
    student = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(soft_cross_entropy(student, teacher)) == pytest.approx(forward + entropy)
    assert float(reverse_kl(student, teacher)) == pytest.approx(backward)
    # I8: temperature .5 sharpens (.9, .1) to (.98780, .01220), entropy .065861.
    assert float(soft_cross_entropy(teacher, teacher, 0.5)) == pytest.approx(0.065861, abs=1e-6)


def test_the_teacher_gets_no_gradient_and_half_precision_is_widened() -> None:
    student = torch.randn(1, 2, 5, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(1, 2, 5, dtype=torch.bfloat16, requires_grad=True)
    for rule in (soft_cross_entropy, reverse_kl):
        value = rule(student, teacher)
        assert value.dtype == torch.float32
        value.sum().backward()
        assert teacher.grad is None and student.grad is not None


def tiny(attention: str = "full", shift: int = 0):
    return transformer(
        vocab_size=11, mask_id=10, eos_ids=[9], pad_id=8, width=16, layers=2, heads=2, mlp_width=32, max_positions=32,
        attention=attention, shift=shift, seed=1,
    ).double()  # fmt: skip


def rows_of(seed: int = 0) -> Batch:
    tokens = torch.randint(0, 8, (3, 20), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.tensor([4, 6, 8]), 10)


def test_padding_behind_the_answer_is_invisible() -> None:
    batch, model = rows_of(), tiny()
    noise = batch.tokens.masked_fill(~batch.inside, 5)
    for allow in (full_allow(batch), block_causal(canvas_blocks(batch, 4))):
        changed = model.logits(noise, allow) - model.logits(batch.tokens, allow)
        assert changed[batch.inside].abs().max() < 1e-12


def test_block_causal_mask_by_perturbation_and_by_hand() -> None:
    batch = rows_of()
    allow = block_causal(canvas_blocks(batch, 4))
    for r, begin in enumerate(batch.prompt_length.tolist()):
        for q in range(begin + 10):
            for k in range(20):
                block_q = 0 if q < begin else (q - begin) // 4 + 1
                block_k = 0 if k < begin else (k - begin) // 4 + 1
                assert bool(allow[r, q, k]) == (k < begin + 10 and block_k <= block_q)
    assert allow.any(2).all()  # no row of the softmax is empty, in the padding neither


def test_rows_do_not_influence_each_other() -> None:
    batch, model = rows_of(), tiny()
    objective = MaskedDiffusion()
    view = objective.show(batch, model.spec, torch.Generator().manual_seed(0), 1.0)
    whole = objective.loss(model, batch, view).value
    alone = []
    for i in (2, 0, 1):
        one = Batch(batch.tokens[i : i + 1], batch.prompt_length[i : i + 1], 10)
        masked = view.tokens[i : i + 1] == 10
        alone.append(objective.loss(model, one, shown(objective, one, masked, view.weight[i : i + 1], model)).value)
    assert float(whole.detach()) == pytest.approx(float(torch.stack(alone).mean().detach()), abs=1e-9)


@pytest.mark.parametrize("padding", [False, True])
def test_autoregressive_loss_is_next_token_loss_up_to_the_first_end(padding) -> None:
    batch, model = rows_of(), tiny("causal", 1)
    batch.tokens[0, 9:] = 9  # ends after five tokens
    batch.tokens[1, 2] = 9  # an end token in the prompt ends nothing
    logits = model(_query(batch.tokens)).log_softmax(-1).detach()
    values = []
    for r in range(3):
        begin = int(batch.prompt_length[r])
        for position in range(begin, begin + 10):
            token = int(batch.tokens[r, position])
            values.append(-float(logits[r, position - 1, token]))
            if token == 9 and not padding:
                break
    loss = Autoregressive(padding=padding)(model, batch, torch.Generator().manual_seed(0))
    assert float(loss.value.detach()) == pytest.approx(sum(values) / len(values), abs=1e-6)


def _query(tokens):
    from dllm_toolkit.models.base import Query

    return Query(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


@pytest.mark.parametrize("shift", [0, 1])
def test_shifted_models_are_trained_on_the_same_positions(shift) -> None:
    """T14: with shift 1 the loss of position i moves only the row of position i - 1."""
    batch, model = rows_of(), tiny(shift=shift)
    masked = torch.zeros_like(batch.answer)
    masked[:, 9] = True
    objective = MaskedDiffusion(normaliser="sum_of_weights")
    view = shown(objective, batch, masked, masked.double(), model)
    raw = model(_query(view.tokens)._replace(allow=full_allow(batch))).log_softmax(-1)
    expected = -raw[torch.arange(3), 9 - shift, batch.tokens[:, 9]].mean()
    loss = objective.loss(model, batch, view).value
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-9)


@pytest.mark.parametrize("objective", [MaskedDiffusion(), MaskedDiffusion(noise=ActiveBlock((4,)))], ids=["count", "block"])
def test_the_loss_is_one_graph(objective) -> None:
    batch, model = rows_of(), tiny()
    view = objective.show(batch, model.spec, torch.Generator().manual_seed(0), 1.0)
    compiled = torch.compile(objective.loss, backend="eager", fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(model, batch, view).value, objective.loss(model, batch, view).value)


def test_d2f_options() -> None:
    assert D2FDistillation(block_length=8).noise.block_length == 8
    assert D2FDistillation().needs_teacher and not D2FDistillation(self_align=False).needs_teacher
    batch = rows_of()
    (plain,) = D2FDistillation(block_length=4, weighted=False).drawn(batch, tiny().spec, torch.Generator().manual_seed(0), 1.0)
    assert set(plain.weight.unique().tolist()) == {0.0, 1.0} and torch.equal(plain.weight > 0, plain.tokens == 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: D2FDistillation(block_length=8, noise=Independent(16)),
        lambda: D2FDistillation(temperature=0.0),
        lambda: D2FDistillation().check(tiny("causal", 1)),
        lambda: MaskedDiffusion().check(tiny("causal", 1)),
        lambda: Autoregressive().check(tiny()),
    ],
)
def test_what_does_not_fit_is_refused(make) -> None:
    with pytest.raises(ObjectiveError, match="Write"):
        make()
