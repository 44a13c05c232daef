"""Measuring: decode the problems of each row batch by batch, time them, and hand the records to the ledger.

Only the row's driver (`decode`, if it names none) runs between two readings of its clock; grading, text and the ledger come after. A row
is warmed up first, with batches of its own size, since the first calls of a library or a compiled graph would otherwise be counted as
decoding. Where memory runs out, batches become smaller and the run goes on (room.py).
"""

import contextlib
import functools
import gc
import hashlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import Output
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.drivers.base import Denoise, Driver
from dllm_toolkit.engine import whether_to_compile
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import ledger, provenance
from dllm_toolkit.evaluation.ledger import Event, Ledger, Record
from dllm_toolkit.evaluation.processes import ALONE, Processes
from dllm_toolkit.evaluation.room import Room, first_line, ran_out
from dllm_toolkit.evaluation.tasks import Grade, Problem, Task

Templates = tuple[tuple[int | None, ...], ...] | None
"""Of each problem the answer's skeleton, None for what is to be decoded; or None where answers have no skeleton."""
MOST_THREADS = 1024  # more than any machine has cores; torch fails without a word far beyond it


class CompareError(ToolkitError):
    """A comparison that cannot be run as its recipe says."""


@dataclass(frozen=True)
class RunOptions:
    """How every row is run.

    max_new_tokens: budget of the answer. batch_size: problems decoded together. seed: problem i uses seed + i. device: cpu, cuda, cuda:1,
    or auto (cuda if there is one). threads: CPU threads, null for torch's own choice. warm_up: problems decoded before the clock starts,
    rounded up to whole batches. compile: compiled steps, on a GPU recorded and replayed; auto: on a GPU, for models that can be recorded.
    The first decode of a shape takes half a minute then (which is not counted), and the others a fraction of their time.
    """

    max_new_tokens: int = 96
    batch_size: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    threads: int | None = None
    warm_up: int = 1
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("warm_up", 0),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CompareError(f"{name} must be at least {least}, got {value}. Write {name}: {least} or more.")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise CompareError(f"threads must be at most {MOST_THREADS}, got {self.threads}. Write threads: 1, or null for torch's choice.")


@dataclass(frozen=True)
class Row:
    """A configuration with its loaded model, encoded prompts, and answers' skeletons for infilling; the driver holds its other models."""

    name: str
    model: Any
    decoder: Decoder
    cache: Cache
    prompts: tuple[tuple[int, ...], ...]
    templates: Templates = None
    driver: Driver = field(default_factory=Denoise)

    @property
    def models(self) -> list[Any]:
        """Everything that must be on the device while the row runs."""
        return [self.model, *(self.driver.other(name) for name in self.driver.other_models)]


