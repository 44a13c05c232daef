"""The ledger: counting by hand, resuming, refusing. Every refusal must leave the file as it was."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import IO

import pytest

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import ledger, provenance
from dllm_toolkit.evaluation.ledger import Header, LedgerError, Record

RECIPE = {"task": {"_component_": "stories", "size": 4}, "run": {"max_new_tokens": 8, "batch_size": 2}, "output": "runs/a"}


def header(recipe: dict = RECIPE, **changes: object) -> Header:
    fixed: dict = {"made_of": {"code": "c1", "weights.teacher": "w1"}, "made_on": {"device": "d", "threads": 1}}
    return Header(recipe_hash=ledger.recipe_hash(recipe), recipe=recipe, **{**fixed, **changes})


def record(configuration: str = "a", problem: str = "p0", batch: int = 0, **changes: object) -> Record:
    base = Record(
        configuration=configuration,
        problem=problem,
        prompt="question",
        reference="answer",
        prompt_hash="00",
        prompt_tokens=3,
        output=(5, 6, 1, 1),
        pieces=("five", " six", "<eos>"),
        text="five six",
        correct=True,
        steps_right=1.0,
        exact=True,
        nfe=2,
        tokens=3,
        canvas_tokens=4,
        lanes=8,
        steps=2,
        commits=3,
        forced=0,
        edits=0,
        born=(0, 0, 1, -1),
        seconds=0.25,
        batch=batch,
        batch_rows=2,
        batch_seconds=0.5,
        seed=0,
    )
    return dataclasses.replace(base, **changes)


def pair(configuration: str, batch: int, **changes: object) -> list[Record]:
    return [record(configuration, f"p{2 * batch + row}", batch, **changes) for row in range(2)]


# --- counting


def test_answer_tokens_counts_up_to_and_including_the_first_end() -> None:
    assert ledger.answer_tokens([5, 6, 1, 1, 1], [1]) == 3
    assert ledger.answer_tokens([1, 1], [1]) == 1
    assert ledger.answer_tokens([5, 6, 7], [1]) == 3
    assert ledger.answer_tokens([5, 9, 1], [1, 9]) == 2
    assert ledger.answer_tokens([], [1]) == 0


def test_summaries_by_hand() -> None:
    rows = [
        record("ar", "p0", nfe=3, tokens=3, seconds=0.5, batch_seconds=1.0, born=(0, 1, 2, -1)),
        record(
            "ar", "p1", nfe=5, tokens=5, seconds=0.5, batch_seconds=1.0, correct=False, steps_right=0.5, exact=False, born=(0, 1, 2, 3, 4)
        ),
        record("fast", "p0", nfe=1, tokens=3, seconds=0.1, batch_seconds=0.2, commits=4, forced=1),
        record("fast", "p1", nfe=3, tokens=3, seconds=0.1, batch_seconds=0.2, commits=4, forced=1),
    ]
    slow, fast = ledger.summarise(rows, autoregressive="ar", vanilla="missing")
    assert (slow.name, slow.problems, slow.accuracy, slow.steps_right, slow.exact) == ("ar", 2, 0.5, 0.75, 0.5)
    assert slow.tokens_per_second == pytest.approx(8.0) and slow.latency == pytest.approx(1.0) and slow.nfe == 4.0
    assert slow.order_local == slow.order_global == 1.0
    # a ratio of sums, with the mean over rows beside it: 6 / 4 and (3 + 1) / 2
    assert fast.tokens_per_forward == pytest.approx(1.5) and fast.tokens_per_forward_mean == pytest.approx(2.0)
    assert fast.tokens_per_second == pytest.approx(30.0) and fast.speedup_vs_ar == pytest.approx(3.75)
    assert fast.forced_share == pytest.approx(0.25)
    assert slow.speedup_vs_ar == 1.0 and slow.speedup_vs_vanilla is None


def test_accuracy_interval() -> None:
    low, high = ledger.accuracy_interval([True] * 30 + [False] * 2)
    assert 0.8 < low < 30 / 32 < high <= 1.0
    assert (low, high) == ledger.accuracy_interval([True] * 30 + [False] * 2)  # a fixed seed
    assert ledger.accuracy_interval([True] * 32) == (pytest.approx(0.8911, abs=1e-4), 1.0)
    assert ledger.accuracy_interval([False] * 32) == (0.0, pytest.approx(0.1089, abs=1e-4))
    assert ledger.accuracy_interval([]) == (0.0, 1.0)


def test_hash_ignores_presentation_and_key_order_only() -> None:
    shown = {"output": "elsewhere", "report": {"html": False}, **{key: RECIPE[key] for key in ("run", "task")}}
    assert ledger.recipe_hash(shown) == ledger.recipe_hash(RECIPE)
    assert ledger.recipe_hash({**RECIPE, "run": {"max_new_tokens": 9, "batch_size": 2}}) != ledger.recipe_hash(RECIPE)


# --- the file


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    rows = pair("a", 0, text='quote " \n line \u2028 <b>', extra={"steps": 2})
    with ledger.open_ledger(path, header()) as book:
        assert book.records == ()
        book.append(rows)
        assert ledger.read(path) == (header(), rows)  # on the disk before the ledger is closed
    with ledger.open_ledger(path, header()) as book:
        assert list(book.records) == rows
        book.append(pair("a", 1))
    assert len(ledger.read(path)[1]) == 4


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_cut_last_batch_is_dropped_and_measured_again(tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger.jsonl"
    with ledger.open_ledger(path, header()) as book:
        book.append(pair("a", 0))
        book.append(pair("a", 1))
    path.write_bytes(path.read_bytes()[:-cut])
    assert ledger.read(path)[1] == pair("a", 0)
    with ledger.open_ledger(path, header()) as book:
        assert list(book.records) == pair("a", 0)
        book.append(pair("a", 1))
    assert "unfinished batch" in capsys.readouterr().err
    assert ledger.read(path)[1] == [*pair("a", 0), *pair("a", 1)]


def refuse(path: Path, new: Header, match: str) -> None:
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=match), ledger.open_ledger(path, new):
        pass
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ledger.open_ledger(path, header()) as book:
        book.append(pair("a", 0))
    other = {**RECIPE, "run": {"max_new_tokens": 16, "batch_size": 2}, "cache": "dual"}
    refuse(path, header(other), r"run.max_new_tokens 8 -> 16, cache \(absent\) -> \"dual\".*Write output=")
    with ledger.open_ledger(path, header({**RECIPE, "output": "runs/b"})) as book:  # presentation: continues
        assert len(book.records) == 2


def test_other_code_weights_or_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ledger.open_ledger(path, header()) as book:
        book.append(pair("a", 0))
    refuse(path, header(made_of={"code": "c1", "weights.teacher": "w2"}), "other code or weights: weights.teacher")
    refuse(path, header(made_on={"device": "d", "threads": 2}), "another machine or set-up: threads 1 -> 2")


@pytest.mark.parametrize("content", ["", "hello\n", "{}\n", '{"kind": "record"}\n', "[1]\n", '{"kind": "header"}\n', "\x00\x00"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(content)
    refuse(path, header(), "ledger")


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ledger.open_ledger(path, header()) as book:
        book.append(pair("a", 0))
        book.append(pair("a", 1))
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:2], b"nonsense\n", *whole[3:]]))
    refuse(path, header(), "line 3")
    path.write_bytes(b"".join([*whole[:2], *whole[3:]]))
    refuse(path, header(), "batch 0 of a has 1 of 2")
    path.write_bytes(b"".join([*whole, *whole[1:3]]))
    refuse(path, header(), "twice")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ledger.open_ledger(path, header()):
        refuse(path, header(), "another run")
    with ledger.open_ledger(path, header()):
        pass


def test_two_runs_that_start_in_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run renames its new file over ours between our rename and our lock: our records would go to a file without a name."""
    path = tmp_path / "ledger.jsonl"
    lock = ledger.lock

    def late(stream: IO[bytes], where: Path) -> None:
        lock(stream, where)
        (tmp_path / "other").write_bytes(where.read_bytes())
        os.replace(tmp_path / "other", where)

    monkeypatch.setattr(ledger, "lock", late)
    with pytest.raises(LedgerError, match="another run"), ledger.open_ledger(path, header()):
        pass


