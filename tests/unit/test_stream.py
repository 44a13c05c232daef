"""Refilled rows: every prompt gets the answer and the account that it has alone, whatever was in its row before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_toolkit.engine
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.delayed import DelayedCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.base import DecodeError, Decoder, Revise
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.freedave import freedave
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.models.smoothing import Smoothed
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.stream import decode_stream, stream
from dllm_toolkit.testing import cases, contract
from dllm_toolkit.testing.contract_compile import GraphCounter
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.types import Result

TOYS = {toy.name: toy.model for toy in contract.toys()}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 3, 2], [1, 2], [7, 7, 7, 7]]
LENGTHS = [8, 6, 1, 11, 5, 7]
# One case of every decoder; what branches is declined.
EACH = list({case.maker: case for case in reversed(cases.DECODERS) if case.build().branches == 1}.values())
COUNTS = ("nfe", "lanes", "steps", "commits", "forced", "edits", "computed")


def row(output: Output, number: int) -> tuple[Any, ...]:
    """What must not depend on the row that a prompt was decoded in."""
    begin, size = int(output.begin[number]), len(output.tokens[number])
    here = slice(0, begin + size)
    counts = {name: getattr(output.stats, name)[number] for name in COUNTS}
    where = output.canvas[number, here].tolist(), output.born[number, here].tolist(), begin, int(output.end[number])
    return output.tokens[number], *where, output.result[number], counts


def alone(model: Any, decoder: Decoder, cache: Cache, number: int, **arguments: Any) -> tuple[Any, ...]:
    return row(decode(model, decoder, [PROMPTS[number]], max_new_tokens=LENGTHS[number], cache=cache, seed=[number], **arguments), 0)


def same(model: Any, decoder: Decoder, cache: Cache, rows: int, **arguments: Any) -> None:
    output = decode_stream(model, decoder, PROMPTS, rows=rows, max_new_tokens=LENGTHS, cache=cache, **arguments)
    for number in range(len(PROMPTS)):
        assert row(output, number) == alone(model, decoder, cache, number, **arguments), f"prompt {number}"


def fitting(decoder: Decoder, cache: Cache) -> Any:
    """The most demanding toy that takes both, None if none does."""
    order = {"block_causal": 0, "causal": 1, "full": 2}
    found = [toy for toy in contract.toys() if contract.fits(decoder, cache, toy) is None]
    return min(found, key=lambda toy: order.get(toy.name, 3)).model if found else None


@pytest.mark.parametrize("case", EACH, ids=str)
def test_every_decoder(case: cases.Case) -> None:
    """With the cache that reuses most among those that it takes."""
    decoder = case.build()
    cache = next(one for one in (BlockCausalCache(), DualCache(), NoCache()) if fitting(decoder, one) is not None)
    same(fitting(decoder, cache), decoder, cache, rows=2)


@pytest.mark.parametrize("cache", contract.all_caches(), ids=lambda cache: type(cache).__name__)
def test_every_cache(cache: Cache) -> None:
    for decoder in (semi_ar(4, temperature=1.0), fast_dllm(4, threshold=0.4), d2f(4, threshold=0.5), autoregressive()):
        model = fitting(decoder, cache)
        if model is not None:
            same(model, decoder, cache, rows=3)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 40])
def test_any_number_of_rows(rows: int) -> None:
    same(TOYS["full"], fast_dllm(4, threshold=0.4), DualCache(), rows)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 10)), min_size=1, max_size=7),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_unequal_requests(requests: list[tuple[int, int]], rows: int, seed: int) -> None:
    """Sampled, in blocks that answers do not fill, with keys that are reused inexactly."""
    model, decoder, cache = TOYS["full"], fast_dllm(4, threshold=0.3, temperature=0.8), PrefixCache()
    prompts = [[(7 * size + place + seed) % 18 for place in range(size)] for size, _ in requests]
    lengths = [length for _, length in requests]
    output = decode_stream(model, decoder, prompts, rows=rows, max_new_tokens=lengths, cache=cache, seed=seed)
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        other = decode(model, decoder, [prompt], max_new_tokens=length, cache=cache, seed=[seed + number])
        assert row(output, number) == row(other, 0)


def test_templates() -> None:
    templates: list[list[int | None]] = [[None, 5, None, None], [1], [None] * 6, [None, None, 3]]
    output = decode_stream(TOYS["full"], semi_ar(4), PROMPTS[:4], rows=2, templates=templates, cache=DualCache())
    for number, template in enumerate(templates):
        other = decode(TOYS["full"], semi_ar(4), [PROMPTS[number]], templates=[template], cache=DualCache(), seed=[number])
        assert row(output, number) == row(other, 0)


@pytest.mark.parametrize("keep", ["prompt", "both"])
def test_equal_tokens_of_another_prompt_are_not_reused(keep: Any) -> None:
    """Prompts that differ in their first token alone: what follows has the same tokens in the same slots, and other keys."""
    model, decoder, cache = TOYS["full"], semi_ar(3), DelayedCache(keep=keep, refresh_every=None)
    prompts = [[first, 2, 3, 5, 8, 2, 1] for first in (1, 4, 9)]
    output = decode_stream(model, decoder, prompts, rows=1, max_new_tokens=6, cache=cache)
    for number, prompt in enumerate(prompts):
        assert row(output, number) == row(decode(model, decoder, [prompt], max_new_tokens=6, cache=cache, seed=[number]), 0)


def test_compiled_is_eager_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin anew do not make the compiled step another one."""
    torch._dynamo.reset()
    real, counters = torch.compile, {}

    def counted(function: Any, *, mode: str | None = None, **options: Any) -> Any:
        kind = "forward" if function is model or function.__module__.endswith("pieces") else "decide"
        counter = counters.setdefault(kind, GraphCounter())
        return real(function, backend=counter, **options)

    decoder, cache = d2f(4, threshold=0.5), BlockCausalCache()
    model = fitting(decoder, cache)
    eager = decode_stream(model, decoder, PROMPTS, rows=2, max_new_tokens=LENGTHS, cache=cache)
    monkeypatch.setattr(dllm_toolkit.engine.torch, "compile", counted)
    compiled = decode_stream(model, decoder, PROMPTS, rows=2, max_new_tokens=LENGTHS, cache=cache, compile=True)
    assert all(row(compiled, number) == row(eager, number) for number in range(len(PROMPTS)))
    assert counters["decide"].graphs == 1 and counters["forward"].graphs <= 4 * 3  # pieces, widths
    torch._dynamo.reset()


