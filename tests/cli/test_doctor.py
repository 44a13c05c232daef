"""`dllm-toolkit doctor`: what it finds, what it calls a fault, and that the lines to type next work."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
from pathlib import Path

import pytest

from dllm_toolkit import cli, doctor
from dllm_toolkit.doctor import Device, Size

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "golden" / "vectors"
GIB = 2**30


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: a connection is an error. The caller's own hub cache is not looked at."""

    def refuse(*arguments: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(doctor, "_cached", lambda: iter(()))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_the_whole_report(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(VECTORS / "dream-tiny", tmp_path / "checkpoints" / "Dream-v0-Instruct-7B")
    monkeypatch.chdir(tmp_path)
    code, out = run(capsys)
    assert code == 0
    for part in (
        "python 3.",
        "torch ",
        "lightning ",
        "peft ",
        "transformers ",
        "core",
        "free",
        "asset:teacher: shipped model",
        "asset:d2f",
    ):
        assert part in out
    assert "GSAI-ML/LLaDA-8B-Instruct: not here; 8.02 B parameters, 14.9 GiB to download; " in out
    assert "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir checkpoints/LLaDA-8B-Instruct" in out
    assert "checkpoints/Dream-v0-Instruct-7B: dream, " in out and "hf download Dream-org/Dream-v0-Instruct-7B" not in out
    assert "network" not in out


@pytest.mark.parametrize(
    "name", [str(VECTORS / "llada-tiny"), str(VECTORS / "dream-tiny"), "asset:teacher", "asset:autoregressive", "asset:d2f"]
)
def test_the_next_line_works(capsys: pytest.CaptureFixture[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, out = run(capsys, name)
    line = shlex.split(out.splitlines()[-1])
    assert code == 0 and line[:2] == ["dllm-toolkit", "generate"]
    assert cli.main([*line[1:], "run.max_new_tokens=8"]) == 0


def test_an_adapter_names_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, VECTORS / "lora-dream-tiny")
    assert code == 0 and "LoRA adapter of dream-tiny, rank 8" in out
    assert "recipes/decode/d2f_dream.yaml model.path=dream-tiny model.adapter=" in out


def broken(directory: Path, how: str) -> Path:
    """A copy of a good checkpoint with one thing wrong."""
    copy = directory / "broken"
    shutil.copytree(VECTORS / "llada-tiny", copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    if how == "missing":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no shard":
        (copy / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
        )
    elif how == "no config":
        config.unlink()
    elif how == "unknown":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mamba"}))
    return copy


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("missing", "model.safetensors is missing"),
        ("truncated", "model.safetensors is damaged"),
        ("no shard", "model-2.safetensors is missing"),
        ("no config", "config.json is missing"),
        ("unknown", "unknown model_type 'mamba'"),
    ],
)
def test_faults_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, how: str, why: str) -> None:
    code, out = run(capsys, broken(tmp_path, how))
    assert code == 1 and why in out and "  !! " in out


def test_what_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out = run(capsys, "GSAI-ML/LLaDA-8B-Base", "checkpoints/Dream-v0-Instruct-7B", tmp_path / "nowhere", "asset:nobody")
    assert code == 1
    assert "hf download GSAI-ML/LLaDA-8B-Base --local-dir checkpoints/LLaDA-8B-Base" in out
    assert "hf download Dream-org/Dream-v0-Instruct-7B --local-dir checkpoints/Dream-v0-Instruct-7B" in out
    assert "nowhere: no such directory" in out and "no shipped model is called 'asset:nobody'" in out


def test_fits() -> None:
    """The first device and type that hold weights, the keys and values of 4096 tokens, and something to spare."""
    llada = Size(8_015_581_184, 0, 262_144)
    assert llada.needs("bfloat16") == 2 * 8_015_581_184 and llada.needs("float32", 2) - llada.needs("float32") == 2 * 4 * 262_144
    small, large = Device("cuda", 16 * GIB, ("bfloat16", "float32")), Device("cpu", 24 * GIB, ("float32", "bfloat16"))
    text, device, dtype = doctor._fit(llada, [small, large])
    assert device is large and dtype == "bfloat16" and "fits on cpu in bfloat16" in text
    assert doctor._fit(llada, [Device("cuda", 80 * GIB, ("bfloat16", "float32")), large])[1:] == (
        Device("cuda", 80 * GIB, ("bfloat16", "float32")),
        "bfloat16",
    )
    text, device, _ = doctor._fit(llada, [small])
    assert device is None and "does not fit: 17.9 GiB are needed in bfloat16 with 4096 tokens, cuda has 16.0 GiB free" in text


def test_sizes_are_those_of_the_model() -> None:
    from dllm_toolkit.models.load import load

    directory = VECTORS / "dream-tiny"
    size, model = doctor.measure(directory), load(str(directory))
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.kv == 2 * model.spec.layers * model.spec.kv_heads * model.spec.head_dim  # 2: keys and values


def test_online_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "asset:teacher", "--online")
    assert code == 1 and "network\n  !! the hub does not answer, got " in out


def test_a_package_out_of_range(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "torch" else known(name))
    code, out = run(capsys, "asset:teacher")
    assert code == 1 and "torch 1.0 is outside >=" in out and 'pip install "torch>=' in out

    def absent(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", absent)
    code, out = run(capsys, "asset:teacher")
    assert code == 1 and "peft is missing" in out


def test_gpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Properties:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    code, out = run(capsys)
    assert code == 0 and "cuda: a GPU, 70.0 GiB of 80.0 GiB free, bfloat16" in out and "cuda:1: a GPU" in out
    assert "recipes/quickstart.yaml run.device=cuda run.batch_size=8 output=runs/gpu" in out and "fits on cuda in bfloat16: 14.9 GiB" in out
