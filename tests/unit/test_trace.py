"""A trace is the decode, written down: same tokens, same counts, and the model's own probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import decode, trace
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation import trace as traces
from dllm_toolkit.evaluation.order import global_order, local_order, order_curves
from dllm_toolkit.evaluation.trace import Cell, DecodeTrace, TraceError, counted, record
from dllm_toolkit.testing.cases import DECODERS
from dllm_toolkit.testing.contract import fits, toys
from dllm_toolkit.testing.models import tiny_transformer

PROMPT = [1, 2, 3, 4, 5]
# A plain one, a pipeline, left to right, several forwards a step, branches, edits, and tokens that are masked again.
NAMES = ("vanilla", "d2f", "autoregressive", "freedave", "wino", "llada21", "remdm_loop", "saber", "explore_then_exploit")


def first_case(name: str):
    return next(case for case in DECODERS if case.name == name or case.name.startswith(f"{name} "))


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_is_the_decode(name: str) -> None:
    decoder = first_case(name).build()
    model = next(toy.model for toy in toys() if fits(decoder, NoCache(), toy) is None)
    output = decode(model, decoder, [PROMPT], max_new_tokens=16)
    frames = tuple(record(model, decoder, PROMPT, max_new_tokens=16))
    stats, last = output.stats, frames[-1]
    assert (last.forwards, last.lanes, last.forced, last.edits) == (stats.nfe[0], stats.lanes[0], stats.forced[0], stats.edits[0])
    assert last.ended == output.result[0].text and not any(frame.ended for frame in frames[:-1])
    cells = DecodeTrace(name, frames, 16, {}).canvas(len(frames))
    assert [cell.token for cell in cells] == output.tokens[0]
    born = [-1] * 16
    for change in (change for frame in frames for change in frame.changes):
        born[change.position] = change.born
        assert (change.confidence is None) == (change.kind in ("fill", "remask"))
        assert change.confidence is None or 0 < change.confidence <= 1
    assert born == output.born[0, 5:21].tolist()
    assert counted(cells, model.spec.eos_ids) == ledger.answer_tokens(output.tokens[0], model.spec.eos_ids)


def test_confidence_is_the_probability_of_the_token() -> None:
    model, decoder = tiny_transformer(), fast_dllm(block_length=4, threshold=0.6)
    steps = list(trace(model, decoder, [PROMPT], max_new_tokens=8))
    for step, frame in zip(steps, record(model, decoder, PROMPT, max_new_tokens=8), strict=True):
        probabilities = step.asked.answer.logits[0].float().softmax(-1)
        lane = {place: number for number, place in enumerate(step.asked.answer.positions[0].tolist())}
        for change in frame.changes:
            if change.kind == "commit":
                assert change.confidence == pytest.approx(float(probabilities[lane[change.position + 5], change.token]), abs=1e-5)


def test_frames_say_what_is_open() -> None:
    frames = list(record(tiny_transformer(), fast_dllm(block_length=4, threshold=0.6), PROMPT, max_new_tokens=10))
    assert frames[0].blocks == (0, 4, 8) and frames[0].open == ((0, 4),) and frames[0].closed == ()
    reached = next(frame for frame in frames if frame.open[0][0] == 4)
    assert reached.open == ((4, 8),) and reached.closed == ((0, 4),)


def test_infilling_keeps_what_was_given() -> None:
    model, template = tiny_transformer(), [None, 7, None, None, 8, None]
    frames = tuple(record(model, fast_dllm(block_length=None, threshold=0.5), PROMPT, template=template))
    one = DecodeTrace("infilling", frames, 6, {}, pinned={1: 7, 4: 8})
    cells = one.canvas(len(frames))
    assert cells[1] == Cell(7) and cells[4] == Cell(8) and all(cell.token is not None for cell in cells)
    assert counted(cells, ()) == sum(not cell.filled for cell in cells) - 2


def example() -> DecodeTrace:
    frames = tuple(record(tiny_transformer(), first_case("remdm_loop").build(), PROMPT, max_new_tokens=8))
    pieces = {token: f" {token}" for token in range(29)}
    return DecodeTrace("loop", frames, 8, pieces, eos_ids=(27, 25), prompt="a </script> b", correct=False)


def test_save_and_load(tmp_path: Path) -> None:
    one = example()
    traces.save(tmp_path / "deep" / "trace.json", [one, one])
    assert traces.load(tmp_path / "deep" / "trace.json") == [one, one]
    assert one.canvas(0) == (Cell(None),) * 8 and one.step_at(0) == 0 and one.step_at(10**6) == len(one.frames)
    with pytest.raises(TraceError, match="no step 999"):
        one.canvas(999)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    traces.save(path, [example()])
    good = json.loads(path.read_text())

    def refused(content: str, words: str) -> None:
        path.write_text(content)
        with pytest.raises(TraceError, match=words):
            traces.load(path)

    refused(json.dumps(good)[:-9], "damaged")
    refused("[]", "no trace of a decode")
    refused(json.dumps({**good, "version": 99}), "another version, got 99")
    refused(json.dumps({**good, "traces": []}), "holds no trace")
    for wrong in ([8, 0, 1, 0, 0.5], [0, -1, 1, 0, 0.5], [0, 9, 1, 0, 0.5], [0, 1]):  # position, kind, kind, form
        bad = json.loads(json.dumps(good))
        bad["traces"][0]["frames"][0]["changes"] = [wrong]
        refused(json.dumps(bad), "damaged")


def test_order_curves() -> None:
    answers = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, -1, 1], []]
    local, whole = order_curves(answers, 3)
    for k in (1, 2, 3):
        assert local[k - 1] == pytest.approx(sum(local_order(born, k) for born in answers) / 4)
        assert whole[k - 1] == pytest.approx(sum(global_order(born, k) for born in answers) / 4)
    assert order_curves([], 3) == ([], [])
    assert global_order([3, 2, 1, 0], 1) == 0.25 and torch.tensor(whole).diff().min() >= 0
