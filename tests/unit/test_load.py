"""Saving and loading: round trips, shards, adapters, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_toolkit.data.stories import build_tokenizer
from dllm_toolkit.models.load import CheckpointError, load
from dllm_toolkit.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=29, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, mask_id=28, eos_ids=(27,), pad_id=26, max_positions=64
)
TARGETS = {"q_proj": (32, 32), "v_proj": (32, 16)}  # inputs, outputs


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local checkpoint never needs the network."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a local load must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def build(**changes: Any) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return Transformer(replace(CONFIG, **changes)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A PEFT LoRA directory for the saved model: alpha 6, rank 2."""
    return write_adapter(tmp_path / "adapter", lambda layer, name: f"layers.{layer}.{name}")


def write_adapter(directory: Path, module: Callable[[int, str], str], **config: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, (inputs, outputs) in TARGETS.items():
            path = f"base_model.model.{module(layer, name)}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, inputs, generator=generator, dtype=torch.float32)
            tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator, dtype=torch.float32)
    directory.mkdir()
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "target_modules": list(TARGETS), **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def same_weights(one: Transformer, other: Transformer) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_round_trip(saved: Path) -> None:
    model = load(str(saved))
    assert same_weights(model, build())
    assert model.config == CONFIG
    assert model.tokenizer is None
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"qkv_bias": True},
        {"attention": "causal", "shift": 1},
        {"attention": "block_causal", "block_size": 4},
        {"kv_heads": 4, "head_dim": 16},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_round_trip_of_every_switch(tmp_path: Path, changes: dict[str, Any]) -> None:
    original = build(**changes)
    original.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert model.config == original.config
    assert same_weights(model, original)
    tokens = torch.arange(9).unsqueeze(0)
    assert torch.equal(model.logits(tokens), original.logits(tokens))
    assert (model.lm_head.weight is model.embed.weight) == original.config.tie_embeddings


def test_dtypes(tmp_path: Path) -> None:
    original = build()
    original.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(str(tmp_path / "model.safetensors")).values()} == {torch.bfloat16}
    assert original.dtype == torch.float32
    wide = load(str(tmp_path))
    assert wide.dtype == torch.float32
    assert torch.equal(wide.embed.weight, original.embed.weight.bfloat16().float())
    assert load(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
    assert load(str(tmp_path), dtype="bfloat16").cos.dtype == torch.float32
    assert load(str(tmp_path), dtype="float64").cos.dtype == torch.float64


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = build(vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, eos_ids=(tokenizer.eos_token_id,))
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path)
    again = load(str(tmp_path)).tokenizer
    assert again is not None
    text = "Tom has 12 apples."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.mask_token_id, again.eos_token_id) == (tokenizer.mask_token_id, tokenizer.eos_token_id)


def test_another_attention_rule(saved: Path) -> None:
    model = load(str(saved), attention="block_causal", block_size=8)
    assert (model.spec.attention, model.spec.block_size) == ("block_causal", 8)


