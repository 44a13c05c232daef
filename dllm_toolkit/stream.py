"""Many prompts through few rows: when a row has finished, the next prompt takes its place.

    output = decode_stream(model, d2f(block_length=16), prompts, rows=16, max_new_tokens=256, cache=BlockCausalCache())
    for answer in stream(...): ...                          the same, each answer as soon as it is there

A batch is as slow as its slowest row; here no row waits. Every answer, with its account, is that of `decode` on its prompt alone. Rows
share one canvas, as long as the longest prompt with its answer, and one K/V buffer: nothing is allocated when a row begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import (
    Output,
    Stats,
    Template,
    _device,
    _limit,
    _synchronise,
    _templates,
    answer_lengths,
    check_prompts,
    compilable,
    engine_of,
    row_seeds,
)
from dllm_toolkit.decoders.base import DecodeError, Decoder, check
from dllm_toolkit.engine import Engine, canvas_length
from dllm_toolkit.models.base import Model
from dllm_toolkit.ops import trees
from dllm_toolkit.registry import name_of
from dllm_toolkit.state import State, begin_state
from dllm_toolkit.types import Result


@dataclass(frozen=True)
class Answer:
    """One finished prompt: its number, and what `Output` and `Stats` say of a row. canvas, born [L]."""

    prompt: int
    tokens: list[int]
    canvas: Int[Tensor, "L"]
    born: Int[Tensor, "L"]
    begin: int
    end: int
    result: Result
    nfe: int
    lanes: int
    steps: int
    commits: int
    forced: int
    edits: int


@dataclass(frozen=True)
class _Request:
    number: int
    prompt: list[int]
    template: list[int | None]
    seed: int
    limit: int


@dataclass(frozen=True)
class _Begun:
    """A stream before its first step: the first state holds the first requests, a row each."""

    model: Model
    decoder: Decoder
    engine: Engine
    state: State
    requests: list[_Request]


def decode_stream(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int = 16,
    max_new_tokens: int | Sequence[int] | None = None,
    templates: Sequence[Template] | None = None,
    cache: Cache | None = None,
    seed: int | Sequence[int] = 0,
    max_steps: int | None = None,
    compile: bool = False,
    callback: Callable[[State], None] | None = None,
    throw: bool = True,
) -> Output:
    """Decode all prompts, `rows` at a time. Arguments and result are those of `decode`, in the order of the prompts.

    callback: called with the state of the present rows after every step. Raises DecodeError as `decode` does, and for a decoder with
    branches or a model that remembers something between forwards.
    """
    begun = _begin(model, decoder, prompts, rows, max_new_tokens, templates, cache, seed, max_steps, compile)
    _synchronise(begun.state)
    clock = time.perf_counter()
    found = list(_run(begun, callback, throw))
    _synchronise(begun.state)
    seconds, warm_up = time.perf_counter() - clock, begun.engine.warm_up
    found.sort(key=lambda answer: answer.prompt)
    device = found[0].canvas.device
    return Output(
        tokens=[one.tokens for one in found],
        canvas=torch.stack([one.canvas for one in found]),
        born=torch.stack([one.born for one in found]),
        begin=torch.tensor([one.begin for one in found], device=device),
        end=torch.tensor([one.end for one in found], device=device),
        result=[one.result for one in found],
        stats=Stats(
            nfe=[one.nfe for one in found],
            lanes=[one.lanes for one in found],
            steps=[one.steps for one in found],
            commits=[one.commits for one in found],
            forced=[one.forced for one in found],
            edits=[one.edits for one in found],
            computed=[float(one.lanes) for one in found],
            seconds=max(seconds - warm_up, 0.0),
            warm_up=warm_up,
        ),
    )


def stream(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int = 16,
    max_new_tokens: int | Sequence[int] | None = None,
    templates: Sequence[Template] | None = None,
    cache: Cache | None = None,
    seed: int | Sequence[int] = 0,
    max_steps: int | None = None,
    compile: bool = False,
    callback: Callable[[State], None] | None = None,
    throw: bool = True,
) -> Iterator[Answer]:
    """The answers of `decode_stream`, each as soon as its row has finished. Bad arguments are found before the first one.

    max_steps: of each prompt. A prompt that reaches it ends there, or raises DecodeError if `throw`; answers before it have been given.
    """
    return _run(_begin(model, decoder, prompts, rows, max_new_tokens, templates, cache, seed, max_steps, compile), callback, throw)


def _begin(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: int,
    max_new_tokens: int | Sequence[int] | None,
    templates: Sequence[Template] | None,
    cache: Cache | None,
    seed: int | Sequence[int],
    max_steps: int | None,
    compile: bool,
) -> _Begun:
    """Arguments checked, engine made. Raises DecodeError."""
    if not isinstance(rows, int) or rows < 1:
        raise DecodeError(f"rows must be 1 or more, got {rows!r}. So many prompts are decoded at once. Write rows: 16.")
    cache = NoCache() if cache is None else cache
    check(model.spec, decoder, cache)
    if decoder.branches > 1:
        raise DecodeError(
            f"a row of {name_of(decoder) or type(decoder).__name__} cannot begin anew beside others, got a decoder of {decoder.branches} "
            "branches. What it remembers of its drafts has no first form. Use decode() in batches."
        )
    lengths = answer_lengths(prompts, max_new_tokens, templates)
    check_prompts(model.spec, prompts, lengths)
    answers, seeds = _templates(model.spec, prompts, max_new_tokens, templates), row_seeds(seed, len(prompts))
    requests = [
        _Request(number, list(prompt), list(answer), one, _limit(max_steps, decoder, [len(answer)]))
        for number, (prompt, answer, one) in enumerate(zip(prompts, answers, seeds, strict=True))
    ]
    length = max(len(one.prompt) + len(one.template) for one in requests)
    if compile:
        length = canvas_length(length, _device(model))
    with torch.inference_mode():
        state = _first(decoder, requests[: min(rows, len(requests))], length, model)
        engine = engine_of(model, decoder, cache, state, max(lengths), compile)
    if len(engine.kv.notes):
        raise DecodeError(
            f"rows of this model cannot begin anew beside others, got a wrapper that remembers {', '.join(engine.kv.notes)}. Its memory "
            "is of the row that was there. Use decode() in batches."
        )
    return _Begun(model, decoder, engine, state, requests)


def _run(begun: _Begun, callback: Callable[[State], None] | None, throw: bool) -> Iterator[Answer]:
    decoder, engine, state, requests = begun.decoder, begun.engine, begun.state, begun.requests
    count = state.tokens.shape[0]
    here: list[_Request | None] = list(requests[:count])
    waiting = iter(requests[count:])
    while any(one is not None for one in here):
        # Inference mode ends at every `yield`: it is the caller's business what runs there.
        with torch.inference_mode():
            state = compilable(decoder.step, engine, state)
            if callback is not None:
                callback(trees.over(torch.clone, state) if engine.compile else state)
            done, steps = torch.stack((state.done.long(), state.step)).tolist()  # the second host read of a step
            late = [request is not None and not done[row] and steps[row] >= request.limit for row, request in enumerate(here)]
            state = _cut(state, here, late, throw) if any(late) else state
            ended = [row for row, request in enumerate(here) if request is not None and (done[row] or late[row])]
            if not ended:
                continue
            finished = _answers(state, engine, [(row, request) for row in ended if (request := here[row]) is not None])
            for row in ended:
                here[row] = next(waiting, None)
            anew = {row: request for row in ended if (request := here[row]) is not None}
            if anew:
                state = _refill(begun, state, anew)
        yield from finished


def _first(decoder: Decoder, requests: Sequence[_Request], length: int, model: Model) -> State:
    """The first state of some requests, a row each."""
    rows = [(one.prompt, one.template) for one in requests]
    return decoder.init(begin_state(model.spec, rows, [one.seed for one in requests], length=length, device=_device(model)))


def _refill(begun: _Begun, state: State, anew: dict[int, _Request]) -> State:
    """The state with new requests in these rows; the engine forgets what was there."""
    # As many rows as ever, so that what parts remember keeps its form; in rows that go on the shortest request is begun, and dropped.
    count, length = state.tokens.shape
    dropped = replace(next(iter(anew.values())), prompt=[begun.state.spec.pad_id], template=[None])
    fresh = _first(begun.decoder, [anew.get(row, dropped) for row in range(count)], length, begun.model)
    where = torch.tensor([row in anew for row in range(count)], device=state.tokens.device)
    begun.engine.restart(where, fresh)
    return state.replace_rows(where, fresh)


def _cut(state: State, here: Sequence[_Request | None], late: Sequence[bool], throw: bool) -> State:
    """End the rows that reached their step limit; their text ends at their first mask."""
    stuck = [request for request, over in zip(here, late, strict=True) if over and request is not None]
    if throw:
        raise DecodeError(
            f"prompts {[one.number for one in stuck]} did not finish in {stuck[0].limit} steps. The decoder keeps changing what it "
            "decided, or max_steps is too small. Write a larger max_steps, or throw=False to get the text so far."
        )
    over = torch.tensor(late, device=state.done.device)
    return replace(state, done=state.done | over, result=torch.where(over, int(Result.MAX_STEPS), state.result)).fill()


def _answers(state: State, engine: Engine, ended: Sequence[tuple[int, _Request]]) -> list[Answer]:
    """What the ended rows say, by one host read for all of them."""
    commits = ((state.born >= 0) & ~state.fixed).sum(1)
    account = (state.end, state.result, engine.nfe, engine.lanes, state.step, commits, state.forced, state.edits)
    table = torch.cat((torch.stack(account, 1), state.tokens), 1).cpu()
    answers = []
    for row, request in ended:
        begin = len(request.prompt)
        (end, result, nfe, lanes, steps, counted, forced, edits), canvas = table[row, : len(account)].tolist(), table[row, len(account) :]
        answers.append(
            Answer(
                prompt=request.number,
                tokens=canvas[begin : begin + len(request.template)].tolist(),
                canvas=state.tokens[row].clone(),
                born=state.born[row].clone(),
                begin=begin,
                end=end,
                result=Result(result),
                nfe=nfe,
                lanes=lanes,
                steps=steps,
                commits=counted,
                forced=forced,
                edits=edits,
            )
        )
    return answers
