"""The speed benchmarks run at toy size on a CPU, print their JSON line, and go on where a candidate fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
AT = ("--device", "cpu", "--eager")


def module_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # they import each other
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"benchmarks_{path.stem}", module)
    spec.loader.exec_module(module)
    return module


def run(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str, at: tuple[str, ...] = AT
) -> dict[str, Any]:
    result = module_of(BENCHMARKS / f"{name}.py", monkeypatch).main([*options, *at])
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
        "--rows",
        "3",
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
    assert all("failed" not in one for one in (*result["long"].values(), *result["batch"], *result["rows"]))
    assert [(one["rows"], one["generation"], one["forwards"]) for one in result["rows"]] == [
        (3, "d2f, block_causal", 6), (3, "semi_ar, dual", 6), (3, "autoregressive, block_causal", 12),
    ]  # fmt: skip


def test_train_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("official", "dense + layers", "needed logits", "compiled + selective", "4x rows")
    result = run("train_speed", capsys, monkeypatch, "--tiny", "--peak", "1e9", "--only", *names)
    assert list(result["lines"]) == list(names)
    *same, more = result["lines"].values()
    assert len({row["loss"] for row in same}) == 1 and all(row["mfu"] > 0 for row in same)
    assert more["rows"] == 4 * same[0]["rows"] and result["lines"]["official"]["speed_up"] == 1.0


def test_train_at_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The published recipes through the ordinary run; a line that fails does not cost the next one."""
    module = module_of(BENCHMARKS / "train_at_scale.py", monkeypatch)
    train = module.run_training

    def first_too_large(loaded: Any, built: Any) -> Any:
        if type(built.objective).__name__ == "PseudoTrajectory":
            raise MemoryError("out of memory")
        return train(loaded, built)

    monkeypatch.setattr(module, "run_training", first_too_large)
    kept, keep = [], module.keep_so_far

    def keep_and_read(*arguments: Any) -> None:
        keep(*arguments)
        kept.append(json.loads((tmp_path / "train_at_scale.partial").read_text()))

    monkeypatch.setattr(module, "keep_so_far", keep_and_read)
    words = ("--tiny", "--steps", "2", "--warm-up", "1", "--peak", "1e9", "--recipes", "d3llm_llada", "dscd_llada")
    result = module.main([*words, "--save", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    failed, row = result["lines"]
    # After each line: a run that is ended from outside has not lost what it measured.
    assert [len(one["lines"]) for one in kept] == [1, 2] and [one.name for one in tmp_path.iterdir()] == ["train_at_scale.json"]
    assert failed["failed"] == "MemoryError: out of memory" and row["finite"] and row["mfu"] > 0
    assert (row["rows"], row["length"], row["student_lanes"], row["teacher_lanes"]) == (1, 80, 80, 80)
    layers, adapter = 2 * (4 * 32 * 32 + 3 * 32 * 64), 2 * 4 * (4 * 64 + 3 * 96)
    least, most_logits, most_pairs = 80 * (6 * layers + 6 * adapter), 6 * 400 * 32 * 80, 4 * 4 * 32 * 2 * 80 * 80
    assert row["trained_parameters"] == adapter and least < row["tflop"] * 1e12 < least + most_logits + most_pairs
    assert module.main(["--markdown", str(tmp_path / "train_at_scale.json")]) == json.loads(json.dumps(result))
    assert "| `dscd_llada` | 1 x 80 | 80 + 80 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere"):
        module.main(["--tiny", "--recipes", "nowhere.yaml"])


def test_results_are_kept_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"prompt": 8, "new-tokens": 16, "block": 4, "vocabulary": 40, "steps": 3, "rows": 1}
    given = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    words = ("--decoders", "semi_ar", "autoregressive", "--caches", "dual", "block_causal", "--save", str(tmp_path))
    result = run("engine_overhead", capsys, monkeypatch, *given, *words, at=())
    kinds = [("semi_ar", "dual", "full"), ("semi_ar", "block_causal", "block_causal")]
    kinds += [("autoregressive", "dual", "causal"), ("autoregressive", "block_causal", "causal")]
    assert [(row["decoder"], row["cache"], row["attention"]) for row in result["rows"]] == kinds
    assert all(0 < row[name] < row["step"] * 100 for row in result["rows"] for name in ("plan", "pack", "forward", "decide", "rest"))
    assert json.loads((tmp_path / "engine_overhead.json").read_text()) == json.loads(json.dumps(result))
    assert result["versions"]["torch"] and result["settings"]["block"] == 4 and "save" not in result["settings"]
    graphs = {"forward": {"16, 4": 5.0, "32, 4": 6.0}, "products": {"16, 4": 4.0, "32, 4": 5.0}}
    speed = {
        **{key: result[key] for key in ("device", "versions")},
        "shape": {"layers": 1, "width": 8, "prompt": 8, "new_tokens": 16, "accept": 4},
        "floor_ms": 3.0,
        "weights": "bfloat16",
        "decode": {"d2f": {"tokens_per_second": 9.0, "tokens_per_forward": 4.0, "graphs_ms": graphs}, "none": {"failed": "no memory"}},
        "batch": [{"rows": rows, "refill": refill, "tokens_per_second": 9.0 * rows} for rows in (1, 2) for refill in (False, True)],
    }
    for name in ("decode_speed", "decode_speed-int8"):
        (tmp_path / f"{name}.json").write_text(json.dumps(speed))
    drawing = module_of(BENCHMARKS.parent / "docs" / "speed.py", monkeypatch)
    assert len(drawing.panels(tmp_path)) == 4
    drawing.main(tmp_path, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no results to draw"):
        drawing.main(tmp_path / "nowhere")


def test_trainings_share_the_gpus_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students on two devices, two at once on each; the comparison by one process a device."""
    module = module_of(BENCHMARKS / "distillation.py", monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    said = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    program = {"d": "raise SystemExit(3)"}
    monkeypatch.setattr(module, "training", lambda name, home, smoke: [sys.executable, "-c", program.get(name, said)])
    seconds, failed = module.run_all(list("abcd"), tmp_path, 2, False)
    assert sorted(seconds) == list("abcd") and failed == ["d"]
    assert [(tmp_path / f"{name}.log").read_text().strip() for name in "abc"] == ["2", "5", "2"]
    assert "--nproc_per_node=2" in module.shared(["python", "-m", "dllm_toolkit"], False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert module.shared(["python", "-m", "dllm_toolkit"], False) == ["python", "-m", "dllm_toolkit"]
