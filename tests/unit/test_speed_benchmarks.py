"""The speed benchmarks run at toy size on a CPU, print their JSON line, and go on where a candidate fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # they import each other
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"benchmarks_{name}", module)
    spec.loader.exec_module(module)
    result = module.main([*options, "--device", "cpu", "--eager"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    return result


def test_matmul_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails, as on any machine without it
    monkeypatch.delitem(sys.modules, "dllm_toolkit.ops.eight_bit_triton", raising=False)
    sizes = ("--layers", "2", "--width", "128", "--mlp-width", "256", "--vocabulary", "256", "--lanes", "16", "--repeats", "1")
    kernels = ("bf16", "fp8_formula", "int8_formula", "triton_weights")
    result = run("matmul_speed", capsys, monkeypatch, *sizes, "--kernels", *kernels)
    assert [row["variant"] for row in result["rows"]] == ["separate", "fused"] and all(row["error"] < 2e-2 for row in result["rows"])
    exact, fp8, int8, triton = result["layers"]
    assert [row["kernel"] for row in result["layers"]] == list(kernels)
    assert fp8["floor_ms"] < 0.6 * exact["floor_ms"] and int8["error"] < 0.1 and "triton" in triton["failed"]
    weights = 2 * 2 * (4 * 128 * 128 + 3 * 256 * 128) + 2 * 256 * 128
    assert exact["weights_gb"] == round(weights / 1e9, 3)


def test_score_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--vocabulary", "60", "--reads", "4", "--dtype", "float32", "--repeats", "1", "--only", "argmax", "proposal, margin")
    result = run("score_speed", capsys, monkeypatch, *options)
    assert [(row["what"], row["reads"]) for row in result["rows"]] == [("argmax", 4), ("proposal, margin", 4)]
    assert all(row["ms"] > 0 for row in result["rows"])


@pytest.mark.parametrize("weights", [(), ("--weights", "fp8")], ids=["exact", "fp8"])
def test_decode_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, weights: tuple[str, ...]) -> None:
    sizes = {"layers": 1, "width": 32, "heads": 2, "mlp-width": 32, "vocabulary": 80, "prompt": 8, "new-tokens": 12, "block": 4}
    given = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    options = (
        *given,
        "--accept",
        "2",
        "--repeats",
        "1",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--long",
        "20",
        "--only",
        "d2f, block_causal",
    )
    result = run("decode_speed", capsys, monkeypatch, *options, *weights)
    (alone,) = result["decode"].values()
    assert alone["tokens_per_forward"] == 2.0 and alone["forwards"] == 6
    plain, refilled = result["batch"]
    assert (plain["refill"], refilled["refill"]) == (False, True)
    assert plain["tokens_per_forward_of_a_row"] == refilled["tokens_per_forward_of_a_row"] and plain["requests"] == 8
    assert set(result["long"]) == {"d2f, block_causal", "semi_ar, dual", "autoregressive, block_causal"}
    assert all("failed" not in one for one in (*result["long"].values(), *result["batch"]))


def test_train_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("official", "dense + layers", "needed logits", "compiled + selective", "4x rows")
    result = run("train_speed", capsys, monkeypatch, "--tiny", "--peak", "1e9", "--only", *names)
    assert list(result["lines"]) == list(names)
    *same, more = result["lines"].values()
    assert len({row["loss"] for row in same}) == 1 and all(row["mfu"] > 0 for row in same)
    assert more["rows"] == 4 * same[0]["rows"] and result["lines"]["official"]["speed_up"] == 1.0