def shard(directory: Path) -> list[str]:
    """Split model.safetensors in two, with the index that transformers writes."""
    tensors = load_file(str(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, str(directory / file))
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(files)


def test_shards(saved: Path) -> None:
    shard(saved)
    assert same_weights(load(str(saved)), build())


def test_adapter_is_merged(saved: Path, adapter: Path) -> None:
    merged, base = load(str(saved), adapter=str(adapter)), build()
    halves = load_file(str(adapter / "adapter_model.safetensors"))
    for layer in range(2):
        for name in TARGETS:
            path = f"base_model.model.layers.{layer}.{name}"
            delta = halves[f"{path}.lora_B.weight"] @ halves[f"{path}.lora_A.weight"] * (6 / 2)
            expected = getattr(base.layers[layer], name).weight + delta
            torch.testing.assert_close(getattr(merged.layers[layer], name).weight, expected)
    assert torch.equal(merged.layers[0].k_proj.weight, base.layers[0].k_proj.weight)
    assert merged.spec.attention == "full"


def test_an_adapter_brings_its_attention_rule(saved: Path, adapter: Path) -> None:
    (adapter / "student.json").write_text(json.dumps({"attention": "block_causal", "block_size": 16}))
    model = load(str(saved), adapter=str(adapter))
    assert (model.spec.attention, model.spec.block_size) == ("block_causal", 16)
    other = load(str(saved), adapter=str(adapter), block_size=4)
    assert (other.spec.attention, other.spec.block_size) == ("block_causal", 4)


def test_rank_stabilised_adapter(saved: Path, tmp_path: Path) -> None:
    stable = write_adapter(tmp_path / "stable", lambda layer, name: f"layers.{layer}.{name}", use_rslora=True)
    plain = write_adapter(tmp_path / "plain", lambda layer, name: f"layers.{layer}.{name}", lora_alpha=6 * 2**0.5)
    one, other = (load(str(saved), adapter=str(path)) for path in (stable, plain))
    torch.testing.assert_close(one.layers[0].q_proj.weight, other.layers[0].q_proj.weight)


# --- what can be wrong ---------------------------------------------------------------------------------------------------------------


def refused(message: str, path: Path | str, **arguments: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(str(path), **arguments)


def test_no_such_directory(tmp_path: Path) -> None:
    refused("no checkpoint directory at .*nowhere", tmp_path / "nowhere")
    refused("no checkpoint directory at './nowhere/here'", "./nowhere/here")


def test_no_such_shipped_model() -> None:
    refused("no shipped model is called 'asset:nothing'. Shipped: ", "asset:nothing")


def test_an_asset_name_is_no_path() -> None:
    refused("no shipped model is called 'asset:../models'", "asset:../models")


def test_missing_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    refused("config.json is missing", saved)


def test_damaged_config(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "dllm_toolkit", ')
    refused("config.json is not valid JSON", saved)
    (saved / "config.json").write_text("[1, 2]")
    refused("must hold a JSON object, got list", saved)
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    refused("config.json is not valid JSON", saved)


def test_unknown_model_type(saved: Path) -> None:
    edit_json(saved / "config.json", model_type="gpt2")
    refused("unknown model_type 'gpt2' in config.json; known: dllm_toolkit, llada", saved)


def test_incomplete_config(saved: Path) -> None:
    edit_json(saved / "config.json", mask_id=None)
    refused("config.json lacks mask_id", saved)


@pytest.mark.parametrize(
    "changes",
    [{"layers": "two"}, {"heads": "four"}, {"mlp_width": -4}, {"kv_heads": 3}, {"mask_id": 99}, {"vocab_size": -1}, {"eos_ids": 3}],
    ids=str,
)
def test_config_that_cannot_be_built(saved: Path, changes: dict[str, Any]) -> None:
    edit_json(saved / "config.json", **changes)
    refused("config.json describes no model that can be built, got: ", saved)


def test_config_of_another_size(saved: Path) -> None:
    edit_json(saved / "config.json", mlp_width=64)
    refused(r"down_proj.weight has shape \(32, 48\), config.json asks for \(32, 64\)", saved)


def test_config_of_another_depth(saved: Path) -> None:
    edit_json(saved / "config.json", layers=3)
    refused(r"does not fit its config.json, got 0 unknown tensors .* and 9 missing ones \(layers.2.attention_norm.weight", saved)
    edit_json(saved / "config.json", layers=1)
    refused("got 9 unknown tensors", saved)


def test_truncated_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("model.safetensors is damaged", saved)
    file.write_bytes(b"")
    refused("model.safetensors is damaged", saved)


def test_pickled_weights_are_never_read(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    trap = saved.parent / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trap,))

    torch.save({"embed.weight": Trap()}, saved / "pytorch_model.bin")
    refused(r"model.safetensors is missing. .*pickled weights are never read", saved)
    shutil.move(saved / "pytorch_model.bin", saved / "model.safetensors")
    refused("model.safetensors is damaged", saved)
    assert not trap.exists()


def test_missing_shard(saved: Path) -> None:
    (saved / shard(saved)[1]).unlink()
    refused("model-00002-of-00002.safetensors is missing", saved)


def test_damaged_index(saved: Path) -> None:
    shard(saved)
    for names in (["model.safetensors"], {"embed.weight": "../model.safetensors"}, {"embed.weight": 3}, None):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        refused("model.safetensors.index.json must map tensors to file names beside it", saved)


def test_adapter_of_another_model(saved: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", lambda layer, name: f"model.layers.{layer}.self_attn.{name}")
    refused("the adapter's module 'model.layers.0.self_attn.q_proj' .* matches nothing in the model", saved, adapter=str(other))


def test_adapter_of_another_size(saved: Path, adapter: Path) -> None:
    file = str(adapter / "adapter_model.safetensors")
    tensors = load_file(file)
    tensors["base_model.model.layers.0.q_proj.lora_A.weight"] = torch.zeros(2, 64)
    save_file(tensors, file)
    refused(r"the adapter's layers.0.q_proj has shape 32 x 64, the model's \(32, 32\)", saved, adapter=str(adapter))


def test_half_an_adapter(saved: Path, adapter: Path) -> None:
    file = str(adapter / "adapter_model.safetensors")
    tensors = load_file(file)
    del tensors["base_model.model.layers.0.q_proj.lora_A.weight"]
    save_file(tensors, file)
    refused(r"the adapter's module 'layers.0.q_proj' \(lora_B\)", saved, adapter=str(adapter))


def test_empty_adapter(saved: Path, adapter: Path) -> None:
    save_file({}, str(adapter / "adapter_model.safetensors"))
    refused("holds no LoRA tensors", saved, adapter=str(adapter))


@pytest.mark.parametrize("changes", [{"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["embed"]}], ids=str)
def test_adapters_that_cannot_be_merged(saved: Path, adapter: Path, changes: dict[str, Any]) -> None:
    edit_json(adapter / "adapter_config.json", **changes)
    refused("is no plain LoRA adapter", saved, adapter=str(adapter))


def test_missing_adapter(saved: Path, tmp_path: Path) -> None:
    refused("no checkpoint directory", saved, adapter=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused("adapter_config.json is missing", saved, adapter=str(tmp_path / "empty"))