def fill(
    book: Ledger,
    rows: Sequence[Row],
    problems: Sequence[Problem],
    task: Task,
    run: RunOptions,
    device: torch.device,
    *,
    done: Collection[tuple[str, str]] | None = None,
    here: Processes = ALONE,
) -> float:
    """Measure what the ledger lacks, batch by batch; models move to `device` and `run.dtype` when their row comes.

    done: (configuration, problem) of what is there; None: what `book` holds. here: of the missing batches this process takes its share, in
    turn with the others. Returns the wall seconds of decoding and grading, without warm-up.
    """
    if done is None:
        done = {(record.configuration, record.problem) for record in book.records}
    total = len(rows) * len(problems)
    if done and here.first:
        rest = "continuing" if len(done) < total else "nothing is measured again; delete the file or write output=... to do so"
        print(f"note: {book.path} already holds {len(done)} of {total} answers; {rest}", file=sys.stderr)
    size = run.batch_size
    batches = [range(start, min(start + size, len(problems))) for start in range(0, len(problems), size)]
    turn, seconds = 0, 0.0
    with _progress(total, len(done), shown=here.first) as tick:
        before: list[Any] = []
        for row in rows:
            # A batch that memory had no room for may be there in part.
            missing = [(number, [i for i in batch if (row.name, problems[i].id) not in done]) for number, batch in enumerate(batches)]
            missing = [(number, batch) for number, batch in missing if batch]
            # Turns go on over rows, so that no process takes the first batch, which is the largest, of all of them.
            turn, missing = turn + len(missing), missing[(here.rank - turn) % here.count :: here.count]
            if not missing:
                continue
            before = _place(row, before, run, device)
            tick(row.name, 0)
            room = _room(book, row, run, here)
            for batch in batches[: -(-run.warm_up // size)]:
                for _ in room.parts(batch, functools.partial(_decode, row, run=run)):
                    pass
            gc.collect()
            clock = time.perf_counter()
            for number, batch in missing:
                for part, measured in room.parts(batch, functools.partial(_measured, row, run=run, device=device)):
                    if measured is None:
                        room.told(f"{problems[part[0]].id} does not fit into memory, alone ({room.problem}); recorded as failed", room.size)
                    book.append(_records(row, number, part, problems, task, run, measured))
                    tick(row.name, len(part))
            seconds += time.perf_counter() - clock
    return seconds


def _place(row: Row, before: Sequence[Any], run: RunOptions, device: torch.device) -> list[Any]:
    """The row's models on the device, those of the row before off a GPU."""
    for model in before if device.type != "cpu" else ():
        if all(model is not other for other in row.models):
            model.to("cpu")
    try:
        for model in row.models:
            model.to(device=device, dtype=getattr(torch, run.dtype))
    except Exception as error:
        if not ran_out(error):
            raise
        raise CompareError(
            f"{row.name}: its models do not fit on {device} ({first_line(error)}). What was measured is kept, and the same command "
            "continues. Free memory there, or write another run.device, or a run.dtype of fewer bytes."
        ) from error
    return row.models


def _room(book: Ledger, row: Row, run: RunOptions, here: Processes) -> Room:
    """As much as an earlier process of this run found room for. What changes is told on the terminal and in the ledger."""

    def told(text: str, size: int) -> None:
        place = "" if here.count == 1 else f"process {here.rank}: "
        print(f"note: {place}{row.name}: {text}", file=sys.stderr, flush=True)
        book.note(Event("out_of_memory", f"{row.name}: {text}", row.name, {"batch_size": size}, provenance.now()))

    earlier = [int(event.values["batch_size"]) for event in book.events if event.configuration == row.name]
    return Room(min([run.batch_size, *earlier]), told)


def find_device(name: str, here: Processes = ALONE) -> torch.device:
    """The device that a recipe names; of several processes each gets a GPU of its own. Raises CompareError."""
    if here.count > 1:
        return _own_device(name, here)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CompareError(f"run.device is no device, got {name!r}. Write device: cpu, cuda, cuda:1 or auto.") from error
    if device.type not in ("cpu", "cuda"):
        raise CompareError(f"run.device is no device that decoding was tried on, got {name!r}. Write device: cpu, cuda, cuda:1 or auto.")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise CompareError(
            f"run.device is not on this machine, got {name!r}: {torch.cuda.device_count()} CUDA devices here. Write device: auto or cpu."
        )
    return device


def _own_device(name: str, here: Processes) -> torch.device:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there else "cpu"
    device = find_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise CompareError(f"run.device names one GPU, got {name!r} for {here.count} processes. They would share it. Write device: cuda.")
    if there < here.local:
        raise CompareError(f"{here.local} processes of this machine need a GPU each, got {there}. Start fewer: --nproc_per_node {there}.")
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


def _measured(row: Row, batch: Sequence[int], run: RunOptions, device: torch.device) -> tuple[Output, int | None]:
    """The answers of a batch, and the most bytes that it needed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    output = _decode(row, batch, run)
    if device.type == "cuda":
        return output, torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return output, None
    import resource

    return output, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _decode(row: Row, batch: Sequence[int], run: RunOptions) -> Output:
    return row.driver.run(
        row.model,
        row.decoder,
        [list(row.prompts[index]) for index in batch],
        max_new_tokens=run.max_new_tokens if row.templates is None else None,
        templates=None if row.templates is None else [row.templates[index] for index in batch],
        cache=row.cache,
        seed=[run.seed + index for index in batch],
        compile=whether_to_compile(run.compile, row.model),
    )


def _records(
    row: Row,
    number: int,
    batch: Sequence[int],
    problems: Sequence[Problem],
    task: Task,
    run: RunOptions,
    measured: tuple[Output, int | None] | None,
) -> list[Record]:
    if measured is None:
        return [_failed(row, number, index, problems[index], run) for index in batch]
    output, peak_memory = measured
    spec, tokenizer, stats = row.model.spec, row.model.tokenizer, output.stats
    born, begins = output.born.tolist(), output.begin.tolist()
    records = []
    for index, problem_index in enumerate(batch):
        problem, prompt, ids = problems[problem_index], row.prompts[problem_index], output.tokens[index]
        counted = ledger.answer_tokens(ids, spec.eos_ids)
        body = ids[:counted]
        raw, text, grade = judged(tokenizer, spec.eos_ids, task, problem, ids)
        records.append(
            Record(
                configuration=row.name,
                problem=problem.id,
                prompt=problem.prompt,
                reference=problem.reference,
                prompt_hash=_hash(problem),
                prompt_tokens=len(prompt),
                output=tuple(ids),
                pieces=_pieces(tokenizer, body),
                text=text,
                correct=bool(grade.correct),
                steps_right=float(grade.steps_right),
                exact=bool(grade.exact),
                nfe=int(stats.nfe[index]),
                tokens=counted,
                canvas_tokens=len(ids),
                lanes=round(stats.computed[index]),
                steps=int(stats.steps[index]),
                commits=int(stats.commits[index]),
                forced=int(stats.forced[index]),
                edits=int(stats.edits[index]),
                born=tuple(born[index][begins[index] : begins[index] + len(ids)]),
                seconds=stats.seconds / len(batch),
                batch=number,
                batch_rows=len(batch),
                batch_seconds=stats.seconds,
                seed=run.seed + problem_index,
                raw_text=raw,
                given=_given(row, problem_index, index, counted, output),
                extra={**grade.extra, **{name: values[index] for name, values in stats.extra.items() if name != "given"}},
                peak_memory=peak_memory,
            )
        )
    return records


class Judged(NamedTuple):
    """An answer's text, the part of it that was graded, and the verdict."""

    raw: str
    text: str
    grade: Grade


def judged(tokenizer: Any, eos_ids: Sequence[int], task: Task, problem: Problem, ids: Sequence[int]) -> Judged:
    """Text and grade of an answer: up to and without the first end of text, then up to the task's first stop string."""
    body = ids[: ledger.answer_tokens(ids, eos_ids)]
    raw = tokenizer.decode(body[:-1] if body and body[-1] in eos_ids else body, skip_special_tokens=True)
    text = task.cut(raw)
    return Judged(raw, text, task.grade(problem, text))


def _failed(row: Row, number: int, index: int, problem: Problem, run: RunOptions) -> Record:
    """A problem that memory does not suffice for: a wrong answer that took nothing."""
    counts = dict.fromkeys(("nfe", "tokens", "canvas_tokens", "lanes", "steps", "commits", "forced", "edits"), 0)
    return Record(
        configuration=row.name,
        problem=problem.id,
        prompt=problem.prompt,
        reference=problem.reference,
        prompt_hash=_hash(problem),
        prompt_tokens=len(row.prompts[index]),
        output=(),
        pieces=(),
        text="",
        correct=False,
        steps_right=0.0,
        exact=False,
        born=(),
        seconds=0.0,
        batch=number,
        batch_rows=1,
        batch_seconds=0.0,
        seed=run.seed + index,
        failed="out of memory",
        **counts,
    )


def _hash(problem: Problem) -> str:
    return hashlib.sha256(problem.prompt.encode()).hexdigest()[:16]


def _given(row: Row, problem: int, index: int, counted: int, output: Output) -> int:
    """Of the counted tokens those that were pinned by the task or written by the driver."""
    pinned = 0 if row.templates is None else sum(one is not None for one in row.templates[problem][:counted])
    return pinned + (int(output.stats.extra["given"][index]) if "given" in output.stats.extra else 0)


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds, so that a page can colour an answer token by token: the pieces join to the decoded text."""
    pieces, before = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False)
        # A character whose bytes span tokens shows as U+FFFD until its last token: let that token carry it.
        whole = text.rstrip("\ufffd") if count < len(ids) else text
        pieces.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return tuple(pieces)


@contextlib.contextmanager
def _progress(total: int, done: int, shown: bool = True) -> Iterator[Callable[[str, int], None]]:
    """Yields tick(configuration, answers): a bar on stderr; where stderr is no terminal, a line as each configuration starts."""
    if not shown:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total, completed=done)
        count = done

        def tick(name: str, answers: int) -> None:
            nonlocal count
            if not console.is_terminal and answers == 0:
                print(f"{name}: starting, {count} of {total} answers so far", file=sys.stderr, flush=True)
            count += answers
            bar.update(task, description=name, advance=answers)

        yield tick
