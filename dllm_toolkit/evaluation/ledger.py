"""The ledger: one JSON line a problem and configuration, and the only place that counts tokens, forwards and seconds.

(Over 400 lines: what a line holds, how lines are counted, and how they reach the disk are one contract.)

A comparison is only as good as its counting, so the rules stand here once (COUNTING) and travel in the header of every ledger.
A ledger is appended to batch by batch, flushed and fsynced, and belongs to one recipe, one set of weights, one code, one machine:
after a kill the same command continues where the file ends; anything else is refused and the file is left as it is. What happens to a
run beside its answers (memory that ran out) is a line between batches, an `Event`. Several processes write a file each (shards.py).
Tables, pictures and TensorBoard are made from a ledger alone.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.answers import diversity, perplexity
from dllm_toolkit.evaluation.order import global_order, local_order
from dllm_toolkit.evaluation.statistics import accuracy_interval

COUNTING: tuple[str, ...] = (
    "forwards (nfe): model invocations of a row until that row finished, prefill included",
    "tokens: answer tokens up to and including the first end of text; all if there is none; no padding, nothing that was given",
    "tokens per forward: sum of tokens / sum of forwards over the problems (a ratio of sums; the mean over rows stands beside it)",
    "tokens per second: sum of tokens / sum of wall seconds of the batches; prefill included, loading and warm-up excluded",
    "latency: wall seconds from handing over a batch to its last answer, mean over problems",
    "lanes: query tokens that went through the model for a row",
    "peak memory: most bytes that tensors took on the GPU while a batch was decoded, models included; CPU: largest size of the process",
    "failed: a problem that does not fit into memory even alone; it counts as wrong, and in no mean of forwards, tokens or seconds",
    "accuracy: share of problems whose final answer is right; interval: 95 % bootstrap over the problems",
    "diversity: entropy of the right answers' choices over the largest possible, mean over answers with a choice; 1 is even",
    "perplexity: exp of (sum of nats / sum of tokens) of the answers under the task's judge",
    "speed-up: ratio of tokens per second to the named baseline row of the same ledger",
)
"""What every number in a ledger, a table or a picture means."""

MEASURED = ("seconds", "batch_seconds", "peak_memory")
"""What differs between two runs of one recipe on one machine; everything else of a record repeats where nothing is drawn at random."""

PRESENTATION = frozenset({"output", "report", "sweep"})
"""Recipe keys that change where and how results are shown, never what they are: not part of the hash."""


class LedgerError(ToolkitError):
    """A ledger that cannot be continued or read."""


@dataclass(frozen=True)
class Header:
    """Which recipe made a ledger, out of what, and on what. `made_of` and `made_on` must agree to continue it."""

    recipe_hash: str
    recipe: Mapping[str, Any]
    made_of: Mapping[str, str] = field(default_factory=dict)  # fingerprints: code, weights of each model
    made_on: Mapping[str, Any] = field(default_factory=dict)  # device, threads, dtype
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""
    batch_size: int = 1
    warm_up: int = 0  # problems of each configuration that were decoded before its clock started
    configurations: tuple[str, ...] = ()
    baselines: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counting: tuple[str, ...] = COUNTING
    schema: int = 2


@dataclass(frozen=True)
class Record:
    """One problem under one configuration. Tokens and positions are answer-relative."""

    configuration: str
    problem: str
    prompt: str
    reference: str
    prompt_hash: str
    prompt_tokens: int
    output: tuple[int, ...]  # answer ids, the whole budget
    pieces: tuple[str, ...]  # text of each counted token
    text: str  # the answer up to, and without, the end of text or the task's first stop string: what was graded
    correct: bool
    steps_right: float
    exact: bool
    nfe: int
    tokens: int  # counted: up to and including the first end of text
    canvas_tokens: int  # the whole budget
    lanes: int
    steps: int
    commits: int
    forced: int
    edits: int
    born: tuple[int, ...]  # row-step at which each answer token was written, -1: fill
    seconds: float  # batch_seconds / batch_rows, so that seconds add up to wall time
    batch: int
    batch_rows: int
    batch_seconds: float
    seed: int
    raw_text: str = ""  # the same without regard to stop strings
    given: int = 0  # of `tokens`, those that stood in the answer without the model's doing: pinned by the task, or written by a driver
    extra: Mapping[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None  # bytes, of the batch; None where nobody can tell
    failed: str = ""  # why there is no answer

    @property
    def tokens_per_forward(self) -> float:
        """Of this row alone; 0 without a forward."""
        return _ratio(self.tokens - self.given, self.nfe)


@dataclass(frozen=True)
class Event:
    """What happened to a run beside its answers. text: for people. values: for programs.

    what: `out_of_memory` (values: batch_size, the largest of this configuration from here on), or `measured` (values: answers, processes,
    seconds: wall time of decoding and grading without warm-up, in the process that took longest).
    """

    what: str
    text: str
    configuration: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    date: str = ""


@dataclass(frozen=True)
class Summary:
    """What a configuration achieved over its problems; see COUNTING. Shares lie in 0..1, times are seconds."""

    name: str
    problems: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    steps_right: float
    exact: float
    tokens_per_second: float
    tokens_per_forward: float
    tokens_per_forward_mean: float
    nfe: float
    latency: float
    lanes: float
    forced_share: float
    order_local: float
    order_global: float
    tokens: int
    seconds: float
    batch_size: int
    speedup_vs_ar: float | None = None
    speedup_vs_vanilla: float | None = None
    diversity: float | None = None  # 0..1, of tasks whose answers have a choice
    perplexity: float | None = None  # of tasks with a judge
    failed: int = 0  # of `problems`, those without an answer
    peak_memory: int | None = None  # bytes


def answer_tokens(ids: Sequence[int], eos_ids: Sequence[int]) -> int:
    """Tokens that count: up to and including the first end of text; all of them if there is none."""
    return next((index + 1 for index, token in enumerate(ids) if token in eos_ids), len(ids))


def recipe_hash(resolved: Mapping[str, Any]) -> str:
    """Hex digest of a resolved recipe without its presentation keys; the order of keys does not matter."""
    return hashlib.sha256(_canonical(_counted_keys(resolved)).encode()).hexdigest()[:16]


def summarise(records: Sequence[Record], *, autoregressive: str | None = None, vanilla: str | None = None) -> list[Summary]:
    """One summary a configuration, in the order of first appearance; speed-ups against the two named baselines."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.configuration, []).append(record)
    rates = {name: _ratio(sum(r.tokens - r.given for r in rows), sum(r.seconds for r in rows)) for name, rows in groups.items()}

    def against(name: str, baseline: str | None) -> float | None:
        return None if baseline not in rates or rates[baseline] <= 0 else rates[name] / rates[baseline]

    return [_summary(name, rows, rates[name], against(name, autoregressive), against(name, vanilla)) for name, rows in groups.items()]


