"""Two devices against one: throughput and ledger of an evaluation, and the loss curves of trainings by DDP and by FSDP.

    python benchmarks/two_devices.py                                        on two GPUs, about ten minutes
    python benchmarks/two_devices.py --only evaluation --batch 64 --problems 1024
    python benchmarks/two_devices.py --only training --objectives dscd dparallel d3llm --at-once 3 --steps 40 --train-batch 64
    python benchmarks/two_devices.py --device cpu --problems 4 --batch 2 --new-tokens 8 --steps 3 --train-batch 4     on a laptop

Every part is the ordinary command, alone or under torchrun. Throughput is answer tokens by the wall time of decoding and grading in the
process that took longest, without loading and warm-up, as the ledger's `measured` event has it. A training on two devices has half the
batch on each. Objectives are d2f and the recipes of recipes/distil by their names, on answers that the teacher writes first, once for all;
several may be trained at once, whose speed says nothing then and is left out. `largest_relative_difference` is that of the losses on two
devices from those on one, over all steps; the first step's has no history. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dllm_toolkit.evaluation import ledger

ROOT = Path(__file__).resolve().parents[1]
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def evaluation(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    block = {"block_length": 16}
    return {
        "task": {"_component_": "stories", "size": options.problems, "seed": 7},
        "models": {
            "teacher": {"_component_": "load", "path": "asset:teacher"},
            "student": {"_component_": "load", "path": "asset:teacher", "adapter": "asset:d2f"},
        },
        "configurations": {
            "vanilla": {"model": "teacher", "decoder": "vanilla"},
            "fast_dllm": {"model": "teacher", "decoder": {"_component_": "fast_dllm", **block, "threshold": 0.9}, "cache": "dual"},
            "d2f": {"model": "student", "decoder": {"_component_": "d2f", **block, "threshold": 0.9}, "cache": "block_causal"},
        },
        "run": {
            "max_new_tokens": options.new_tokens,
            "batch_size": options.batch,
            "device": options.device,
            "dtype": options.dtype,
            "threads": 1,
            "warm_up": options.batch,
            "compile": options.compile,
        },
        "report": {"html": False, "tensorboard": False},
        "output": str(output),
    }


def training(options: argparse.Namespace, objective: str, output: Path, devices: int, strategy: str) -> dict[str, Any]:
    batch = options.train_batch // devices
    trainer = {
        "max_steps": options.steps,
        "accelerator": "gpu" if options.device == "cuda" else "cpu",
        "strategy": strategy,
        "precision": options.precision,
        "log_every": 1,
        "validate_every": 0,
        "checkpoint_every": options.steps,
        "compile": options.compile,
    }
    if objective != "d2f":
        prompts = {"size": 8 * options.train_batch, "heldout": options.train_batch, "batch_size": batch, "workers": 0}
        data: dict[str, Any] = {"prompts": prompts, "store": str(output.parent.parent / "answers"), "device": options.device}
        if options.device == "cpu":  # 128 tokens, one a forward, are slow there
            data |= {"decoder": {"_component_": "fast_dllm", "block_length": 32, "threshold": 0.0}, "right_only": False}
        base = ROOT / "recipes" / "distil" / f"{objective}.yaml"
        return {"base": str(base), "data": data, "trainer": trainer, "output": str(output), "export": None}
    data = {"_component_": "stories", "size": 32 * options.train_batch, "heldout": options.train_batch, "batch_size": batch}
    return {
        "model": {"_component_": "load", "path": "asset:teacher"},
        "data": data,
        "objective": {"_component_": "d2f", "block_length": 16},
        "lora": {"rank": 32, "alpha": 32, "targets": LORA},
        "optimizer": {"_component_": "adamw", "learning_rate": 1e-3},
        "schedule": {"_component_": "constant", "warmup_steps": min(20, options.steps)},
        "trainer": trainer,
        "output": str(output),
    }


def run(command: str, tree: dict[str, Any], devices: int) -> float:
    """Wall seconds of a command with a recipe, start to end. What goes wrong ends the benchmark."""
    output = Path(tree["output"])
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"] if devices > 1 else []
    # One host: the processes need no name of it that anybody can look up.
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": "1"}
    if devices == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    clock = time.monotonic()
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dllm_toolkit", command, str(file)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{output.name} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return time.monotonic() - clock


def evaluate(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": options.batch, "problems": options.problems}
    kept = []
    for devices in (1, 2):
        output = home / f"evaluation{devices}"
        wall = run("compare", evaluation(options, output), devices)
        contents = ledger.contents(output / "ledger.jsonl")
        (measured,) = (event.values for event in contents.events if event.what == "measured")
        tokens = sum(record.tokens - record.given for record in contents.records)
        kept.append(ledger.but_for_times(contents.records))
        found[f"{devices}"] = {
            "tokens_per_second": round(tokens / measured["seconds"], 1),
            "seconds": round(measured["seconds"], 3),
            "command_seconds": round(wall, 1),
            "accuracy": {s.name: round(s.accuracy, 4) for s in ledger.summarise(contents.records)},
            "peak_memory_gb": round(max(record.peak_memory or 0 for record in contents.records) / 1e9, 3),
        }
        print(f"evaluation, {devices}: {found[f'{devices}']}", file=sys.stderr, flush=True)
    found["speedup"] = round(found["2"]["tokens_per_second"] / found["1"]["tokens_per_second"], 3)
    found["ledgers_equal"] = kept[0] == kept[1]
    if not found["ledgers_equal"]:
        found["records_that_differ"] = sum(one != two for one, two in zip(*kept, strict=False))
    return found


def train_all(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    with ThreadPoolExecutor(options.at_once) as pool:
        found = dict(zip(options.objectives, pool.map(lambda name: train(options, name, home / name), options.objectives), strict=True))
    return {"batch": options.train_batch, "steps": options.steps, "precision": options.precision, **found}


def train(options: argparse.Namespace, objective: str, home: Path) -> dict[str, Any]:
    home.mkdir()
    found: dict[str, Any] = {}
    curves: dict[str, list[float]] = {}
    for name, devices, strategy in (("one", 1, "auto"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        output = home / name
        wall = run("train", training(options, objective, output, devices, strategy), devices)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curves[name] = [line["train/loss"] for line in lines if "train/loss" in line]
        found[name] = {"first_loss": curves[name][0], "last_loss": curves[name][-1]}
        if options.at_once == 1:
            speeds = sorted(line["train/samples_per_second"] for line in lines if "train/samples_per_second" in line)
            found[name] |= {"samples_per_second": round(speeds[len(speeds) // 2], 1), "command_seconds": round(wall, 1)}
        if name != "one":
            differences = [abs(one - other) / abs(one) for one, other in zip(curves["one"], curves[name], strict=True)]
            found[name]["first_relative_difference"] = differences[0]
            found[name]["largest_relative_difference"] = max(differences)
            found[name]["same_curve"] = max(differences) < options.tolerance
        print(f"{objective}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["evaluation", "training"], default=None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="float32", help="of the evaluation")
    parser.add_argument("--precision", default="32-true", help="of the training")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--objectives", nargs="+", default=["d2f"], metavar="NAME", help="d2f, or a recipe of recipes/distil")
    parser.add_argument("--at-once", type=int, default=1, help="objectives that are trained at the same time")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="relative difference of two losses that are called the same")
    for name, value in (("batch", 64), ("problems", 1024), ("new-tokens", 80), ("steps", 200), ("train-batch", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    if options.train_batch % 2:
        parser.error("--train-batch is shared by two devices: write an even number")
    for objective in options.objectives:
        if objective != "d2f" and not (ROOT / "recipes" / "distil" / f"{objective}.yaml").is_file():
            parser.error(f"--objectives: there is no recipes/distil/{objective}.yaml")
    name = torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu"
    result: dict[str, Any] = {"benchmark": "two_devices", "device": name, "torch": torch.__version__, "compile": options.compile}
    with tempfile.TemporaryDirectory(prefix="two_devices_") as home:
        if options.only != "training":
            result["evaluation"] = evaluate(options, Path(home))
        if options.only != "evaluation":
            result["training"] = train_all(options, Path(home))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
