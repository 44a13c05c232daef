"""Which distillation wins at equal compute? Trains all students of recipes/distil, compares them, writes docs/distillation.md.

    python benchmarks/distillation.py                       every student, then the comparison and the page
    python benchmarks/distillation.py --only sft dparallel  some of them (the comparison needs all)
    python benchmarks/distillation.py --smoke               tiny models on a CPU, a few steps, under runs/smoke: does everything run?

The models are small, so several trainings share a GPU (`--at-once` for each of the visible ones). The first of them lets the teacher
write the answers that all learn from; the others wait for it. What is already trained is not trained again. Logs: runs/distil/NAME.log.
Prints one JSON line with the seconds of each training and of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
TINY = "{_component_: fresh, width: 16, layers: 1, heads: 2"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dllm_toolkit", *arguments]


def tiny(rule: dict[str, object]) -> str:
    return TINY + "".join(f", {name}: {value}" for name, value in rule.items()) + "}"


def training(name: str, home: Path, smoke: bool) -> list[str]:
    """The command that trains a student."""
    path = ROOT / "recipes" / "distil" / f"{name}.yaml"
    made = command("train", str(path), f"output={home / name}", f"export={home / name / 'model'}", f"data.store={home / 'answers'}")
    if not smoke:
        return made
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    causal = {"attention": "causal", "shift": 1} if "autoregressive" in str(recipe.get("model")) else {}
    made += [f"model={tiny(causal)}", f"data.model={tiny({})}", *([f"teacher={tiny({})}"] if "teacher" in recipe else [])]
    made += ["data.prompts.size=8", "data.prompts.heldout=2", "data.prompts.batch_size=2", "data.right_only=false", "trainer.max_steps=3"]
    return [*made, "data.decoder={_component_: fast_dllm, threshold: 0.0}", "trainer.precision=32-true", "trainer.log_every=1"]


def comparison(recipe: str, home: Path, output: Path, smoke: bool) -> list[str]:
    """The command that compares the students, by recipes/compare/RECIPE.yaml."""
    path = ROOT / "recipes" / "compare" / f"{recipe}.yaml"
    models = yaml.safe_load(path.read_text(encoding="utf-8"))["models"]
    made = command("compare", str(path), f"output={output}")
    for name, model in models.items():
        if name != "teacher":
            made.append(f"models.{name}.{'adapter' if 'adapter' in model else 'path'}={home / name / 'model'}")
            made += [f"models.{name}.path={home / 'sft' / 'model'}"] if smoke and "adapter" in model else []
    size = "task.size=2" if recipe == "distillation" else "task.task.size=1"
    return [*made, "models.teacher=" + tiny({}), size, "run.max_new_tokens=8"] if smoke else made


def visible_devices() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them: those of a child are counted anew."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())] or [""]


def shared(made: list[str], smoke: bool) -> list[str]:
    """The command by as many processes as there are GPUs, which share the problems."""
    count = 1 if smoke else len(visible_devices())
    return [made[0], "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *made[1:]] if count > 1 else made


def run_all(names: list[str], home: Path, at_once: int, smoke: bool) -> tuple[dict[str, float], list[str]]:
    """Train `names`, several at once: seconds of each, and those that failed."""
    devices = visible_devices() if not smoke else [""]
    slots = devices * at_once
    waiting, running, seconds, failed = list(names), {}, {}, []
    home.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and slots:
            name, slot = waiting.pop(0), slots.pop(0)
            log = (home / f"{name}.log").open("w")
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": slot}
            process = subprocess.Popen(training(name, home, smoke), stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            running[name] = (process, slot, time.monotonic())
        time.sleep(0.2)
        for name, (process, slot, began) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                slots.append(slot)
                seconds[name] = round(time.monotonic() - began, 1)
                failed += [name] if process.returncode else []
                last = (home / f"{name}.log").read_text().strip().splitlines()[-1:]
                print(f"{name}: {'FAILED' if process.returncode else 'done'} after {seconds[name]} s  {' '.join(last)}", flush=True)
    return seconds, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.stem for path in (ROOT / "recipes" / "distil").glob("*.yaml"))
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="trainings that share a GPU, default 6")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps, on the CPU")
    parser.add_argument("--runs", type=Path, default=None, metavar="DIR", help="where runs go, default runs, or runs/smoke with --smoke")
    parser.add_argument("--page", type=Path, default=None, metavar="FILE", help="default docs/distillation.md, or in DIR with --smoke")
    options = parser.parse_args()
    runs = (options.runs or ROOT / ("runs/smoke" if options.smoke else "runs")).resolve()
    page = options.page or (runs if options.smoke else ROOT / "docs") / "distillation.md"
    home = runs / "distil"
    seconds, failed = run_all(options.only, home, 2 if options.smoke else options.at_once, options.smoke)
    if not failed and len(options.only) == len(every):
        began = time.monotonic()
        outputs = (runs / "distillation", runs / "distillation_samples")
        # At once: decoding with a small model waits for its launches, so two processes on a GPU hardly slow each other.
        compared = [
            subprocess.Popen(shared(comparison(one.name, home, one, options.smoke), options.smoke), cwd=ROOT, stdout=subprocess.DEVNULL)
            for one in outputs
        ]
        made = any([one.wait() for one in compared])
        seconds["comparison"] = round(time.monotonic() - began, 1)
        write = [sys.executable, "-m", "dllm_toolkit.evaluation.distillation_page", str(outputs[0]), str(page), str(home), str(outputs[1])]
        failed += ["comparison"] if made else ["page"] if subprocess.run(write, cwd=ROOT).returncode else []
    print(json.dumps({"benchmark": "distillation", "seconds": seconds, "failed": failed, "devices": torch.cuda.device_count()}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
