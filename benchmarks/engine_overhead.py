"""What does a step cost besides the model's forward? Microseconds of Python and small operations, on the CPU, without compilation.

    python benchmarks/engine_overhead.py                     every decoder with every cache that its needs allow, 1 and 8 rows
    python benchmarks/engine_overhead.py --rows 1 --steps 20 --decoders semi_ar d2f --caches none dual

The model costs nothing: it returns logits that are ready, the same for every position. So everything that is measured is ours, at sizes
where an operation's cost is its call (vocabulary 512, prompt 64, 128 new tokens). A row of the table is a median over the steps of
decodes, in microseconds:

    step        a whole step, without any clock in it
    plan        the cache's plan, what must be computed and read, and the counts that the host reads
    pack        lanes, attention mask and query
    forward     the ready logits
    decide      proposal, choice, revision, stop rules: everything between the logits and the next state
    rest        the schedule's region, what the cache remembers, the account, the loop; in a decoder with a step of its own all that is
                not a forward

The parts are from a second run, with clocks. With one thread the clock counts this thread's CPU time, so other processes do not disturb
it; with several, the time that passes. Prints the machine, versions, shapes, the table, and one JSON line.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from common import device_name, finish, save_option, versions
from torch import Tensor

from dllm_toolkit import registry, rounds, sheets
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.decode import start
from dllm_toolkit.decoders.base import DecodeError, Decoder, check
from dllm_toolkit.engine import Engine
from dllm_toolkit.models.base import Query
from dllm_toolkit.types import Attention, ModelSpec

PARTS: tuple[str, ...] = ("plan", "pack", "forward", "decide")
DECODERS = ("vanilla", "semi_ar", "fast_dllm", "d2f", "block_diffusion", "confidence_adaptive", "wino", "freedave", "autoregressive")
CACHES = ("none", "prefix", "dual", "block_causal", "delayed")
WARM_UP = 10  # steps
Now = Callable[[], float]


class Ready:
    """A model whose forward costs nothing: logits that are ready, random, sharp enough that thresholds pass now and then."""

    def __init__(self, spec: ModelSpec, rows: int, reads: int) -> None:
        self.spec, self.device = spec, torch.device("cpu")
        self.logits = torch.randn(rows, reads, spec.vocab_size, generator=torch.Generator().manual_seed(0)) * 3
        self.logits[..., [spec.mask_id, *spec.eos_ids]] = -20.0  # nothing ends early

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return KVBuffer(rows, slots, layers=1, kv_heads=1, head_dim=2, hidden_width=None, dtype=torch.float32, device="cpu")

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Tensor:
        assert query.read is not None
        rows, reads = query.read.shape
        return self.logits[:rows, :reads]


class Clock:
    """Seconds spent in each part of the step that is under way."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.spent = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = self.now()
            try:
                return function(*arguments, **named)
            finally:
                self.spent[part] += self.now() - began

        return run

    def take(self) -> dict[str, float]:
        taken, self.spent = self.spent, dict.fromkeys(PARTS, 0.0)
        return taken


