"""Every driver in the catalogue passes its contract; nothing registered is outside it; no argument is dead."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from dllm_toolkit import registry
from dllm_toolkit.drivers.base import Driver
from dllm_toolkit.drivers.staged import Stage, Staged
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.case import Case
from dllm_toolkit.testing.cases_drivers import DRIVERS
from dllm_toolkit.testing.contract_driver import DRIVER_CHECKS, DriverBench, account
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.testing.record import unequal

FIRST = {case.maker: case for case in reversed(DRIVERS)}
KNOBS = [pytest.param(case, argument, id=f"{case}-{argument}") for case in FIRST.values() for argument in case.knobs]
# One combination of each kind is enough here: which decoder and cache run inside is tested elsewhere.
PLAIN = {"full", "causal", "block_causal"}


def benches(driver: Driver) -> list[DriverBench]:
    """The first fitting combination of decoder and cache on each toy, and every cache where decoder and toy are causal."""
    found: dict[Any, DriverBench] = {}
    for place in contract.driver_benches(driver):
        spec = place.model.spec
        key = (spec.attention, spec.shift, type(place.cache) if spec.attention == "causal" else None)
        if key not in found and (spec.shift == 0 or spec.attention == "causal") and place.fits() is None:
            found[key] = place
    return list(found.values())


@pytest.mark.parametrize("check", DRIVER_CHECKS, ids=contract.title)
@pytest.mark.parametrize("case", DRIVERS, ids=str)
def test_a_driver_keeps_its_contract(case: Case, check: Any) -> None:
    places = benches(case.build())
    assert places
    for place in places:
        check(place)


def test_everything_registered_is_in_a_case() -> None:
    assert {registry.lookup("driver", name) for name in registry.names("driver")} == {case.maker for case in DRIVERS}
    assert len({case.name for case in DRIVERS}) == len(DRIVERS)


@pytest.mark.parametrize("name", [name for name in registry.names("driver") if name != "denoise"])
def test_a_driver_names_its_paper(name: str) -> None:
    driver = registry.lookup("driver", name)
    assert driver.cite and all(number in (inspect.getdoc(driver) or "") for number in driver.cite)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_every_argument_has_a_knob(case: Case) -> None:
    assert set(case.knobs) == set(inspect.signature(case.maker).parameters)


@pytest.mark.parametrize(("case", "argument"), KNOBS)
def test_the_knob_turns_something(case: Case, argument: str) -> None:
    knob = case.knobs[argument]
    for place in benches(case.build()):
        one = DriverBench(case.build(**knob.given), place.decoder, place.cache, place.model, place.other)
        other = DriverBench(case.build(**{**knob.given, argument: knob.value}), place.decoder, place.cache, place.model, place.other)
        if argument in case.maker.other_models:  # which model it names is what the argument says
            other = DriverBench(other.driver, place.decoder, place.cache, place.model, tiny_transformer(2, "full", 0, 11))
        first, second = one.run(unequal()), other.run(unequal())
        if any(account(first, row) != account(second, row) for row in range(4)):
            return
    pytest.fail(f"{argument}={knob.value!r} changes nothing on any toy")


def test_a_driver_that_fits_nothing_says_why() -> None:
    (result,) = contract.check_component(Staged((Stage(until="the end"), Stage())))
    assert result.name == "needs" and not result.passed and "the model has no tokenizer, got the text 'the end'" in result.message