def test_a_full_disk_is_one_message_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ledger.open_ledger(path, header()) as book:
        book.append(pair("a", 0))
        with monkeypatch.context() as patched:
            patched.setattr(ledger.os, "fsync", full)
            with pytest.raises(LedgerError, match="cannot write .*No space left on device.*Make room"):
                book.append(pair("a", 1))
    assert len(ledger.read(path)[1]) >= 2
    monkeypatch.setattr(ledger.os, "fsync", full)
    with pytest.raises(LedgerError, match="No space left"), ledger.open_ledger(tmp_path / "b" / "ledger.jsonl", header()):
        pass
    assert list((tmp_path / "b").iterdir()) == []


def test_ledger_error_is_a_toolkit_error() -> None:
    assert issubclass(LedgerError, ToolkitError)


def test_kill_nine_loses_at_most_the_open_batch(tmp_path: Path) -> None:
    """A process that appends without end is killed in the middle; what it had appended is there, in whole batches."""
    path = tmp_path / "ledger.jsonl"
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_ledger import header, ledger, pair
        with ledger.open_ledger(Path({str(path)!r}), header()) as book:
            for batch in range(10**6):
                book.append(pair("a", batch, text="x" * 5000))
                print(batch, flush=True)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported = -1
        while reported < 20:
            reported = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
    reported = int(rest[-1]) if rest else reported
    with ledger.open_ledger(path, header()) as book:
        assert len(book.records) % 2 == 0 and len(book.records) >= 2 * (reported + 1)
        book.append(pair("b", 0))


# --- provenance


def test_fingerprints_see_weights_values_and_a_researchers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    layer = torch.nn.Linear(300, 200)
    before = provenance.weights_fingerprint(layer)
    assert provenance.weights_fingerprint(layer) == before
    with torch.no_grad():
        layer.weight.mul_(1.0001)
    assert provenance.weights_fingerprint(layer) != before

    file = tmp_path / "fingerprint_rule.py"
    file.write_text("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Rule:\n    budget: float = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import fingerprint_rule  # type: ignore[import-not-found]

    one = provenance.code_fingerprint([fingerprint_rule.Rule()])
    assert provenance.code_fingerprint([fingerprint_rule.Rule()]) == one
    assert provenance.code_fingerprint([fingerprint_rule.Rule(2.0)]) != one
    file.write_text(file.read_text() + "    # a change\n")
    assert provenance.code_fingerprint([fingerprint_rule.Rule()]) != one
    assert provenance.code_fingerprint([{"inside": [fingerprint_rule.Rule()]}]) != provenance.code_fingerprint([{}])


def test_header_is_readable_json(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ledger.open_ledger(path, header()):
        pass
    content = json.loads(path.read_text().splitlines()[0])
    assert content["counting"] == list(ledger.COUNTING) and content["recipe"] == RECIPE
