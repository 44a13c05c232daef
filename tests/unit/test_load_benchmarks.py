"""The scripts under benchmarks/ run at toy size on a CPU and print their JSON line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page_cache", ["warm", "cold"])
def test_load_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], page_cache: str) -> None:
    options = ["--layers", "2", "--width", "32", "--heads", "2", "--shards", "3", "--device", "cpu", "--repeats", "1"]
    result = script("load_checkpoint").main([*options, "--page-cache", page_cache, "--directory", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    (run,) = result["runs"]
    assert result["files"] >= 2 and run["host_ok"] and run["ratio"] > 0
    assert not list(tmp_path.iterdir())  # it cleans up


def test_reference_logits(capsys: pytest.CaptureFixture[str]) -> None:
    result = script("reference_logits").main(["--shrink", "32", "--length", "12", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    assert result["ok"]
    assert [run["model"] for run in result["runs"]] == ["llada-8b", "dream-7b"]
    for run in result["runs"]:
        assert 0 < run["bf16_cpu_against_float32_cpu"]["rms_relative"] < 0.05
