"""Kill a comparison ten times at random moments; does the ledger after the reruns equal that of a run nobody killed?

    python benchmarks/kill_nine.py recipes/quickstart.yaml task.size=8
    python benchmarks/kill_nine.py recipes/quickstart.yaml task.size=8 run.threads=1 --processes 2

A run and all that it started get SIGKILL. Moments are even over what is left to measure; one in five falls
into the start-up. A run that ends before its kill is compared too, and the next kill meets a new one. Equal: the same lines in
the same order, but for what a clock or a memory counter said. JSON on the last line; exit code 1 if a ledger differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

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


class Run:
    """A comparison that runs. `working`: seconds after its start at which it began to measure, once it did."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, self.started, self.working = log, time.monotonic(), None
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def ended(self) -> bool:
        if self.working is None and ": starting" in self.log.read_text():
            self.working = self.seconds
        return self.process.poll() is not None

    def kill(self) -> None:
        """The command and everything that it started: torchrun's workers would go on, in sessions of their own."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family)

    def until(self, moment: Callable[["Run"], bool]) -> bool:
        """Whether the moment came before the end."""
        while not self.ended():
            if moment(self):
                return True
            time.sleep(0.02)
        return False


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
    whole, killed, log = home / "whole", home / "killed", home / "errors"
    run = Run(command_of(options, 1, whole), log)
    run.until(lambda _: False)
    if run.process.returncode or run.working is None:
        print(log.read_text(), file=sys.stderr)
        return 2
    starting, working, expected = run.working, run.seconds - run.working, stripped(whole / "ledger.jsonl")
    print(f"uninterrupted: {len(expected[1])} answers, {starting:.1f} s and {working:.1f} s", file=sys.stderr, flush=True)
    moments: list[dict[str, float]] = []
    equal: list[bool] = []
    while True:
        missing = 1 - held(killed) / len(expected[1])
        run = Run(command_of(options, options.processes, killed), log)
        # A run whose answers are all there is left to finish, so that all kills meet work; one in five meets the start-up.
        early, share = draw.random() < 0.2, draw.random()
        if len(moments) < options.kills and missing > 0:
            if early:
                came = run.until(lambda one, share=share: one.seconds > share * starting)
            else:
                came = run.until(lambda one: one.working is not None)
                end = run.seconds + share * working * missing / options.processes
                came = came and run.until(lambda one, end=end: one.seconds > end)
            if came:
                run.kill()
                after = run.seconds - (run.working or 0)
                moments.append({"working": run.working is not None, "seconds": round(after, 2), "answers": held(killed)})
                print(f"kill {len(moments)}: {moments[-1]}", file=sys.stderr, flush=True)
                continue
        run.until(lambda _: False)
        if run.process.returncode:
            print(log.read_text(), file=sys.stderr)
            return 2
        equal.append(stripped(killed / "ledger.jsonl") == expected)
        print(f"finished after {len(moments)} kills: {'equal' if equal[-1] else 'DIFFERENT'}", file=sys.stderr, flush=True)
        if len(moments) >= options.kills:
            break
        shutil.rmtree(killed)
    left = sorted(path.name for path in killed.glob("ledger*.jsonl"))
    print(json.dumps({"kills": moments, "processes": options.processes, "answers": len(expected[1]), "equal": equal, "files": left}))
    shutil.rmtree(home)
    return 0 if all(equal) and left == ["ledger.jsonl"] else 1


if __name__ == "__main__":
    sys.exit(main())
