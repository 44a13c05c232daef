"""How a D2F step is computed must not change it: chunks, checkpoints, half-precision weights; and what is refused.

Tiles and compiled layers: tests/compile/test_training.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dllm_toolkit.models.transformer import Transformer, transformer
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.forward import Forward, ForwardError
from dllm_toolkit.training.lora import Lora, inject
from dllm_toolkit.training.objectives import D2FDistillation

BATCH = Batch(torch.randint(0, 59, (3, 40), generator=torch.Generator().manual_seed(0)), torch.tensor([4, 6, 12]), 24)


def student(dtype: torch.dtype = torch.float64, **settings: Any) -> Transformer:
    """An adapter that does something: PEFT starts with B = 0."""
    model = transformer(
        vocab_size=61, mask_id=60, eos_ids=[59], pad_id=59, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, max_positions=64, seed=1,
        **settings,
    ).to(dtype)  # fmt: skip
    torch.manual_seed(0)  # PEFT draws A
    inject(model, Lora(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def step(model: Transformer, objective: D2FDistillation) -> tuple[dict[str, float], torch.Tensor]:
    loss = objective(model, BATCH, torch.Generator().manual_seed(1))
    loss.value.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return {"loss": float(loss.value.detach()), **{name: float(value) for name, value in loss.metrics.items()}}, torch.cat(gradients)


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
    model = transformer(vocab_size=61, mask_id=60, eos_ids=[59], pad_id=59, width=32, layers=1, heads=2, max_positions=64)
    with pytest.raises(ForwardError, match="without lm_head"):
        step(inject(model, Lora(targets=("lm_head",))), D2FDistillation(block_length=8))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", ["none", "selective", "layers"])
def test_compiled_tiles_give_the_dense_step_on_a_gpu(checkpoint: Any) -> None:
    batch = Batch(BATCH.tokens.cuda(), BATCH.prompt_length.cuda(), BATCH.answer_length)
    found = []
    for objective in (
        D2FDistillation(block_length=8),
        D2FDistillation(block_length=8, forward=Forward(checkpoint=checkpoint, chunk=16)).compiled(),
    ):
        model = student(torch.float32).cuda()
        loss = objective(model, batch, torch.Generator("cuda").manual_seed(1)).value
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, gradient), (other, second) = found
    assert torch.allclose(loss, other, rtol=1e-4) and float((gradient - second).norm() / gradient.norm()) < 1e-2
