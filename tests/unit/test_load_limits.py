"""Devices, dtypes, memory, offline hubs, quantised files and GGUF: what load says before any work is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_toolkit.models import gguf, hub, memory, weights
from dllm_toolkit.models.load import CheckpointError, load
from dllm_toolkit.models.weights import read, read_into, stored_tensors
from tests.unit.test_load import build, edit_json, refused, same_weights, shard


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_dtype_auto_is_the_stored_one(saved: Path) -> None:
    assert load(str(saved), dtype="auto").dtype == torch.float32
    build().save_pretrained(saved, dtype=torch.bfloat16)
    assert load(str(saved), dtype="auto").dtype == torch.bfloat16
    assert load(str(saved)).dtype == torch.float32


def test_pieces_smaller_than_tensors_and_threads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are read in many pieces by many threads, with and without a cast, arrive whole."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 96)
    assert same_weights(load(str(saved)), build())
    assert same_weights(load(str(saved), dtype="float64"), build().double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_through_page_locked_buffers(saved: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 96)
    on_device = load(str(saved), dtype=dtype, device="cuda")
    assert on_device.device.type == "cuda"
    assert same_weights(on_device.cpu(), load(str(saved), dtype=dtype))


def test_reading_one_tensor(saved: Path) -> None:
    stored = stored_tensors(saved)
    expected = load_file(str(saved / "model.safetensors"))
    assert stored.keys() == expected.keys()
    assert torch.equal(read(stored["embed.weight"]), expected["embed.weight"])
    assert all(entry.size == 4 * math.prod(entry.shape) for entry in stored.values())


def test_a_file_that_shrinks_while_it_is_read(saved: Path) -> None:
    stored = stored_tensors(saved)["norm.weight"]
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[: stored.begin + 3])
    with pytest.raises(CheckpointError, match="ended early while it was being read"):
        read_into([(stored, torch.empty(stored.shape))])


def test_nothing_is_allocated_for_a_model_that_does_not_fit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = memory.required_memory(build(), torch.float32)
    monkeypatch.setattr(memory, "free_memory", lambda device: need - 1)
    refused(r"not enough memory: the model needs .* in float32, cpu has .* free.*Write dtype: bfloat16 \(", saved)
    assert load(str(saved), dtype="bfloat16").dtype == torch.bfloat16
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    refused("Free memory there, or another device:", saved)
    monkeypatch.setattr(memory, "free_memory", lambda device: None)  # a system that does not say
    assert load(str(saved)).dtype == torch.float32


def test_free_memory_of_this_machine() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 10 * 2**20 < free < 2**50


@pytest.mark.parametrize("device", ["cuda:97", "nonsense"])
def test_a_device_that_is_not_here(saved: Path, device: str) -> None:
    refused(f"device '{device}' cannot be used here, got: .* Write device: cpu, cuda, cuda:1 or auto", saved, device=device)


def test_device_auto(saved: Path) -> None:
    assert load(str(saved), device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_dtype_that_the_device_cannot_compute_in(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError('"addmm_impl_cpu_" not implemented for \'Half\'')

    monkeypatch.setattr(torch, "matmul", refuse)
    refused("cpu cannot compute in float16, got: .*not implemented for 'Half'.*Write dtype: float32 or bfloat16", saved, dtype="float16")


def test_float16_where_it_works(saved: Path) -> None:
    build().save_pretrained(saved, dtype=torch.float16)
    model = load(str(saved), dtype="auto")
    assert model.dtype == torch.float16
    assert model.logits(torch.arange(6).unsqueeze(0)).isfinite().all()


def test_quantised_checkpoints(saved: Path) -> None:
    edit_json(saved / "config.json", quantization_config={"quant_method": "gptq"})
    refused("is quantised, got quantization_config .*gptq", saved)


def test_weights_in_a_format_that_is_not_read(saved: Path) -> None:
    tensors = load_file(str(saved / "model.safetensors"))
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.int8)
    save_file(tensors, str(saved / "model.safetensors"))
    refused("norm.weight in .* is stored as I8, readable are F64, F32, F16, BF16", saved)


def test_a_truncated_shard(saved: Path) -> None:
    file = saved / shard(saved)[1]
    file.write_bytes(file.read_bytes()[:-1])
    refused("model-00002-of-00002.safetensors is damaged", saved)


def test_a_tensor_in_two_shards(saved: Path) -> None:
    files = [saved / name for name in shard(saved)]
    second = load_file(str(files[1]))
    name = next(iter(second))
    save_file({**load_file(str(files[0])), name: second[name]}, str(files[0]))
    refused(f"{name} is stored twice, got model-00001-of-00002.safetensors and model-00002-of-00002.safetensors", saved)


def test_a_hub_id_offline_says_what_to_download_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **arguments: Any) -> NoReturn:
        assert arguments["ignore_patterns"] == ["*/*"] and "*.safetensors" in arguments["allow_patterns"]
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"'GSAI-ML/LLaDA-8B-Instruct' .*no route to host") as caught:
        load("GSAI-ML/LLaDA-8B-Instruct", revision="main")
    line = "hf download GSAI-ML/LLaDA-8B-Instruct --revision main --local-dir checkpoints/LLaDA-8B-Instruct"
    assert line in str(caught.value)
    assert str(caught.value).endswith("write path: checkpoints/LLaDA-8B-Instruct.")
    with pytest.raises(CheckpointError, match="write adapter: checkpoints/D2F_LLaDA_Instruct_8B_Lora"):
        hub.resolve("SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora", None, "adapter")


def test_a_hub_id_is_downloaded_at_its_revision(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    def download(name: str, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_weights(load("someone/something", revision="abc123"), build())
    assert asked == [("someone/something", "abc123")]


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    refused("is a GGUF file and the gguf package is not installed.*Run pip install gguf", tmp_path)
    refused("is a GGUF file and the gguf package is not installed", tmp_path / "model.Q4_1.gguf")
    (tmp_path / "model.Q8_0.gguf").write_bytes(b"GGUF")
    refused("holds 2 GGUF files, got model.Q4_1.gguf, model.Q8_0.gguf", tmp_path)


def test_a_directory_with_a_config_is_no_gguf(saved: Path) -> None:
    (saved / "extra.gguf").write_bytes(b"GGUF")
    assert same_weights(load(str(saved)), build())


def test_names_and_shapes_are_checked_before_memory_is_taken(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("memory was taken")

    monkeypatch.setattr("dllm_toolkit.models.transformer.Transformer.allocate", refuse)
    edit_json(saved / "config.json", mlp_width=64)
    refused("config.json asks for", saved)
    edit_json(saved / "config.json", mlp_width=48, layers=1)
    refused("got 9 unknown tensors", saved)


def test_index_that_names_more_than_its_shards_hold(saved: Path) -> None:
    shard(saved)
    index = saved / "model.safetensors.index.json"
    entry = json.loads(index.read_text())
    first = next(iter(entry["weight_map"]))
    tensors = {name: value for name, value in load_file(str(saved / entry["weight_map"][first])).items() if name != first}
    save_file(tensors, str(saved / entry["weight_map"][first]))
    refused(f"1 missing ones \\({first}", saved)
