"""How a step is computed must not change it: chunks, checkpoints, half-precision weights; and what is refused.

Tiles and compiled layers: tests/compile/test_training.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_toolkit.models.transformer import Transformer, transformer
from dllm_toolkit.testing.layouts import read_logits
from dllm_toolkit.training.composed import Composed, repeated
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.forward import Forward, ForwardError
from dllm_toolkit.training.lora import Lora, adapter_off, inject
from dllm_toolkit.training.methods.block_diffusion import BlockDiffusion
from dllm_toolkit.training.methods.d3llm import PseudoTrajectory
from dllm_toolkit.training.methods.diffullama import Adaptation
from dllm_toolkit.training.methods.dscd import DSCD
from dllm_toolkit.training.objectives import D2FDistillation, MaskedDiffusion, full_allow, normalise
from dllm_toolkit.training.terms import Selected, teacher_gap

BATCH = Batch(torch.randint(0, 59, (3, 40), generator=torch.Generator().manual_seed(0)), torch.tensor([4, 6, 12]), 24)


def student(dtype: torch.dtype = torch.float64, **settings: Any) -> Transformer:
    """An adapter that does something: PEFT starts with B = 0."""
    sizes: dict[str, Any] = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48, "max_positions": 64} | settings
    model = transformer(vocab_size=61, mask_id=60, eos_ids=[59], pad_id=59, seed=1, **sizes).to(dtype)
    torch.manual_seed(0)  # PEFT draws A
    inject(model, Lora(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def step(model: Transformer, objective: D2FDistillation | Composed) -> tuple[dict[str, float], torch.Tensor]:
    loss = objective(model, BATCH, torch.Generator().manual_seed(1), progress=0.5)
    loss.value.backward()
    return {"loss": float(loss.value.detach()), **{name: float(value) for name, value in loss.metrics.items()}}, gradient_of(model)


def gradient_of(model: Transformer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def by_definition(model: Transformer, objective: Composed) -> tuple[dict[str, float], torch.Tensor]:
    """`step` of a sum of terms with the logits of every position, each copy's terms on the whole grid."""
    view, count = objective.show(BATCH, model.spec, torch.Generator().manual_seed(1), 0.5), len(BATCH.tokens)
    logits, told = read_logits(model, view.seen), None
    if objective.needs_teacher:
        with torch.no_grad(), adapter_off(model):
            told = model.logits(view.hint, full_allow(repeated(BATCH, objective.copies)))
    loss, found = torch.zeros(()), {}
    for term, share in zip(objective.terms, view.shares, strict=True):
        found[term.name] = torch.zeros(())
        for start in range(0, count if term.first_only else len(view.tokens), count):
            part = slice(start, start + count)
            selected = Selected(BATCH.tokens, view.weight[part], None if told is None else told[part], view.teacher_weight[part])
            found[term.name] = found[term.name] + normalise(*term(logits[part], selected), BATCH.answer, term.normaliser)
        loss = loss + share * found[term.name]
    target, supervised = repeated(BATCH, objective.copies).tokens, view.weight > 0
    found["masked_accuracy"] = ((logits.argmax(-1) == target) & supervised).sum() / supervised.sum()
    if told is not None:
        counted = view.teacher_weight > 0
        gap, agree = teacher_gap(logits, Selected(target, view.weight, told), 1.0)
        found |= {"kl": gap[counted].mean(), "teacher_agreement": agree[counted].double().mean()}
    loss.backward()
    return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in found.items()}}, gradient_of(model)


SUMS = [
    DSCD(revealed="exclude"),
    PseudoTrajectory((4, 8), order="random"),
    BlockDiffusion(8, complementary=True, certainty=2.0),
    Adaptation(anneal=0.9),
]


