"""The contract of drivers: what every composition of steps promises, on toy models.

Another model that a driver asks for is played by a toy of the same vocabulary, whatever its argument says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.base import DecodeError, Decoder
from dllm_toolkit.drivers.base import Driver
from dllm_toolkit.models.base import Model
from dllm_toolkit.testing.contract_decoder import Violation
from dllm_toolkit.testing.models import Counting
from dllm_toolkit.testing.record import Batch, unequal


@dataclass(frozen=True)
class DriverBench:
    """A driver with everything that it is tried with."""

    driver: Driver
    decoder: Decoder
    cache: Cache
    model: Model
    other: Model

    def fits(self) -> str | None:
        """None if it can run, otherwise the reason that the driver gives."""
        try:
            self.bound(self.other).check(self.model, self.decoder, self.cache)
        except DecodeError as problem:
            return str(problem)
        return None

    def bound(self, other: Model) -> Driver:
        return self.driver.with_models(dict.fromkeys(self.driver.other_models, other))

    def run(self, batch: Batch, model: Model | None = None, other: Model | None = None) -> Output:
        driver = self.bound(self.other if other is None else other)
        lengths = [len(template) for template in batch.templates]
        model = self.model if model is None else model
        return driver.run(model, self.decoder, batch.prompts, max_new_tokens=lengths, cache=self.cache, seed=batch.seeds)


def account(output: Output, row: int) -> tuple[object, ...]:
    """What must be equal when a row is decoded in other company."""
    begin, budget, stats = int(output.begin[row]), len(output.tokens[row]), output.stats
    counts = (stats.nfe, stats.lanes, stats.steps, stats.commits, stats.forced, stats.edits, *stats.extra.values())
    return output.tokens[row], output.born[row, begin : begin + budget].tolist(), output.result[row], *(one[row] for one in counts)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def r1_whole_answers(bench: DriverBench) -> None:
    """every answer is as long as was asked for, nothing is masked, and end-of-text stands behind its end"""
    batch = unequal()
    output, spec = bench.run(batch), bench.model.spec
    for row, template in enumerate(batch.templates):
        answer, end = output.tokens[row], int(output.end[row] - output.begin[row])
        _require(len(answer) == len(template), f"row {row}: {len(answer)} tokens instead of {len(template)}")
        _require(spec.mask_id not in answer, f"row {row} holds a mask: {answer}")
        _require(all(one == spec.eos_ids[0] for one in answer[end:]), f"row {row}: behind its end {end} stands {answer[end:]}")
        here = slice(int(output.begin[row]), int(output.begin[row]) + len(answer))
        _require(output.canvas[row, here].tolist() == answer, f"row {row}: canvas and tokens differ")


def r2_prompts_stay(bench: DriverBench) -> None:
    """the prompt stands where it stood, and nothing of it was decoded"""
    batch = unequal()
    output = bench.run(batch)
    for row, prompt in enumerate(batch.prompts):
        _require(output.canvas[row, : len(prompt)].tolist() == list(prompt), f"row {row}: the prompt has changed")
        _require(int(output.begin[row]) == len(prompt), f"row {row}: the answer begins at {int(output.begin[row])}, not {len(prompt)}")
        _require(bool((output.born[row, : len(prompt)] == -1).all()), f"row {row}: a prompt token has a step")


def r3_rows_alone(bench: DriverBench) -> None:
    """a row is decoded as it would be alone, in any order, and again the same"""
    batch = unequal()
    together, backwards = bench.run(batch), bench.run(batch.take([3, 2, 1, 0]))
    for row in range(len(batch)):
        mine = account(together, row)
        for name, other in (("alone", account(bench.run(batch.take([row])), 0)), ("backwards", account(backwards, 3 - row))):
            _require(mine == other, f"row {row} {name}: {other} instead of {mine}")


def r4_account(bench: DriverBench) -> None:
    """forwards and lanes are what reached the models, and every commit has its step"""
    batch = unequal()
    for row in range(len(batch)):
        model, other = Counting(bench.model), Counting(bench.other)
        output = bench.run(batch.take([row]), model, other)
        counted = [int(model.nfe) + int(other.nfe), int(model.lanes) + int(other.lanes)]
        said = [output.stats.nfe[0], output.stats.lanes[0]]
        _require(said == counted, f"row {row}: forwards and lanes are {counted}, the account says {said}")
        steps = [one for one in output.born[0].tolist() if one >= 0]
        _require(len(steps) == output.stats.commits[0], f"row {row}: {len(steps)} tokens with a step, {output.stats.commits[0]} commits")
        _require(max(steps, default=0) < output.stats.steps[0], f"row {row}: a token of step {max(steps, default=0)} beyond the last")


def r5_lossless(bench: DriverBench) -> None:
    """a driver that says so writes what `decode` writes with the same decoder, in no more target forwards"""
    if not bench.driver.lossless:
        return
    batch = unequal()
    lengths = [len(template) for template in batch.templates]
    plain = decode(bench.model, bench.decoder, batch.prompts, max_new_tokens=lengths, cache=bench.cache, seed=batch.seeds)
    output = bench.run(batch)
    _require(output.tokens == plain.tokens, f"tokens {output.tokens} instead of {plain.tokens}")
    target = output.stats.extra.get("target_forwards", output.stats.nfe)
    _require(all(one <= other for one, other in zip(target, plain.stats.nfe, strict=True)), f"{target} forwards, {plain.stats.nfe} without")


DRIVER_CHECKS: tuple[Callable[[DriverBench], None], ...] = (r1_whole_answers, r2_prompts_stay, r3_rows_alone, r4_account, r5_lossless)