def _summary(name: str, rows: list[Record], rate: float, versus_ar: float | None, versus_vanilla: float | None) -> Summary:
    problems = len(rows)
    low, high = accuracy_interval([r.correct for r in rows])
    right, steps_right, exact = sum(r.correct for r in rows), sum(r.steps_right for r in rows), sum(r.exact for r in rows)
    failed = sum(bool(r.failed) for r in rows)
    rows = [r for r in rows if not r.failed]
    count = max(1, len(rows))
    counted = [r.born[: r.tokens] for r in rows]  # the order of padding after the end says nothing
    return Summary(
        name=name,
        problems=problems,
        accuracy=right / problems,
        accuracy_low=low,
        accuracy_high=high,
        steps_right=steps_right / problems,
        exact=exact / problems,
        tokens_per_second=rate,
        tokens_per_forward=_ratio(sum(r.tokens - r.given for r in rows), sum(r.nfe for r in rows)),
        tokens_per_forward_mean=sum(r.tokens_per_forward for r in rows) / count,
        nfe=sum(r.nfe for r in rows) / count,
        latency=sum(r.batch_seconds for r in rows) / count,
        lanes=sum(r.lanes for r in rows) / count,
        forced_share=_ratio(sum(r.forced for r in rows), sum(r.commits for r in rows)),
        order_local=sum(local_order(born) for born in counted) / count,
        order_global=sum(global_order(born) for born in counted) / count,
        tokens=sum(r.tokens - r.given for r in rows),
        seconds=sum(r.seconds for r in rows),
        batch_size=max((r.batch_rows for r in rows), default=0),
        speedup_vs_ar=versus_ar,
        speedup_vs_vanilla=versus_vanilla,
        diversity=diversity([r.extra for r in rows]),
        perplexity=perplexity([(r.extra.get("judge_loss", 0.0), r.extra.get("judge_tokens", 0)) for r in rows]),
        failed=failed,
        peak_memory=max((r.peak_memory for r in rows if r.peak_memory is not None), default=None),
    )


