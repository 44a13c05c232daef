"""Run the contract on anything that plugs in: `dllm-toolkit check my_rule.LookTwice`, or from Python

    for result in check_component(my_rule.EntropySpend(budget=0.5)):
        print(result)

A rule is put into the standard template decoder, a cache under standard decoders, a driver around them, and each is run on every toy model
that its needs allow: full, block-causal and causal attention, shift 0 and 1, with a batch of unequal rows and an infill canvas. Takes
seconds.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache as remember
from typing import Any, Literal

from dllm_toolkit import registry
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.base import Commit, DecodeError, Decoder, Part, Propose, Revise, Schedule, Stop, check
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.drivers.base import Driver
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.testing import cases
from dllm_toolkit.testing.contract_cache import CACHE_CHECKS
from dllm_toolkit.testing.contract_compile import d11_one_graph
from dllm_toolkit.testing.contract_decoder import DECODER_CHECKS, Bench, Violation
from dllm_toolkit.testing.contract_driver import DRIVER_CHECKS, DriverBench
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.types import Attention

Check = Callable[[Any], None]
FEW = ("none", "prefix", "dual", "block_causal", "delayed")


@dataclass(frozen=True)
class CheckResult:
    """One check: its name, whether it held, and what it says (what was promised, or what went wrong and where)."""

    name: str
    passed: bool
    message: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.message}"


@dataclass(frozen=True)
class Toy:
    """A two-layer model and its one-layer sibling."""

    name: str
    model: Transformer
    shallow: Transformer


@remember
def toys() -> tuple[Toy, ...]:
    """Every kind of model that a decoder may meet, small."""
    kinds: tuple[tuple[str, Attention, Literal[0, 1], int], ...] = (
        ("full", "full", 0, 2),
        ("block_causal", "block_causal", 0, 4),
        ("full_shifted", "full", 1, 0),
        ("block_causal_shifted", "block_causal", 1, 1),
        ("causal", "causal", 1, 2),
    )
    return tuple(
        Toy(name, tiny_transformer(2, attention, shift, seed), tiny_transformer(1, attention, shift, seed))
        for name, attention, shift, seed in kinds
    )


def fits(decoder: Decoder, cache: Cache, toy: Toy) -> str | None:
    """None if the three go together by their needs, otherwise the reason that `decode` would give."""
    try:
        check(toy.model.spec, decoder, cache)
    except DecodeError as problem:
        return str(problem)
    return None


def bench(decoder: Decoder, cache: Cache, toy: Toy, idle: int = 0, alone: tuple[int, ...] | None = None) -> Bench:
    """A workplace for the checks. alone: rows that are also decoded alone; None: all."""
    # With a shift a position is read from its predecessor's hidden row, which depends on the context even on one layer: an
    # approximate cache may then reuse a stale one, so C1 is promised for exact caches only.
    exact = toy.model.spec.shift == 0 or cache.exact
    return Bench(decoder, cache, toy.model, toy.shallow if exact else None, idle=idle, alone=alone)


def title(check_function: Check) -> str:
    """`D05_rows_alone` for d5_rows_alone, so that names sort."""
    number, words = check_function.__name__.split("_", 1)
    return f"{number[0].upper()}{int(number[1:]):02d}_{words}"


def run_checks(place: Bench | DriverBench, checks: Sequence[Check]) -> Iterator[CheckResult]:
    """Run checks one by one; anything that the component raises is a failed check with the line it came from."""
    for one in checks:
        try:
            one(place)
        except Violation as problem:
            yield CheckResult(title(one), False, str(problem))
        except Exception as problem:  # a user's component may raise anything; the report is the place to say so
            line = traceback.extract_tb(problem.__traceback__)[-1]
            what = f"raised {type(problem).__name__}: {problem} (in {line.name}, {line.filename}:{line.lineno})"
            yield CheckResult(title(one), False, what)
        else:
            yield CheckResult(title(one), True, inspect.getdoc(one) or "")


def all_caches() -> list[Cache]:
    """Every registered cache, NoCache first, with the catalogue's arguments: a window of published size holds a whole toy canvas."""
    sized = {case.maker: case.build for case in cases.CACHES}
    makers = [registry.lookup("cache", name) for name in registry.names("cache")]
    made = [(sized.get(maker) or maker)() for maker in makers]
    return sorted(made, key=lambda one: not isinstance(one, NoCache))


def few_caches() -> list[Cache]:
    """A cache of every kind of reuse: none, what lies before, what lies around, what is closed, what was decided a while ago."""
    return [case.build() for case in cases.CACHES if case.name in FEW]


