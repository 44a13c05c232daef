"""What ends a comparison too early, and what the same command makes of it: kill -9, a full disk, memory that runs out."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_toolkit import cli
from dllm_toolkit.evaluation import ledger, measure
from tests.cli.test_compare import RECIPE, models  # noqa: F401 - a fixture

SHORT = ("run.max_new_tokens=8", "run.warm_up=0", "baselines={}")
TWO_ROWS = (
    *SHORT,
    "run.batch_size=2",
    "configurations={vanilla: {model: teacher, decoder: vanilla}, semi_ar: {model: teacher, decoder: semi_ar}}",
)
ONE_ROW = (*SHORT, "run.batch_size=6", "configurations={vanilla: {model: teacher, decoder: vanilla}}", "task.size=6")

KILLED = """
import os, signal, sys
from dllm_toolkit import cli
from dllm_toolkit.evaluation import compare, ledger, measure


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_first_line():
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


# Processes of one that has imported everything: a start takes as long as all the rest.
for point in (before_the_first_line, lambda: in_the_middle_of_a_line(3), lambda: while_decoding(2), lambda: in_the_middle_of_a_line(1)):
    child = os.fork()
    if child == 0:
        point()
        os._exit(cli.main(sys.argv[1:]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:  # noqa: F811
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(models=models, output=tmp_path / "run"))
    return path


def records_of(directory: Path) -> list[ledger.Record]:
    return ledger.read(directory / "ledger.jsonl")[1]


def test_kill_nine_and_continue(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "compare", str(recipe), *TWO_ROWS],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 4, done.stderr
    path = tmp_path / "run" / "ledger.jsonl"
    kept = records_of(path.parent)
    assert len(kept) == 6 and not path.read_bytes().endswith(b"\n")  # 2 batches, 1 more, and three quarters of one
    assert cli.main(["compare", str(recipe), *TWO_ROWS]) == 0
    shown = capsys.readouterr()
    assert "already holds 6 of 8" in shown.err and "unfinished batch" in shown.err
    records = records_of(path.parent)
    assert len(records) == 8 and records[:6] == kept  # what was measured is kept, with its times

    # the same as a run that nobody killed, but for times: the order of the lines, too
    assert cli.main(["compare", str(recipe), *TWO_ROWS, f"output={tmp_path / 'whole'}"]) == 0
    assert ledger.but_for_times(records) == ledger.but_for_times(records_of(tmp_path / "whole"))
    line = json.loads((tmp_path / "whole" / "ledger.jsonl").read_text().splitlines()[-1])
    assert line["tokens_per_forward"] == line["tokens"] / line["nfe"] and line["peak_memory"] > 2**20
    header = ledger.read(path)[0]
    assert (header.batch_size, header.warm_up) == (2, 0)


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
    command = ["compare", str(recipe), *ONE_ROW, "report.html=true", "report.tensorboard=true"]
    with monkeypatch.context() as patched:
        sizes = full_memory(patched, most=2, never=1)
        assert cli.main(command) == 0
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    shown = capsys.readouterr()
    assert "vanilla: out of memory with 6 problems in a batch (CUDA out of memory" in shown.err and "goes on with 3" in shown.err
    assert "does not fit into memory, alone" in shown.err and "1 of 6 problems have no answer" in shown.err
    header, records = ledger.read(tmp_path / "run" / "ledger.jsonl")
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