def but_for_times(records: Sequence[Record]) -> list[Record]:
    """The records without what a clock or a memory counter said: what two runs of one recipe have in common."""
    return [replace(record, **dict.fromkeys(MEASURED, 0)) for record in records]


@dataclass(frozen=True)
class Contents:
    """What a ledger holds. end: the byte at which its last whole batch or event ends; what lies behind it is not trusted."""

    header: Header
    records: list[Record]
    events: list[Event]
    end: int


def read(path: Path) -> tuple[Header, list[Record]]:
    """Header and records of whole batches; events are told in the header's notes. An unfinished last batch (a kill) is left out."""
    found = contents(path)
    return replace(found.header, notes=(*found.header.notes, *(event.text for event in found.events))), found.records


@dataclass(frozen=True)
class Ledger:
    """An open ledger: `records` and `events` were there when it was opened; what is appended is on the disk when a method returns."""

    path: Path
    records: tuple[Record, ...]
    stream: IO[bytes]
    events: tuple[Event, ...] = ()

    def append(self, batch: Sequence[Record]) -> None:
        """Add one batch, all of it or nothing. Raises LedgerError; what was there is kept."""
        self._write(b"".join(record_line(record) for record in batch))

    def note(self, event: Event) -> None:
        """Add an event. Raises LedgerError."""
        self._write(event_line(event))

    def only(self, configuration: str) -> "Ledger":
        """The same open file, as far as one configuration is concerned."""
        records = tuple(record for record in self.records if record.configuration == configuration)
        events = tuple(event for event in self.events if event.configuration == configuration)
        return replace(self, records=records, events=events)

    def _write(self, lines: bytes) -> None:
        end = self.stream.tell()
        with written(self.path):
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[self.stream.write(rest) :]
                os.fsync(self.stream.fileno())
            except OSError:
                # Half a batch is trusted by nobody, but what would be appended behind it would be lost with it.
                with contextlib.suppress(OSError):
                    self.stream.truncate(end)
                    self.stream.seek(end)
                raise


def record_line(record: Record) -> bytes:
    """A record as it stands in the file. Tokens per forward, a quotient of two fields, is there for other readers."""
    return _line("record", {**asdict(record), "tokens_per_forward": record.tokens_per_forward})


def event_line(event: Event) -> bytes:
    """An event as it stands in the file."""
    return _line("event", asdict(event))


def header_line(header: Header) -> bytes:
    """The first line of a file."""
    return _line("header", asdict(header))


