"""Kill a comparison ten times at random moments; does the ledger after the reruns equal that of a run nobody killed?

    python benchmarks/kill_nine.py recipes/quickstart.yaml task.size=8
    python benchmarks/kill_nine.py recipes/quickstart.yaml task.size=8 run.threads=1 --processes 2

A run is a process group of its own and gets SIGKILL, workers included. Moments are even over what is left of the run, start-up included.
A run that ends before its kill is compared too, and the next kill meets a new one. Equal: the same lines in the same order, but for what a
clock or a memory counter said. JSON on the last line; exit code 1 if a ledger differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from dllm_toolkit.evaluation import ledger


def command_of(options: argparse.Namespace, processes: int, output: Path) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    shown = ["report.html=false", "report.tensorboard=false"]
    return [*launcher, "-m", "dllm_toolkit", "compare", options.recipe, *options.overrides, *shown, f"output={output}"]


def held(output: Path) -> int:
    """Whole lines of answers in the ledger and the processes' shards."""
    return sum(path.read_bytes().count(b'\n{"kind": "record"') for path in output.glob("ledger*.jsonl"))


def stripped(path: Path) -> tuple[object, list[ledger.Record]]:
    """Header, events and records but for times and dates; how long it took is an event that is nothing else."""
    found = ledger.contents(path)
    events = [(event.what, event.configuration, event.values) for event in found.events if event.what != "measured"]
    return (replace(found.header, date="", recipe={}), events), ledger.but_for_times(found.records)  # the recipe has its hash


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1, help="of the runs that are killed; the one that is not has one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    home = Path(tempfile.mkdtemp(prefix="kill_nine_"))
    whole, killed = home / "whole", home / "killed"
    clock = time.monotonic()
    done = subprocess.run(command_of(options, 1, whole), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 2
    seconds, expected = time.monotonic() - clock, stripped(whole / "ledger.jsonl")
    print(f"uninterrupted: {len(expected[1])} answers, {seconds:.1f} s", file=sys.stderr, flush=True)
    moments, equal, kills = [], [], 0
    while True:
        clock, fresh = time.monotonic(), held(killed) == 0
        with subprocess.Popen(
            command_of(options, options.processes, killed),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            left = 1 - held(killed) / len(expected[1])
            # A run whose answers are all there is left to finish, so that all kills meet work.
            moment = draw.uniform(0, seconds * (0.3 + 0.7 * left)) if kills < options.kills and left > 0 else None
            try:
                _, said = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                assert moment is not None
                moments.append({"seconds": round(moment, 2), "answers": held(killed)})
                print(f"kill {kills} after {moment:.1f} s: {held(killed)} answers are there", file=sys.stderr, flush=True)
                continue
        if process.returncode:
            print(said, file=sys.stderr)
            return 2
        if fresh:  # a machine with other work is not always as fast
            seconds = time.monotonic() - clock
        equal.append(stripped(killed / "ledger.jsonl") == expected)
        print(f"finished after {kills} kills: {'equal' if equal[-1] else 'DIFFERENT'}", file=sys.stderr, flush=True)
        if kills == options.kills:
            break
        shutil.rmtree(killed)
    left = sorted(path.name for path in killed.glob("ledger*.jsonl"))
    print(json.dumps({"kills": moments, "processes": options.processes, "answers": len(expected[1]), "equal": equal, "files": left}))
    shutil.rmtree(home)
    return 0 if all(equal) and left == ["ledger.jsonl"] else 1


if __name__ == "__main__":
    sys.exit(main())