def test_a_row_never_waits() -> None:
    """Forwards of the whole: with as many steps a prompt as tokens, two rows take half of the sum of all answers, and not more."""
    steps = []
    lengths = [12, 2, 2, 2, 2, 4]
    decode_stream(
        TOYS["full"], vanilla(), PROMPTS, rows=2, max_new_tokens=lengths, callback=lambda state: steps.append(state.step.tolist())
    )
    assert len(steps) == sum(lengths) // 2
    assert all(len(one) == 2 for one in steps)


def test_answers_come_as_they_finish() -> None:
    found = stream(TOYS["full"], vanilla(), PROMPTS[:3], rows=2, max_new_tokens=[6, 2, 3])
    assert not torch.is_inference_mode_enabled()
    first = next(found)
    assert first.prompt == 1 and first.steps == 2 and not torch.is_inference_mode_enabled()
    assert [one.prompt for one in found] == [2, 0]


@dataclass(frozen=True)
class Undo(Revise):
    """Takes everything back, always."""

    looks_back = True

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        none = torch.zeros_like(after.masked)
        return Edit(none, region.changeable(after), torch.zeros_like(after.done))


def test_step_limit() -> None:
    endless = BlockDecoder(SemiAutoregressive(4), Gate(0.5), revise=Undo())
    with pytest.raises(DecodeError, match=r"prompts \[0, 1\] did not finish in 7 steps"):
        decode_stream(TOYS["full"], endless, PROMPTS[:3], rows=2, max_new_tokens=5, max_steps=7)
    same(TOYS["full"], endless, NoCache(), rows=2, max_steps=7, throw=False)
    output = decode_stream(TOYS["full"], endless, PROMPTS, rows=2, max_new_tokens=LENGTHS, max_steps=7, throw=False)
    assert output.result[0] is Result.MAX_STEPS and max(output.stats.steps) == 7


def test_what_is_declined() -> None:
    with pytest.raises(DecodeError, match="got a decoder of 4 branches"):
        stream(TOYS["full"], freedave(4), PROMPTS, max_new_tokens=4)
    with pytest.raises(DecodeError, match="remembers smoothed"):
        stream(Smoothed(tiny_transformer(1)), semi_ar(4), PROMPTS, max_new_tokens=4)
    with pytest.raises(DecodeError, match="rows must be 1 or more, got 0"):
        stream(TOYS["full"], semi_ar(4), PROMPTS, rows=0, max_new_tokens=4)
    with pytest.raises(DecodeError, match="prompt 1 is empty"):
        stream(TOYS["full"], semi_ar(4), [[1], []], max_new_tokens=4)
    with pytest.raises(DecodeError, match="does not fit the model"):
        stream(TOYS["full"], d2f(4), PROMPTS, max_new_tokens=4, cache=BlockCausalCache())
