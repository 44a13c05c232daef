"""A comparison in several processes: the ledger is that of one process, also after a kill and with another number of processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_toolkit import cli
from dllm_toolkit.errors import SaidElsewhere, ToolkitError
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.processes import ALONE, ProcessError, Processes, announced
from tests.cli.test_compare import models  # noqa: F401 - a fixture
from tests.cli.test_interruptions import TWO_ROWS, recipe, records_of  # noqa: F401 - a fixture

# What torchrun does, without a start-up a process: it starts, and when one dies, kills the rest.
LAUNCH = """
import json, os, signal, socket, sys
from dllm_toolkit import cli
from dllm_toolkit.evaluation import compare, measure
import lightning.fabric


def start(count, dies=None, more=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if rank == dies:
                decode, left = measure._decode, 2
                def dying(*arguments, **named):
                    nonlocal left
                    left -= 1
                    return decode(*arguments, **named) if left else os.kill(os.getpid(), signal.SIGKILL)
                measure._decode = dying
            code = cli.main([*sys.argv[1:], *more])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children[child] = rank
    codes = {}
    while children:
        child, status = os.wait()
        codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if codes[max(codes)] < 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
    print("exit codes", [codes[rank] for rank in range(count)], flush=True)


for run in json.loads(os.environ["RUNS"]):
    start(**run)
"""


def test_several_processes_write_the_ledger_of_one(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    command = ["compare", str(recipe), *TWO_ROWS, "task.size=7"]
    refused = "configurations.vanilla.cache=block_causal"
    runs = [{"count": 2, "more": [refused]}, {"count": 2, "dies": 1}, {"count": 3}, {"count": 1}]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RUNS": json.dumps(runs)},
    )
    refused, killed, finished, alone = (line for line in done.stdout.splitlines() if line.startswith("exit codes"))
    assert refused == "exit codes [2, 2]" and "Traceback" not in done.stderr
    assert done.stderr.count("the cache block_causal") == 1, done.stderr  # one process says it
    assert killed.endswith(f"{-signal.SIGKILL}]"), done.stderr
    assert (finished, alone) == ("exit codes [0, 0, 0]", "exit codes [0]"), done.stderr
    assert done.stdout.count('{"recipe"') == 2  # one report a run
    assert [path.name for path in (tmp_path / "run").glob("ledger*")] == ["ledger.jsonl"]
    records, events = records_of(tmp_path / "run"), ledger.contents(tmp_path / "run" / "ledger.jsonl").events
    assert [event.values["processes"] for event in events] == [3] and 0 < events[0].values["answers"] < 14

    assert cli.main([*command, f"output={tmp_path / 'whole'}"]) == 0
    assert ledger.but_for_times(records) == ledger.but_for_times(records_of(tmp_path / "whole"))
    capsys.readouterr()


def test_alone_nothing_is_sent() -> None:
    assert announced() == ALONE and ALONE.share(1) == 1 and ALONE.gather(2) == [2]
    with pytest.raises(ToolkitError, match="own words"), ALONE.together():
        raise ToolkitError("own words")


def test_an_error_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, "the disk is full"] if self.first else [])
    monkeypatch.setattr(Processes, "share", lambda self, value: True)
    with pytest.raises(ProcessError, match="process 1 of 2: the disk is full"), Processes(0, 2, 0, 2).together():
        pass
    with pytest.raises(SaidElsewhere), Processes(1, 2, 1, 2).together():
        pass


@pytest.mark.parametrize("wrong", [{"RANK": "2"}, {"RANK": "x"}, {"RANK": "0", "LOCAL_WORLD_SIZE": "3"}, {}])
def test_what_no_launcher_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="torchrun"):
        announced()


def test_commands_for_one_process_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["harness", "nowhere.yaml"]) == 2
    assert "harness works in one process, got 2" in capsys.readouterr().err
