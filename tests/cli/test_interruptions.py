"""What ends a comparison too early, and what the same command makes of it: kill -9, a full disk, memory that runs out."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dllm_toolkit import cli
from dllm_toolkit.evaluation import ledger, measure
from dllm_toolkit.evaluation.pictures import order_figure
from tests.cli.test_compare import RECIPE, models  # noqa: F401 - a fixture

SHORT = ("run.max_new_tokens=8", "run.warm_up=0", "baselines={}")
TWO_ROWS = (
    *SHORT,
    "run.batch_size=2",
    "configurations={vanilla: {model: teacher, decoder: vanilla}, semi_ar: {model: teacher, decoder: semi_ar}}",
)
ONE_ROW = (*SHORT, "run.batch_size=6", "configurations={vanilla: {model: teacher, decoder: vanilla}}", "task.size=6")

# Started as torchrun would, but by one process that has imported everything: a start takes as long as all the rest.
LAUNCH = """
import json, os, signal, socket, sys
from dllm_toolkit import cli
from dllm_toolkit.evaluation import compare, ledger, measure
import lightning.fabric


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_first_line(number):
    ledger.os.replace = die


def in_the_middle_of_a_line(number):
    write = ledger.Ledger._write

    def half(self, lines):
        nonlocal number
        number -= 1
        if number == 0:
            self.stream.write(lines[: len(lines) * 3 // 4])
            die()
        write(self, lines)

    ledger.Ledger._write = half


def while_decoding(number):
    decode = measure._decode

    def dying(*arguments, **named):
        nonlocal number
        number -= 1
        return decode(*arguments, **named) if number else die()

    measure._decode = dying


def start(count, words, point=None, number=0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            if count > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if point is not None and rank == count - 1:
                globals()[point](number)
            code = cli.main([*sys.argv[2:], *words])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children[child] = rank
    codes = {}
    while children:
        child, status = os.wait()
        codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if min(codes.values()) < 0:  # one was killed: torchrun kills the others
            for other in children:
                os.kill(other, signal.SIGKILL)
    print("exit codes", [codes[rank] for rank in range(count)], flush=True)


for run in json.loads(sys.argv[1]):
    start(**run)
"""
KILLS = [("before_the_first_line", 1), ("in_the_middle_of_a_line", 3), ("while_decoding", 2), ("in_the_middle_of_a_line", 1)]


class Launched(NamedTuple):
    """Where the runs `whole`, `killed` and `shared` wrote, their exit codes, and what they said."""

    home: Path
    codes: list[str]
    output: str
    errors: str


@pytest.fixture(scope="module")
def launched(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:  # noqa: F811
    """A run without trouble; one killed at four points and continued; one of two processes, one of them killed, continued by three."""
    home = tmp_path_factory.mktemp("launched")
    path = home / "recipe.yaml"
    path.write_text(RECIPE.format(models=models, output=home / "refused"))
    killed, shared = [f"output={home / 'killed'}"], [f"output={home / 'shared'}"]
    runs = [
        {"count": 1, "words": [f"output={home / 'whole'}"]},
        *({"count": 1, "words": killed, "point": point, "number": number} for point, number in KILLS),
        {"count": 1, "words": killed},
        {"count": 2, "words": ["configurations.vanilla.cache=block_causal"]},
        {"count": 2, "words": shared, "point": "while_decoding", "number": 2},
        {"count": 3, "words": shared},
    ]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, json.dumps(runs), "compare", str(path), *TWO_ROWS, "task.size=7"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    codes = [line.removeprefix("exit codes ") for line in done.stdout.splitlines() if line.startswith("exit codes")]
    return Launched(home, codes, done.stdout, done.stderr)


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:  # noqa: F811
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(models=models, output=tmp_path / "run"))
    return path


def records_of(directory: Path) -> list[ledger.Record]:
    return ledger.read(directory / "ledger.jsonl")[1]


def test_kill_nine_and_continue(launched: Launched) -> None:
    assert launched.codes[:6] == ["[0]", *["[-9]"] * 4, "[0]"], launched.errors
    # two batches, one more, and three quarters of one
    assert "already holds 6 of 14" in launched.errors and "unfinished batch" in launched.errors
    records = records_of(launched.home / "killed")
    # the same as a run that nobody killed, but for times: the order of the lines, too
    assert len(records) == 14 and ledger.but_for_times(records) == ledger.but_for_times(records_of(launched.home / "whole"))
    path = launched.home / "whole" / "ledger.jsonl"
    line = json.loads(path.read_text().splitlines()[1])
    assert line["tokens_per_forward"] == line["tokens"] / line["nfe"] and line["peak_memory"] > 2**20
    header = ledger.read(path)[0]
    assert (header.batch_size, header.warm_up) == (2, 0)


def test_several_processes_write_the_ledger_of_one(launched: Launched) -> None:
    refused, killed, finished = launched.codes[6:]
    assert refused == "[2, 2]" and not (launched.home / "refused").exists()
    assert launched.errors.count("the cache block_causal") == 1 and "Traceback" not in launched.errors  # one process says it
    assert killed.endswith("-9]") and finished == "[0, 0, 0]", launched.errors
    assert launched.output.count('{"recipe"') == 3  # one report a run
    assert [path.name for path in (launched.home / "shared").glob("ledger*")] == ["ledger.jsonl"]
    assert ledger.but_for_times(records_of(launched.home / "shared")) == ledger.but_for_times(records_of(launched.home / "whole"))
    (event,) = ledger.contents(launched.home / "shared" / "ledger.jsonl").events
    assert event.what == "measured" and event.values["processes"] == 3 and 0 < event.values["answers"] < 14


def test_a_full_disk_ends_the_run_and_the_same_command_continues(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    command = ["compare", str(recipe), *TWO_ROWS]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))  # a file that may not grow: the write stops in a line, as on a full disk
    try:
        assert cli.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shown = capsys.readouterr()
    assert "cannot write" in shown.err and "What it held is kept" in shown.err and "Traceback" not in shown.err and shown.out == ""
    path = tmp_path / "run" / "ledger.jsonl"
    kept = records_of(path.parent)
    assert 0 < len(kept) < 8 and path.read_bytes().endswith(b"\n")  # the half batch was taken out again
    assert cli.main(command) == 0
    assert records_of(path.parent)[: len(kept)] == kept and len(records_of(path.parent)) == 8
    capsys.readouterr()


def full_memory(monkeypatch: pytest.MonkeyPatch, most: int, never: int | None = None) -> list[int]:
    """Decoding fails for more than `most` rows at once, and for problem `never` always. Returns the sizes of all attempts."""
    decode, sizes = measure._decode, []

    def limited(row: measure.Row, batch: Sequence[int], run: measure.RunOptions) -> Any:
        sizes.append(len(batch))
        if len(batch) > most and len(sizes) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice")
        if len(batch) > most or never in batch:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")
        return decode(row, batch, run)

    monkeypatch.setattr(measure, "_decode", limited)
    return sizes


def test_out_of_memory_halves_the_batch_and_goes_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", str(recipe), *ONE_ROW, "report.html=true"]
    with monkeypatch.context() as patched:
        sizes = full_memory(patched, most=2, never=1)
        assert cli.main(command) == 0
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    shown = capsys.readouterr()
    assert "vanilla: out of memory with 6 problems in a batch (CUDA out of memory" in shown.err and "goes on with 3" in shown.err
    assert "does not fit into memory, alone" in shown.err and "1 of 6 problems have no answer" in shown.err
    header, records = ledger.read(tmp_path / "run" / "ledger.jsonl")
    with warnings.catch_warnings(action="error"):
        order_figure(records)  # an answer without tokens has a picture
    assert [bool(record.failed) for record in records] == [False, True, False, False, False, False]
    assert [(record.batch, record.batch_rows) for record in records] == [(0, 1)] * 6
    assert any("out of memory with 6 problems" in note for note in header.notes)  # so the reports say it, too
    (row,) = json.loads(shown.out.splitlines()[-1])["rows"]
    assert (row["problems"], row["failed"], row["batch_size"]) == (6, 1, 1) and row["nfe"] == 8.0

    # given again: the failure stands, nothing is decoded
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    assert cli.main(command) == 0
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before
    capsys.readouterr()


def test_a_rerun_starts_with_the_batch_that_fitted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", str(recipe), *ONE_ROW, "run.batch_size=4"]
    with monkeypatch.context() as patched:
        full_memory(patched, most=2)
        append, written = ledger.Ledger.append, []

        def interrupted(self: ledger.Ledger, batch: Sequence[ledger.Record]) -> None:
            append(self, batch)
            written.append(len(batch))
            raise KeyboardInterrupt

        patched.setattr(ledger.Ledger, "append", interrupted)
        assert cli.main(command) == 130
        assert written == [2]
    with monkeypatch.context() as patched:
        sizes = full_memory(patched, most=2)
        assert cli.main(command) == 0
    assert sizes == [2, 2]  # not 4 again
    assert [(record.batch, record.batch_rows) for record in records_of(tmp_path / "run")] == [(0, 2)] * 4 + [(1, 2)] * 2
    capsys.readouterr()


def test_other_errors_are_not_taken_for_memory(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(measure, "_decode", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.main(["compare", str(recipe), *ONE_ROW])


def test_models_that_do_not_fit_are_one_message(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_toolkit.models.transformer import Transformer

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Transformer, "to", full)
    assert cli.main(["compare", str(recipe), *ONE_ROW]) == 2
    assert "vanilla: its models do not fit on cpu" in capsys.readouterr().err
