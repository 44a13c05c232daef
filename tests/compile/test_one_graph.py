"""Compiled decoding: `decide` is one graph for a whole decode, forwards come in a handful of widths, results are those of eager code.

torch.compile runs with a backend that counts graphs and executes them as they are, so no compiler is needed and what is tested is ours:
no graph break, no recompilation, shapes that stay. Nothing here may run under a type-checking import hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

import dllm_toolkit.engine
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.case import structure
from dllm_toolkit.testing.contract_compile import GraphCounter, d11_one_graph
from dllm_toolkit.testing.record import unequal


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def toy_of(decoder: Any) -> contract.Toy:
    """The most demanding toy that a decoder accepts."""
    order = {"block_causal": 0, "causal": 1}
    fitting = [toy for toy in contract.toys() if contract.fits(decoder, NoCache(), toy) is None]
    return min(fitting, key=lambda toy: order.get(toy.name, 2))


def with_new_parts() -> list[cases.Case]:
    """The decoders of the catalogue in which a schedule, a rule or a flag of one occurs for the first time: tracing is what takes time."""
    seen: set[Any] = set()
    found = []
    for case in cases.DECODERS:
        decoder = case.build()
        parts = {(one.name, structure(getattr(decoder, one.name))) for one in fields(decoder)}
        if not parts <= seen:
            found.append(case)
        seen |= parts
    return found


@pytest.mark.parametrize("case", with_new_parts(), ids=str)
def test_decide_is_one_graph(case: cases.Case) -> None:
    d11_one_graph(contract.bench(case.build(), NoCache(), toy_of(case.build())))


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("vanilla in blocks", DualCache()),
        ("fast_dllm", DualCache()),
        ("d2f", BlockCausalCache()),
        ("autoregressive", BlockCausalCache()),
        ("freedave", DualCache()),
        ("self_draft", BlockCausalCache()),
        ("wino", DualCache()),
    ],
)
def test_decode_compiled_is_decode(name: str, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own compiled path: same tokens and account, one graph for `decide`, one for each lane width."""
    counters: dict[str, GraphCounter] = {}

    def counted(function: Callable[..., Any], *, mode: str | None = None, **options: Any) -> Callable[..., Any]:
        kind = "forward" if function is model or function.__module__.endswith("pieces") else "decide"
        counter = counters.setdefault(kind, GraphCounter())
        return real(function, backend=counter, **options)

    decoder = next(case for case in cases.DECODERS if case.name == name).build()
    model, batch = toy_of(decoder).model, unequal()
    arguments = {"templates": batch.templates, "cache": cache, "seed": batch.seeds}
    eager = decode(model, decoder, batch.prompts, **arguments)
    real = torch.compile
    monkeypatch.setattr(dllm_toolkit.engine.torch, "compile", counted)
    compiled = decode(model, decoder, batch.prompts, **arguments, compile=True)
    assert compiled.tokens == eager.tokens
    for field in ("nfe", "lanes", "steps", "commits", "forced"):
        assert getattr(compiled.stats, field) == getattr(eager.stats, field)
    assert counters["decide"].graphs == 1
    assert counters["forward"].graphs <= 4 * 3, "more forwards compiled than lane widths, four pieces each"


def test_a_sweep_of_many_decoders_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoder of a process shares the code of `decide`: torch's limit of 8 graphs for one code must not end a comparison."""
    model, batch = toy_of(d2f(block_length=4)).model, unequal()
    real = torch.compile
    monkeypatch.setattr(
        dllm_toolkit.engine.torch, "compile", lambda function, *, mode=None, **options: real(function, backend="eager", **options)
    )
    for number in range(9):
        decoder = d2f(block_length=4, threshold=number / 10)
        arguments = {"max_new_tokens": 4, "cache": BlockCausalCache()}
        compiled = decode(model, decoder, batch.prompts[:1], compile=True, **arguments)
        assert compiled.tokens == decode(model, decoder, batch.prompts[:1], **arguments).tokens
