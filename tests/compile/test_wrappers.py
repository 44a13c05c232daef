"""Wrapped models in the engine's compiled path: the same decode, in a handful of graphs. See test_one_graph.py for the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import dllm_toolkit.engine
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing.cases_features import WRAPPERS, Wrapping
from dllm_toolkit.testing.contract_compile import GraphCounter
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.testing.record import unequal


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", WRAPPERS, ids=str)
def test_decode_compiled_is_decode(case: Wrapping, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = GraphCounter()

    def counted(function: Callable[..., Any], *, mode: str | None = None, **options: Any) -> Callable[..., Any]:
        return real(function, backend=counter if function is model else "eager", **options)

    model, batch = case.around(tiny_transformer(2)), unequal()
    arguments = {"templates": batch.templates, "seed": batch.seeds}
    eager = decode(model, vanilla(), batch.prompts, **arguments)
    real = torch.compile
    monkeypatch.setattr(dllm_toolkit.engine.torch, "compile", counted)
    compiled = decode(model, vanilla(), batch.prompts, **arguments, compile=True)
    assert compiled.tokens == eager.tokens
    for field in ("nfe", "lanes", "steps", "commits", "computed"):
        assert getattr(compiled.stats, field) == getattr(eager.stats, field)
    # The engine's one lane width here; an inexact wrapper reads its own width on the host, so it has a graph before that and some after it.
    assert counter.graphs <= (6 if case.inexact else 1)