@contextmanager
def clocks(clock: Clock) -> Iterator[None]:
    """Clocks around the parts of every step; gone afterwards."""
    unit = Engine.unit

    def watched(engine: Engine, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made = unit(engine, function, **options)
        return clock.timed("decide", made) if getattr(function, "__name__", "") == "decide" else made

    places: list[tuple[Any, str, Any]] = [
        (rounds, "look", clock.timed("plan", rounds.look)),
        (rounds, "prepare", clock.timed("pack", rounds.prepare)),
        (sheets, "lay_out", clock.timed("pack", sheets.lay_out)),
        (Ready, "__call__", clock.timed("forward", Ready.__call__)),
        (Engine, "unit", watched),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    try:
        for place, name, new in places:
            setattr(place, name, new)
        yield
    finally:
        for place, name, old in before:
            setattr(place, name, old)


def spec_of(options: argparse.Namespace, attention: Attention, shift: Literal[0, 1]) -> ModelSpec:
    size = options.vocabulary
    return ModelSpec(
        vocab_size=size, mask_id=size - 1, eos_ids=(size - 2,), pad_id=size - 2, layers=1, heads=1, kv_heads=1, head_dim=2, width=2,
        max_positions=4096, attention=attention, block_size=options.block if attention == "block_causal" else None, shift=shift,
    )  # fmt: skip


def made(kind: str, name: str, options: argparse.Namespace) -> Any:
    """A registered decoder or cache with its own defaults, in blocks of the given length where it has blocks."""
    maker = registry.lookup(kind, name)
    return maker(**{"block_length": options.block} if "block_length" in inspect.signature(maker).parameters else {})


def fitting(decoder: Decoder, cache: Cache, options: argparse.Namespace) -> ModelSpec | None:
    """The first kind of model that decoder and cache go together with."""
    for attention, shift in (("full", 0), ("block_causal", 0), ("causal", 1)):
        spec = spec_of(options, attention, shift)  # type: ignore[arg-type]
        try:
            check(spec, decoder, cache)
        except DecodeError:
            continue
        return spec
    return None


def steps_of(model: Ready, decoder: Decoder, cache: Cache, rows: int, options: argparse.Namespace, now: Now) -> Iterator[float]:
    """Seconds of one step after the other, of decode after decode; the first step of a decode is left out."""
    prompts = [list(range(options.prompt))] * rows
    while True:
        begun = start(model, decoder, prompts, max_new_tokens=options.new_tokens, cache=cache)
        state, first = begun.state, True
        with torch.inference_mode():
            while True:
                began = now()
                after = begun.decoder.step(begun.engine, state)
                spent = now() - began
                if begun.engine.finished(after):
                    break
                state = after
                if not first:
                    yield spent
                first = False
        if first:  # decodes of a single step would yield nothing for ever
            raise ValueError("a decode took one step. Write a larger --new-tokens")


def measure(decoder: Decoder, cache: Cache, spec: ModelSpec, rows: int, options: argparse.Namespace) -> dict[str, float]:
    """Medians in microseconds: whole steps without clocks, then the parts with clocks."""
    now = time.thread_time if options.threads == 1 else time.perf_counter
    model = Ready(spec, rows * decoder.branches, options.prompt + options.new_tokens + 1)
    steps = steps_of(model, decoder, cache, rows, options, now)
    for _ in range(WARM_UP):
        next(steps)
    whole = statistics.median(next(steps) for _ in range(options.steps))
    clock = Clock(now)
    with clocks(clock):
        watched = steps_of(model, decoder, cache, rows, options, now)
        for _ in range(WARM_UP):
            next(watched)
        clock.take()
        parts: list[dict[str, float]] = []
        for _ in range(options.steps):
            spent = next(watched)
            one = clock.take()
            parts.append({**one, "rest": spent - sum(one.values())})
    row = {name: statistics.median(one[name] for one in parts) for name in (*PARTS, "rest")}
    return {"step": round(whole * 1e6, 1), **{name: round(value * 1e6, 1) for name, value in row.items()}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("prompt", 64), ("new-tokens", 128), ("block", 32), ("vocabulary", 512), ("steps", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), help="registered names")
    parser.add_argument("--caches", nargs="+", default=list(CACHES), help="registered names")
    parser.add_argument("--threads", type=int, default=1)
    save_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    said = ", ".join(f"{name} {value}" for name, value in versions("cpu").items())
    print(f"{device_name('cpu')}, {said}; {options.threads} threads", file=sys.stderr)
    shape = f"prompt {options.prompt}, new {options.new_tokens}, block {options.block}, vocabulary {options.vocabulary}"
    print(f"{shape}; microseconds a step, medians of {options.steps} steps", file=sys.stderr)
    names = ("step", *PARTS, "rest")
    print(f"{'decoder':20} {'cache':13} {'attention':13} rows " + " ".join(f"{name:>8}" for name in names), file=sys.stderr)
    table: list[dict[str, Any]] = []
    for name in options.decoders:
        decoder = made("decoder", name, options)
        for chosen in options.caches:
            cache = made("cache", chosen, options)
            spec = fitting(decoder, cache, options)
            for rows in options.rows if spec is not None else ():
                assert spec is not None
                row = {"decoder": name, "cache": chosen, "attention": spec.attention, "rows": rows}
                try:
                    row |= measure(decoder, cache, spec, rows, options)
                    numbers = " ".join(f"{row[one]:8.0f}" for one in names)
                except Exception as failure:  # one combination that fails must not cost the others
                    row["failed"] = numbers = f"{type(failure).__name__}: {failure}"[:200]
                table.append(row)
                print(f"{name:20} {chosen:13} {spec.attention:13} {rows:4} {numbers}", file=sys.stderr, flush=True)
    shapes = {key: getattr(options, key) for key in ("prompt", "new_tokens", "block", "vocabulary")}
    return finish("engine_overhead", {"unit": "microseconds a step", "shape": shapes, "rows": table}, options, "cpu")


if __name__ == "__main__":
    main()