@pytest.mark.parametrize("objective", SUMS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("shift", [0, 1])
def test_a_sum_of_terms_asks_for_the_logits_that_count_alone(objective: Composed, shift: int) -> None:
    expected = by_definition(student(shift=shift), objective)
    for forward in (Forward(checkpoint="layers", chunk=16), Forward(checkpoint="selective", chunk=400)):
        model, asked = student(shift=shift), []
        model.lm_head.register_forward_hook(lambda _, given, result, asked=asked: asked.append(len(given[0])))
        values, gradient = step(model, replace(objective, forward=forward))
        assert values == pytest.approx(expected[0], rel=1e-6) and torch.allclose(gradient, expected[1], rtol=1e-6, atol=1e-9)
        # A chunk at a time, and twice where there are several; else in quarters of one. The teacher's are kept.
        assert max(asked[objective.needs_teacher :]) <= (16 if forward.chunk == 16 else 200)


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl", "temperature": 2.0}, {"self_align": False}], ids=str)
def test_chunks_and_checkpoints_change_nothing(options: dict[str, Any]) -> None:
    shift = int(bool(options))
    expected = step(student(shift=shift), D2FDistillation(block_length=8, **options))
    for forward in (Forward(checkpoint="layers", chunk=7), Forward(checkpoint="selective")):
        values, gradient = step(student(shift=shift), D2FDistillation(block_length=8, forward=forward, **options))
        assert values == pytest.approx(expected[0], rel=1e-12)
        assert torch.allclose(gradient, expected[1], atol=1e-12)


def test_rows_are_the_wanted_ones_in_whole_chunks() -> None:
    model, wanted = student(), torch.zeros(3, 40, dtype=torch.bool)
    wanted[1, 3:9] = wanted[2, 39] = True
    flat = [*range(43, 49), 119]
    for chunk, count in ((7, 7), (4, 8), (3, 9), (100, 100)):
        rows = Forward(chunk=chunk).rows(model, wanted)
        assert rows[:7].tolist() == flat and len(rows) == len(set(rows.tolist())) == count
    assert Forward(chunk=120).rows(model, wanted).tolist() == list(range(120))
    assert len(Forward(chunk=5).rows(model, torch.zeros_like(wanted))) == 5  # a loss of nothing is 0, with a gradient


def test_frozen_weights_in_bfloat16_leave_the_adapter_in_float32() -> None:
    exact, _ = step(student(torch.float32), D2FDistillation(block_length=8))
    model = student(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        values, gradient = step(model, D2FDistillation(block_length=8, forward=Forward(checkpoint="selective")))
    assert values["loss"] == pytest.approx(exact["loss"], rel=5e-3) and gradient.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ForwardError, match="Write chunk"):
        Forward(chunk=0)
    with pytest.raises(ForwardError, match="Write attention"):
        step(student(), D2FDistillation(forward=Forward(attention="flex")))
    with pytest.raises(ForwardError, match="16 dimensions.*heads of 8"):
        Forward(attention="flex")._flex(student(), torch.device("cuda"))
    assert not Forward(compile=True)._flex(student(), torch.device("cuda"))
    with torch.no_grad(), pytest.raises(ForwardError, match="doubled row"):
        BlockDiffusion(8, forward=Forward(attention="flex"))(student(), BATCH, torch.Generator())
    model = transformer(vocab_size=61, mask_id=60, eos_ids=[59], pad_id=59, width=32, layers=1, heads=2, max_positions=64)
    with pytest.raises(ForwardError, match="without lm_head"):
        step(inject(model, Lora(targets=("lm_head",))), D2FDistillation(block_length=8))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 64])  # heads of 8, which tiles do not take, and of 16
@pytest.mark.parametrize("checkpoint", ["none", "selective", "layers"])
@pytest.mark.parametrize(
    "plain", [D2FDistillation(block_length=8), DSCD(), BlockDiffusion(8), MaskedDiffusion()], ids=lambda one: type(one).__name__
)
def test_compiled_tiles_give_the_dense_step_on_a_gpu(plain: D2FDistillation | Composed, checkpoint: Any, width: int) -> None:
    batch = Batch(BATCH.tokens.cuda(), BATCH.prompt_length.cuda(), BATCH.answer_length)
    found = []
    for objective in (plain, replace(plain, forward=Forward(checkpoint=checkpoint, chunk=16)).compiled()):
        model = student(torch.float32, width=width).cuda()
        loss = objective(model, batch, torch.Generator("cuda").manual_seed(1)).value
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, gradient), (other, second) = found
    assert torch.allclose(loss, other, rtol=1e-4) and float((gradient - second).norm() / gradient.norm()) < 1e-2