def standard_decoders(part: Part | None = None) -> list[Decoder]:
    """The decoders that a part, or a cache, is tried in."""
    if part is None:
        return [semi_ar(4), fast_dllm(4, threshold=0.6), d2f(4, threshold=0.6, add_at=0.5, activate_at=0.75), autoregressive()]
    block, pipeline = SemiAutoregressive(4), Pipelined(4, add_at=0.5, activate_at=0.75)
    if isinstance(part, Schedule):
        return [BlockDecoder(part, Gate(0.6))]
    if isinstance(part, Commit):
        return [BlockDecoder(block, part), BlockDecoder(pipeline, part)]
    plain = BlockDecoder(block, Gate(0.6))
    if isinstance(part, Propose):
        return [replace(plain, propose=part)]
    if isinstance(part, Revise):
        return [replace(plain, revise=part)]
    if isinstance(part, Stop):
        return [replace(plain, stop=part)]
    raise TypeError(f"{type(part).__name__} is no Schedule, Propose, Commit, Revise or Stop")


def combinations(component: Decoder | Part | Cache) -> list[tuple[Decoder, Cache, Toy]]:
    """Everything that a component is tried with, fitting or not."""
    if isinstance(component, Cache):
        return [(decoder, component, toy) for decoder in standard_decoders() for toy in toys()]
    decoders = [component] if isinstance(component, Decoder) else standard_decoders(component)
    # Every cache once, on full attention or on the one kind that an autoregressive decoder accepts; elsewhere one of every kind of reuse.
    return [
        (decoder, cache, toy)
        for number, decoder in enumerate(decoders)
        for toy in toys()
        for cache in (all_caches() if number == 0 and toy.name in ("full", "causal") else few_caches())
        if number == 0 or toy.model.spec.shift == 0  # where a position is read from is no business of the second template
    ]


def driver_benches(driver: Driver) -> list[DriverBench]:
    """Everything that a driver is tried with: standard decoders, with every cache, on every toy; the full toy plays its other models."""
    other = next(toy.model for toy in toys() if toy.name == "full")
    first, *rest = standard_decoders()
    tried = [(first, toy, cache) for toy in toys() for cache in all_caches() if toy.name == "full" or cache.exact]
    # Elsewhere what is exact: how a cache approximates is no business of a driver. Shift 1 only where a decoder asks for it.
    tried += [(one, toy, cache) for one in rest for toy in toys() for cache in all_caches() if cache.exact and _plain(toy)]
    return [DriverBench(driver, decoder, cache, toy.model, other) for decoder, toy, cache in tried]


def _plain(toy: Toy) -> bool:
    return toy.model.spec.shift == 0 or toy.model.spec.attention == "causal"


def _check_driver(driver: Driver) -> list[CheckResult]:
    benches = driver_benches(driver)
    reasons = [bench.fits() for bench in benches]
    fitting = [bench for bench, reason in zip(benches, reasons, strict=True) if reason is None]
    if not fitting:
        return [CheckResult("needs", False, f"no toy model fits: {reasons[-1]}")]
    results: list[CheckResult] = []
    driver_name = registry.name_of(driver) or type(driver).__name__
    for place in fitting:
        where = f"{driver_name}, {_where(place.decoder, place.cache, _toy_of(place.model))}"
        results += [replace(result, name=f"{result.name} [{where}]") for result in run_checks(place, DRIVER_CHECKS)]
    return results


def _toy_of(model: Any) -> Toy:
    return next(toy for toy in toys() if toy.model is model)


def check_component(component: Any) -> list[CheckResult]:
    """Run the contract on a Decoder, a part, a Cache or a Driver, or on a class or function that makes one without arguments.

    One result for each check and combination, named `D05_rows_alone [decoder, cache, model]`.
    """
    made = component
    if inspect.isclass(component) or inspect.isroutine(component):
        try:
            made = component()
        except TypeError as problem:
            hint = f"{component.__name__} cannot be made without arguments ({problem}). Give its arguments, or pass a ready object."
            return [CheckResult("build", False, hint)]
    if isinstance(made, Driver):
        return _check_driver(made)
    if not isinstance(made, Decoder | Part | Cache):
        what = type(made).__name__
        kinds = "Decoder, Schedule, Propose, Commit, Revise, Stop, Cache or Driver"
        return [CheckResult("build", False, f"{what} is no {kinds}: nothing to check.")]
    tried = combinations(made)
    fitting = [(decoder, cache, toy) for decoder, cache, toy in tried if fits(decoder, cache, toy) is None]
    if not fitting:
        return [CheckResult("needs", False, f"no toy model fits: {fits(*tried[0])}")]
    results: list[CheckResult] = []
    compiled: set[int] = set()
    for decoder, cache, toy in fitting:
        checks: tuple[Check, ...] = (*DECODER_CHECKS, *CACHE_CHECKS)
        if id(decoder) not in compiled and not isinstance(made, Cache):  # the graph is the same under every cache
            compiled.add(id(decoder))
            checks = (*checks, d11_one_graph)
        where = _where(decoder, cache, toy)
        results += [replace(result, name=f"{result.name} [{where}]") for result in run_checks(bench(decoder, cache, toy), checks)]
    return results


def _where(decoder: Decoder, cache: Cache, toy: Toy) -> str:
    parts = [type(getattr(decoder, slot)).__name__ for slot in ("schedule", "commit") if hasattr(decoder, slot)]
    cache_name = registry.name_of(cache) or type(cache).__name__
    return f"{' + '.join(parts) or type(decoder).__name__}, cache {cache_name}, {toy.name} attention"
