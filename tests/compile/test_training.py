"""A compiled step: one graph for all layers of the teacher, one for the student's, whatever the prompts, and one for the terms of a sum."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from dllm_toolkit.models.transformer import transformer
from dllm_toolkit.training import forward
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import canvas_blocks
from dllm_toolkit.training.lora import Lora, inject
from dllm_toolkit.training.methods.d3llm import PseudoTrajectory
from dllm_toolkit.training.methods.dscd import DSCD
from dllm_toolkit.training.objectives import D2FDistillation, full_blocks


def test_layers_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    layer = torch.compile(forward._layer, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(forward, "_compiled_layer", lambda: layer)
    monkeypatch.setattr("dllm_toolkit.ops.vocabulary._compiled", lambda: lambda *given: _rule(*given))
    from dllm_toolkit.ops.vocabulary import _rule

    model = transformer(vocab_size=31, mask_id=30, eos_ids=[29], pad_id=29, width=16, layers=3, heads=2, mlp_width=24, max_positions=32)
    inject(model, Lora(rank=2, dropout=0.1)).double().train()
    tokens = torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = D2FDistillation(block_length=4, forward=forward.Forward(chunk=8))
    compiled = plain.compiled()
    tiles = forward.Forward(attention="flex", compile=True)
    for prompts in ([4, 6], [8, 5]):
        batch = Batch(tokens, torch.tensor(prompts), 12)
        values = []
        for objective in (plain, compiled):
            torch.manual_seed(3)
            loss = objective(model, batch, torch.Generator().manual_seed(1)).value
            loss.backward()
            values.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
            model.zero_grad()
        assert all(torch.allclose(mine, theirs, atol=1e-12) for mine, theirs in zip(*values, strict=True))
        with torch.no_grad():
            for block in (full_blocks(batch), canvas_blocks(batch, 4)):
                hidden = tiles.hidden(model.eval(), tokens, block)
                assert torch.allclose(hidden, forward.Forward().hidden(model, tokens, block), atol=1e-12)
        model.train()
    assert counters["stats"]["unique_graphs"] == 3  # teacher, student, and the teacher's over tiles
    torch._dynamo.reset()


def test_a_sum_of_terms_shares_its_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of teacher and student, and the terms of a chunk, which are computed again for the backward pass."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    layer = torch.compile(forward._layer, dynamic=False)
    monkeypatch.setattr(forward, "_compiled_layer", lambda: layer)
    model = transformer(vocab_size=31, mask_id=30, eos_ids=[29], pad_id=29, width=16, layers=3, heads=2, mlp_width=24, max_positions=32)
    inject(model, Lora(rank=2, dropout=0.1)).double().train()
    tokens = torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = DSCD(forward=forward.Forward(chunk=8))
    compiled = plain.compiled()
    for prompts, progress in (([4, 6], 0.0), ([8, 5], 0.7)):
        values = []
        for run in (plain, compiled):
            torch.manual_seed(3)
            loss = run(model, Batch(tokens, torch.tensor(prompts), 12), torch.Generator().manual_seed(1), progress=progress).value
            loss.backward()
            values.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
            model.zero_grad()
        assert all(torch.allclose(mine, theirs, atol=1e-12) for mine, theirs in zip(*values, strict=True))
    assert counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()


def test_a_sum_of_terms_is_one_graph_at_every_point_of_the_run() -> None:
    """Block length, ratio and shares change over the run; the graph does not."""
    torch._dynamo.reset()
    counters.clear()
    model = transformer(vocab_size=31, mask_id=30, eos_ids=[29], pad_id=29, width=16, layers=1, heads=2, mlp_width=24, max_positions=32)
    tokens = torch.randint(0, 29, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.tensor([4, 6]), 12, torch.arange(24).expand(2, 24))
    objective = PseudoTrajectory((2, 6))
    compiled = torch.compile(objective.loss, backend="eager", fullgraph=True, dynamic=False)
    for progress in (0.0, 0.5, 1.0):
        view = objective.show(batch, model.spec, torch.Generator().manual_seed(1), progress)
        assert torch.allclose(compiled(model, batch, view).value, objective.loss(model, batch, view).value)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
