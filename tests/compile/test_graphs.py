"""The path of recorded graphs without a GPU: what is static, what is copied, what the next replay overwrites.

`graphs.emulated` runs functions where graphs would be replayed, on the same static inputs and into the same static outputs, so a value that
is used after it was overwritten gives another decode here too. Compilation is left out: test_one_graph.py looks at that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dllm_toolkit import graphs, rounds
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.stream import decode_stream
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.testing.record import unequal

ACCOUNT = ("nfe", "lanes", "steps", "commits", "forced", "edits", "computed")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def same(one: Output, other: Output) -> None:
    assert one.tokens == other.tokens and one.result == other.result
    assert [a[:b] for a, b in zip(one.born.tolist(), one.end.tolist(), strict=True)] == [
        a[:b] for a, b in zip(other.born.tolist(), other.end.tolist(), strict=True)
    ]
    for field in ACCOUNT:
        assert getattr(one.stats, field) == getattr(other.stats, field), field


@pytest.mark.parametrize("case", cases.DECODERS, ids=str)
def test_replayed_decodes_are_eager_decodes(case: cases.Case) -> None:
    """Two decodes: the first records, the second begins with what the first one left."""
    decoder, batch = case.build(), unequal()
    toy = next(toy for toy in contract.toys() if contract.fits(decoder, NoCache(), toy) is None)
    cache: Any = next((one for one in (DualCache(), BlockCausalCache()) if contract.fits(decoder, one, toy) is None), NoCache())
    arguments: dict[str, Any] = {"templates": batch.templates, "cache": cache}
    for seeds in (batch.seeds, [seed + 7 for seed in batch.seeds]):
        with graphs.emulated():
            replayed = decode(toy.model, decoder, batch.prompts, seed=seeds, compile=True, **arguments)
        same(replayed, decode(toy.model, decoder, batch.prompts, seed=seeds, **arguments))


def test_rows_are_refilled_in_place() -> None:
    """A stream keeps its graphs: what a row remembers is put in place, not replaced."""
    batch = unequal()
    model = next(toy.model for toy in contract.toys() if toy.name == "block_causal")
    decoder = d2f(block_length=4, threshold=0.5)
    prompts, templates = list(batch.prompts) * 2, list(batch.templates) * 2
    arguments: dict[str, Any] = {"templates": templates, "cache": BlockCausalCache(), "rows": 3}
    with graphs.emulated():
        replayed = decode_stream(model, decoder, prompts, compile=True, **arguments)
    same(replayed, decode_stream(model, decoder, prompts, **arguments))


def test_copies_happen_as_if_at_once() -> None:
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    graphs.copy_all([(first, second), (second, first)])
    assert first.tolist() == [3, 4] and second.tolist() == [1, 2]


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_that_are_wide_alone_go_first(shift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refilled row computes its prompt in a forward of its own; the account and the text stay those of one forward."""
    monkeypatch.setattr(rounds, "LANES_OF_A_FLOOR", 1)
    monkeypatch.setattr(rounds, "_coarse", lambda count: count)  # flat lanes, too
    model = tiny_transformer(2, attention="block_causal", block_size=4, shift=shift)
    prompts = [[one % 20 for one in range(first, first + size)] for first, size in ((1, 40), (2, 5), (3, 33), (4, 9), (5, 44))]
    arguments: dict[str, Any] = {"max_new_tokens": 12, "cache": BlockCausalCache(), "rows": 3}
    rows = []
    taken = KVBuffer.row
    monkeypatch.setattr(KVBuffer, "row", lambda kv, row: rows.append(row) or taken(kv, row))
    with graphs.emulated():
        replayed = decode_stream(model, d2f(block_length=4, threshold=0.5), prompts, compile=True, **arguments)
    assert rows
    same(replayed, decode_stream(model, d2f(block_length=4, threshold=0.5), prompts, **arguments))


def test_shapes_are_chosen_by_their_lanes() -> None:
    widths = (16, 64, 512)
    assert rounds.shape_of([300] * 16, widths) == (512, 6144, [])  # 4800 live lanes
    assert rounds.shape_of([60] * 15 + [300], widths) == (64, None, [15])  # the others are full
    assert rounds.shape_of([10, 300], widths) == (512, 384, [])
    assert rounds.shape_of([10, 60], widths) == (64, None, [])  # a floor either way
    assert rounds.shape_of([60] * 8 + [0] * 8, widths) == (64, 512, [])  # rows that have finished


def test_nothing_is_recorded_twice() -> None:
    model = tiny_transformer(2, attention="block_causal", block_size=4)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "cache": BlockCausalCache(), "compile": True}
    decoder = d2f(block_length=4, threshold=0.5)
    with graphs.emulated():
        first = [decode(model, decoder, [[one % 20 for one in range(1, size)]], **arguments).stats.warm_up for size in (4, 30, 50)]
        again = [decode(model, decoder, [[one % 20 for one in range(2, size)]], **arguments).stats.warm_up for size in (6, 31, 49)]
    assert first[0] > 0 and again == [0.0, 0.0, 0.0]
