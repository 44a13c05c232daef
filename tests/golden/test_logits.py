"""Recorded logits of both layouts: full, padded, block-causal, cached attention, with a merged adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dllm_toolkit.testing import golden, golden_logits
from dllm_toolkit.testing.golden_plan import checkpoint

FOLDER = golden.SHIPPED / "logits"
CHECKPOINTS = {"llada_logits": "llada-tiny", "dream_logits": "dream-tiny"}


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_every_entry(file: str) -> None:
    path = FOLDER / f"{file}.json"
    found = list(golden_logits.errors(path, lambda name, adapter: checkpoint(golden.SHIPPED, name, adapter)))
    assert len(found) == len(golden_logits.entries(path)) == 14
    assert [(name, error) for name, error, tolerance in found if not error < tolerance] == []


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_dense_logits_are_aligned(file: str) -> None:
    """`Transformer.logits` gives the recorded rows at the position that each speaks of: Dream's one further on."""
    model = checkpoint(golden.SHIPPED, CHECKPOINTS[file])
    official = load_file(str(FOLDER / f"{file}.safetensors"))["full_no_mask"]
    entry = next(one for one in golden_logits.entries(FOLDER / f"{file}.json") if one["name"] == "full_no_mask")
    with torch.inference_mode():
        ours = model.logits(torch.tensor(entry["input_ids"]))
    shift = model.spec.shift
    gap = (ours[:, shift:] - official[:, : official.shape[1] - shift]).abs().max()
    assert gap.item() < golden_logits.TOLERANCE
