"""DEER's drafter: what is masked, what counts and how much, and that a row is what the drafter sees when it drafts."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_toolkit.models.transformer import transformer
from dllm_toolkit.testing.layouts import read_logits
from dllm_toolkit.training.composed import Shown
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import Full
from dllm_toolkit.training.methods.deer import Continuation, deer_refinement
from dllm_toolkit.training.objectives import ObjectiveError
from dllm_toolkit.types import ModelSpec

EOS, SEPARATOR, MASK, ANSWER = 9, 8, 10, 12
STAGES = [Continuation(SEPARATOR), deer_refinement(SEPARATOR, longest=5), deer_refinement(longest=30)]


def tiny(shift: int = 0):
    sizes = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 32}
    return transformer(vocab_size=11, mask_id=MASK, eos_ids=[EOS], pad_id=0, seed=1, shift=shift, **sizes).double()


SPEC: ModelSpec = tiny().spec


def rows() -> Batch:
    """Eight rows; texts of every second one end after 7 tokens, and end-of-text fills them up."""
    tokens = torch.randint(1, 8, (8, 20), generator=seeded())
    batch = Batch(tokens, torch.tensor([4, 6, 8, 5] * 2), ANSWER)
    behind = torch.arange(20) >= batch.prompt_length.unsqueeze(1) + torch.tensor([7, ANSWER] * 4).unsqueeze(1)
    return batch._replace(tokens=tokens.masked_fill(behind & batch.answer, EOS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut_of(view: Shown, batch: Batch, row: int, separated: bool) -> int:
    """Where the run of a row ends: everybody sees what is before it, and the separator if there is one and room for it."""
    seen = int(view.seen.allow[row, 0].sum())
    assert torch.equal(view.seen.allow[row, :seen], (torch.arange(20) < seen).expand(seen, 20))
    at_end = view.seen.tokens[row, seen - 1] == SEPARATOR
    assert bool(at_end) == separated or seen == int(batch.prompt_length[row]) + ANSWER
    return seen - int(at_end)


@pytest.mark.parametrize("objective", STAGES, ids=["continuation", "refinement", "no separator"])
def test_a_run_is_masked_behind_a_clean_prefix_and_nothing_is_behind_it(objective) -> None:
    batch, runs = rows(), set()
    for seed in range(20):
        view = objective.show(batch, SPEC, seeded(seed), 0.0)
        for row in range(8):
            begin, cut = int(batch.prompt_length[row]), cut_of(view, batch, row, objective.separator is not None)
            shown, tokens, weight = view.seen.tokens[row], batch.tokens[row], view.weight[row]
            hidden = (shown[:cut] == MASK).nonzero().flatten()
            text = tokens[begin : begin + ANSWER].tolist()
            end = begin + (text.index(EOS) + 1 if EOS in text else ANSWER)  # one past the first end of text
            assert torch.equal(shown[:cut][shown[:cut] != MASK], tokens[:cut][shown[:cut] != MASK])
            counted = weight.nonzero().flatten()
            assert torch.equal(counted, hidden[hidden < end])
            if objective.minimum < 1:  # stage 1: one rate for the row
                assert len(counted) == 0 or bool((weight[counted] == weight[counted[0]]).all()) and weight[counted[0]] >= 1
                continue
            first, length = int(hidden[0]), len(hidden)
            assert begin <= first < end and hidden.tolist() == list(range(first, cut)) and length <= objective.longest
            assert torch.allclose(weight[counted].double(), objective.base ** (length - 1 - torch.arange(len(counted))).double(), rtol=1e-5)
            runs.add(length)
    assert objective.minimum < 1 or runs == set(range(1, min(objective.longest, ANSWER) + 1))


def test_the_published_weights() -> None:
    """I11: R = 96 gives the first token 2.5735 times the weight of the last at 1.01, 6.562 at 1.02, and 103 at 1.05."""
    batch = Batch(torch.full((400, 400), 3), torch.zeros(400, dtype=torch.long), 400)
    for base, expected in ((1.01, 2.5735), (1.02, 6.562), (1.05, 103.0)):
        (copy,) = deer_refinement(base=base).noise(batch, SPEC, seeded(), 0.0)
        length = (copy.weight > 0).sum(1)
        assert int(length.max()) == 96
        assert copy.weight[length == 96].amax(1).tolist() == pytest.approx([expected] * int((length == 96).sum()), rel=1e-3)
        assert (copy.weight.masked_fill(copy.weight == 0, 1.0).amin(1) == 1).all()
    far = batch._replace(prompt_length=torch.full((400,), 390), answer_length=10)
    assert deer_refinement(base=2.0).noise(far, SPEC, seeded(), 0.0)[0].weight.isfinite().all()  # nothing overflows far from the run


@pytest.mark.parametrize("objective", STAGES, ids=["continuation", "refinement", "no separator"])
def test_the_gradient_of_a_position_is_its_weight(objective) -> None:
    """Uniform predictions: the gradient of a position's logits has the size of its weight, and is 0 where nothing counts."""
    batch, model, asked = rows(), tiny(), []
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.register_forward_hook(lambda module, given, logits: (logits.retain_grad(), asked.append(logits))[0])
    view = objective.show(batch, SPEC, seeded(2), 0.0)
    objective.loss(model, batch, view).value.backward()
    size = torch.cat([logits.grad.flatten(0, -2).norm(dim=-1) for logits in asked]) / math.sqrt((10 / 11) ** 2 + 10 / 11**2) * 8 * ANSWER
    assert torch.allclose(size[size > 0].sort()[0], view.weight[view.weight > 0].double().sort()[0], rtol=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_equal_weights_and_full_masks_are_plain_loss_on_rows_that_end_there(shift) -> None:
    """Stage 2 with a = 1 is stage 1 with t = 1, and both are the cross-entropy of a suffix: each row cut and given to the model alone."""
    batch, model, objective = rows(), tiny(shift), deer_refinement(SEPARATOR, longest=6, base=1.0)
    loss = float(objective(model, batch, seeded(3)).value.detach())
    assert loss == float(Continuation(SEPARATOR, longest=6, minimum=1.0)(model, batch, seeded(3)).value.detach())
    view, total = objective.show(batch, model.spec, seeded(3), 1.0), 0.0
    for row in range(8):
        size, begin = int(view.seen.allow[row, 0].sum()), int(batch.prompt_length[row])
        short = Batch(view.seen.tokens[row : row + 1, :size], batch.prompt_length[row : row + 1], size - begin)
        logits = read_logits(model, Full()(short, short.tokens, shift, seeded())).log_softmax(-1)[0]
        counted = (view.weight[row] > 0).nonzero().flatten()
        total -= float(logits[counted, batch.tokens[row, counted]].sum().detach())
    assert loss == pytest.approx(total / (8 * ANSWER), abs=1e-6)


def test_stage_2_is_the_loss_of_dflash_without_features() -> None:
    """R13: divided by the sum of a row's weights they are exp(-(k - 1) / gamma) with a = exp(1 / gamma); gamma infinite is a = 1."""
    batch = Batch(torch.full((16, 20), 3), torch.full((16,), 4), 16)
    for gamma in (7.0, math.inf):
        (copy,) = deer_refinement(longest=9, base=math.exp(1 / gamma)).noise(batch, SPEC, seeded(), 0.0)
        for weight in copy.weight:
            found = weight[weight > 0].double()
            expected = torch.exp(-torch.arange(len(found), dtype=torch.float64) / gamma)
            assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Continuation(base=0.0).check(tiny()),
        lambda: deer_refinement(longest=-1).check(tiny()),
        lambda: Continuation(MASK).check(tiny()),
        lambda: Continuation(EOS).check(tiny()),
        lambda: Continuation(11).check(tiny()),
    ],
)
def test_what_does_not_fit_is_refused(make) -> None:
    with pytest.raises(ObjectiveError, match="Write"):
        make()
