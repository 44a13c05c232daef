"""LoRA adapters of real checkpoints: merged, or beside the weights for further training; names that match nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_toolkit.models.load import CheckpointError, load
from dllm_toolkit.models.transformer import ModelError
from dllm_toolkit.training.lora import adapter_off, save_adapter

VECTORS = Path(__file__).parents[1] / "golden" / "vectors"
TOKENS = torch.arange(30).view(2, 15)
pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_beside_the_weights_it_computes_what_the_merged_one_does(kind: str) -> None:
    path, adapter = str(VECTORS / f"{kind}-tiny"), str(VECTORS / f"lora-{kind}-tiny")
    apart, merged, base = load(path, adapter=adapter, merge_adapter=False), load(path, adapter=adapter), load(path)
    assert (apart.logits(TOKENS) - merged.logits(TOKENS)).abs().max() < 2e-3
    assert (merged.logits(TOKENS) - base.logits(TOKENS)).abs().max() > 0.1
    with adapter_off(apart):
        assert torch.equal(apart.logits(TOKENS), base.logits(TOKENS))
    trainable = {name for name, weight in apart.named_parameters() if weight.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)


def test_training_goes_on_and_the_directory_comes_back(tmp_path: Path) -> None:
    path, adapter = str(VECTORS / "llada-tiny"), str(VECTORS / "lora-llada-tiny")
    model = load(path, adapter=adapter, merge_adapter=False)
    model.logits(TOKENS).logsumexp(-1).mean().backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                assert "lora_" in name
                weight -= 0.05 * weight.grad / weight.grad.norm()
    save_adapter(model, tmp_path / "adapter", attention="block_causal", block_size=8)
    again = load(path, adapter=str(tmp_path / "adapter"))
    assert (again.spec.attention, again.spec.block_size) == ("block_causal", 8)
    assert (again.with_attention("full").logits(TOKENS) - model.logits(TOKENS)).abs().max() < 2e-3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    # And once more, apart.
    third = load(path, adapter=str(tmp_path / "adapter"), merge_adapter=False)
    assert torch.equal(third.logits(TOKENS, torch.ones(1, 15, 15, dtype=torch.bool)), model.logits(TOKENS))


def test_a_model_with_a_loose_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    model = load(str(VECTORS / "dream-tiny"), adapter=str(VECTORS / "lora-dream-tiny"), merge_adapter=False)
    with pytest.raises(ModelError, match="carries an adapter that is not merged"):
        model.save_pretrained(tmp_path)


def copy(tmp_path: Path, **changes: Any) -> str:
    shutil.copytree(VECTORS / "lora-llada-tiny", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(tmp_path / "adapter")


def test_a_target_name_that_matches_nothing_lists_the_names_that_exist(tmp_path: Path) -> None:
    adapter = copy(tmp_path, target_modules=["q_proj", "out_proj"])
    message = r"target_modules match nothing in the model, got \['out_proj'\].*Modules here: attn_out, .*ff_proj.*q_proj"
    with pytest.raises(CheckpointError, match=message):
        load(str(VECTORS / "llada-tiny"), adapter=adapter)


def test_an_adapter_of_another_family() -> None:
    with pytest.raises(CheckpointError, match=r"got \['attn_out'\]. It belongs to another base model. Modules here: down_proj"):
        load(str(VECTORS / "dream-tiny"), adapter=str(VECTORS / "lora-llada-tiny"))
    with pytest.raises(CheckpointError, match="the adapter's module 'model.layers.0.self_attn.k_proj' .* matches nothing"):
        load(str(VECTORS / "llada-tiny"), adapter=str(VECTORS / "lora-dream-tiny"))


def test_mixed_scales_cannot_be_trained_on(tmp_path: Path) -> None:
    adapter = copy(tmp_path, alpha_pattern={"q_proj": 64})
    with pytest.raises(CheckpointError, match="mixes ranks or scales"):
        load(str(VECTORS / "llada-tiny"), adapter=adapter, merge_adapter=False)
    assert load(str(VECTORS / "llada-tiny"), adapter=adapter).spec.layers == 3


def test_the_adapter_is_checked_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dllm_toolkit.models.load as module

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(module, "read_into", refuse)
    with pytest.raises(CheckpointError, match="match nothing"):
        load(str(VECTORS / "llada-tiny"), adapter=copy(tmp_path, target_modules=["nothing"]))