@contextlib.contextmanager
def open_ledger(path: Path, header: Header) -> Iterator[Ledger]:
    """Start a ledger, or continue one that the same recipe, weights, code and machine made.

    Errors: LedgerError if the file is not a ledger, another run writes it, or it was made otherwise; it is not touched then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(f"cannot make the directory {path.parent} ({error}). Write output=... for another one.") from error
    if not path.exists():
        # Written aside and renamed: a ledger with half a header never exists, however early the kill.
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with written(path), fresh.open("wb") as stream:
                stream.write(header_line(header))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    with path.open("r+b", buffering=0) as stream:  # unbuffered: what a full disk refused is not tried again when the file is closed
        lock(stream, path)
        if os.fstat(stream.fileno()).st_ino != path.stat().st_ino:  # a run that started in the same moment renamed its file over ours
            raise _busy(path)
        found = contents(path)
        require_same(path, found.header, header)
        if found.end < path.stat().st_size:
            print(
                f"note: {path} ends in an unfinished batch (its run was stopped); that batch is measured again",
                file=sys.stderr,
            )
            stream.truncate(found.end)
        stream.seek(0, os.SEEK_END)
        yield Ledger(path, tuple(found.records), stream, tuple(found.events))


def contents(path: Path) -> Contents:
    """Everything in a ledger that can be trusted. Raises LedgerError for a file that is none, or was damaged."""
    lines = path.read_bytes().splitlines(keepends=True)
    header = _parse(lines[0], path, 1, Header, "header") if lines and lines[0].endswith(b"\n") else None
    if not isinstance(header, Header):
        raise LedgerError(f"{path} is not a ledger: it does not start with a header. Write output=... to use another directory.")
    records: list[Record] = []
    events: list[Event] = []
    batch: list[Record] = []
    position = end = len(lines[0])
    for number, line in enumerate(lines[1:], start=2):
        if not line.endswith(b"\n") and number == len(lines):
            break
        if not batch and line.startswith(_EVENT):
            event = _parse(line, path, number, Event, "event")
            assert isinstance(event, Event)
            events.append(event)
            position = end = position + len(line)
            continue
        record = _parse(line, path, number, Record, "record")
        assert isinstance(record, Record)
        if batch and (record.configuration, record.batch) != (batch[0].configuration, batch[0].batch):
            raise LedgerError(
                f"{path}, line {number}: batch {batch[0].batch} of {batch[0].configuration} has {len(batch)} of "
                f"{batch[0].batch_rows} records. The file was edited or written twice. Write output=... to start another ledger."
            )
        batch.append(record)
        position += len(line)
        if len(batch) == record.batch_rows:
            records += batch
            batch, end = [], position
    seen: set[tuple[str, str]] = set()
    for record in records:
        if (record.configuration, record.problem) in seen:
            raise LedgerError(
                f"{path} holds {record.problem} of {record.configuration} twice. A repeated record would be counted twice. "
                "Write output=... to start another ledger."
            )
        seen.add((record.configuration, record.problem))
    return Contents(header, records, events, end)


def _parse(line: bytes, path: Path, number: int, into: type[Header | Record | Event], kind: str) -> Header | Record | Event:
    try:
        content = json.loads(line)
        if content.pop("kind") != kind:
            raise ValueError(f"not a {kind}")
        known = {f.name for f in fields(into)}
        tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items() if key in known}
        return into(**tuples)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"{path}, line {number} is not a ledger {kind} ({error}). The file is damaged or something else. "
            "Write output=... to use another directory."
        ) from error


def require_same(path: Path, old: Header, new: Header) -> None:
    """Raises LedgerError if two headers are of runs that do not belong into one ledger."""
    advice = f"Its records are kept. Write output=... for another directory, or delete {path.name} to measure again."
    if old.recipe_hash != new.recipe_hash:
        differing = _differences(_counted_keys(old.recipe), _counted_keys(new.recipe))
        raise LedgerError(f"{path} belongs to another recipe: {differing} (there -> here). {advice}")
    for what, there, here in (
        ("other code or weights", old.made_of, new.made_of),
        ("another machine or set-up", old.made_on, new.made_on),
    ):
        if dict(there) != dict(here):
            raise LedgerError(f"{path} was made by {what}: {_differences(there, here)} (there -> here). {advice}")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], most: int = 5) -> str:
    left, right = _flat(there), _flat(here)
    keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    listed = ", ".join(f"{key} {_short(left, key)} -> {_short(right, key)}" for key in keys[:most])
    return listed + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: node}


def _short(flat: Mapping[str, object], key: str) -> str:
    text = json.dumps(flat[key], default=str) if key in flat else "(absent)"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _counted_keys(resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resolved.items() if key not in PRESENTATION}


def _canonical(node: object) -> str:
    return json.dumps(node, sort_keys=True, separators=(",", ":"), default=str)


_EVENT = b'{"kind": "event"'


def _line(kind: str, content: Mapping[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **content}, default=str, ensure_ascii=False).encode() + b"\n"


def lock(stream: IO[bytes], path: Path) -> None:
    """Raises LedgerError if another process has the file: two runs appending to one ledger would interleave batches.

    The lock goes with its process, even a killed one: nothing stale is left behind.
    """
    if sys.platform == "win32":  # no advisory locks there; everything else works
        return
    import fcntl

    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(path) from error


def _busy(path: Path) -> LedgerError:
    return LedgerError(f"{path} is being written by another run. Wait for it, or write output=... for this one.")


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """A full disk is the user's to solve: whole batches that are already there stay, and the same command continues."""
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"cannot write {path} ({error.strerror or error}). What it held is kept. Make room, or write output=... for another place."
        ) from error


def _ratio(numerator: float | int, denominator: float | int) -> float:
    return numerator / denominator if denominator else 0.0
