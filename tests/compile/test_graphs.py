"""The path of recorded graphs without a GPU: what is static, what is copied, what the next replay overwrites.

`graphs.emulated` runs functions where graphs would be replayed, on the same static inputs and into the same static outputs, so a value that
is used after it was overwritten gives another decode here too. Compilation is left out: test_one_graph.py looks at that.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dllm_toolkit import graphs, rounds
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.engine import Engine
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
    assert replayed.stats.warm_up > 0 and replayed.stats.seconds > 0


def test_copies_happen_as_if_at_once() -> None:
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    graphs.copy_all([(first, second), (second, first)])
    assert first.tolist() == [3, 4] and second.tolist() == [1, 2]


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_that_are_wide_alone_go_first(shift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refilled row computes its prompt in a forward of its own, from the same graph in every row; it leaves the others' keys alone.

    Account and text stay those of the prompt alone, for a second stream through the graphs of the first, too.
    """
    monkeypatch.setattr(rounds, "LANES_OF_A_FLOOR", 1)
    monkeypatch.setattr(rounds, "_coarse", lambda count: count)  # flat lanes, too
    model, decoder = tiny_transformer(2, attention="block_causal", block_size=4, shift=shift), d2f(block_length=4, threshold=0.5)
    steps: list[list[int]] = []  # rows that went first
    said: list[torch.Tensor] = []
    ask, alone = Engine.ask, Engine._alone

    def asked(engine: Engine, state: Any, *arguments: Any, **options: Any) -> Any:
        steps.append([])
        answer = ask(engine, state, *arguments, **options)
        said.append(answer.logits[answer.positions < state.tokens.shape[1]])
        return answer

    def watched(engine: Engine, part: Any, count: int, reads: int, row: int, spec: Any) -> Any:
        held = [one for one in (engine.kv.keys, engine.kv.values, engine.kv.hidden) if one is not None]
        before, others = [one.clone() for one in held], torch.arange(engine.kv.rows) != row
        logits = alone(engine, part, count, reads, row, spec)
        for one, old in zip(held, before, strict=True):
            axis = 1 if one.ndim == 5 else 0  # [layers, B, S, H, D], hidden [B, S, width]
            mine, its = one.movedim(axis, 0), old.movedim(axis, 0)
            assert torch.equal(mine[others], its[others]) and not torch.equal(mine[row], its[row])
        steps[-1].append(row)
        return logits

    monkeypatch.setattr(Engine, "ask", asked)
    monkeypatch.setattr(Engine, "_alone", watched)

    def recorded() -> dict[Any, int]:
        spaces = [space for several in model.__dict__["_workspaces"].values() for space in several]
        assert len(spaces) == 1
        return {name: len(unit.recordings) for name, unit in spaces[0].units.items() if isinstance(unit, graphs.Replayed)}

    seen = []
    for first in (1, 7):
        # The second and the third prompt end at once, and two long ones take their rows.
        prompts = [[one % 20 for one in range(first, first + size)] for size in (40, 5, 5, 9, 50, 49, 25, 24, 44, 10, 23)]
        arguments: dict[str, Any] = {"max_new_tokens": 12, "cache": BlockCausalCache()}
        with graphs.emulated():
            replayed = decode_stream(model, decoder, prompts, rows=4, compile=True, **arguments)
        seen.append(recorded())
        answers = list(said)
        said.clear()
        same(replayed, decode_stream(model, decoder, prompts, rows=4, **arguments))
        for mine, eager in zip(answers, said, strict=True):
            torch.testing.assert_close(mine, eager)
        said.clear()
        for number, prompt in enumerate(prompts):
            assert replayed.tokens[number] == decode(model, decoder, [prompt], seed=number, **arguments).tokens[0]
        said.clear()
    before, then = ({name: count for name, count in one.items() if name[0] == "alone"} for one in seen)
    went = [row for rows in steps for row in rows]
    assert before == then and set(before.values()) == {1} and len(before) == 2 < len(set(went)), "a graph for each width, whatever the row"
    assert max(map(len, steps)) > 1, "several rows in a step"


def test_a_row_visits_a_buffer_of_its_own() -> None:
    """In bf16, whose rows are copied as words of 8 bytes, and with rows that are no whole number of them."""
    for slots, width in ((6, 8), (5, 3)):
        sizes: dict[str, Any] = {"layers": 2, "kv_heads": 1, "head_dim": width, "hidden_width": width, "device": "cpu"}
        many, one = (KVBuffer(rows, slots, dtype=torch.bfloat16, **sizes) for rows in (3, 1))
        for held in (many.keys, many.values, many.hidden):
            assert held is not None
            held.normal_()
        before, row = copy.deepcopy(many), torch.tensor([1])
        one.take_row(many, row)
        assert one.hidden is not None and many.hidden is not None and before.hidden is not None
        assert torch.equal(one.keys, many.keys[:, 1:2]) and torch.equal(one.values, many.values[:, 1:2])
        assert torch.equal(one.hidden, many.hidden[1:2])
        for held in (one.keys, one.values, one.hidden):
            held.neg_()
        one.give_row(many, row)
        signs = torch.tensor([1, -1, 1]).view(-1, 1, 1)
        assert torch.equal(many.keys, before.keys * signs.unsqueeze(3)) and torch.equal(many.values, before.values * signs.unsqueeze(3))
        assert torch.equal(many.hidden, before.hidden * signs)


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
