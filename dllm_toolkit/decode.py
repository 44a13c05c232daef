"""decode(): build the state, step until nobody is left, package what came out. It knows no method.

    output = decode(model, d2f(block_length=16), prompts, max_new_tokens=96, cache=BlockCausalCache())
    output.tokens[0]        answer ids of the first row

`trace()` is the same loop opened up: one item for each step, for viewers, tests and training on decoder traces. `start()` and `loop()`
are the halves of `decode`: a driver (drivers/base.py) runs the same loop, with its promises, around a step of its own.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.base import DecodeError, Decoder, check, extra_steps
from dllm_toolkit.engine import Asked, Engine, canvas_length
from dllm_toolkit.models.base import Model
from dllm_toolkit.ops import trees
from dllm_toolkit.state import State, begin_state
from dllm_toolkit.types import ModelSpec, Result

Template = Sequence[int | None]


@dataclass(frozen=True)
class Stats:
    """The account of a decode, one number a row, except `seconds` (wall time of the loop, prefill included, `warm_up` not).

    nfe: forwards until the row finished. lanes: query tokens over all of them. steps: decoder steps. commits: positions decided by the
    method (fill not counted). forced: commits that happened only because progress is promised. edits: decided positions that changed.
    computed: query tokens that really ran, a mean over the model's layers; fewer than `lanes` where a wrapper answers from memory.
    warm_up: further seconds that went into compiling and recording graphs (the first decode of a shape on a GPU).
    extra: what else a driver counts, by name, one number a row.
    """

    nfe: list[int]
    lanes: list[int]
    steps: list[int]
    commits: list[int]
    forced: list[int]
    edits: list[int]
    computed: list[float]
    seconds: float
    warm_up: float = 0.0
    extra: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What a decode returns.

    tokens: the answer of each row, its whole budget; behind its end stands end-of-text. canvas, born [B, L]; begin, end [B].
    """

    tokens: list[list[int]]
    canvas: Int[Tensor, "B L"]
    born: Int[Tensor, "B L"]
    begin: Int[Tensor, "B"]
    end: Int[Tensor, "B"]
    result: list[Result]
    stats: Stats


@dataclass(frozen=True)
class Start:
    """A decode before its first step: the decoder, its state, the engine, and the length of each row's answer."""

    decoder: Decoder
    state: State
    engine: Engine
    budget: list[int]


@dataclass(frozen=True)
class Step:
    """One step as it happened: the state before and after, and the (last) forward in between."""

    before: State
    after: State
    asked: Asked


def decode(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    templates: Sequence[Template] | None = None,
    cache: Cache | None = None,
    seed: int | Sequence[int] = 0,
    max_steps: int | None = None,
    compile: bool = False,
    callback: Callable[[State], None] | None = None,
    throw: bool = True,
) -> Output:
    """Decode answers for a batch of prompts of any lengths.

    max_new_tokens: answer length, one for all or one a row. templates: instead of it, an answer skeleton for each row, where None is to be
    decoded and an id is pinned (infilling). seed: noise key of each row; an int gives row i the key seed + i. max_steps: step limit
    (default: four times the longest answer, or what the decoder's parts declare); a row that reaches it ends there, or raises DecodeError
    if `throw`.

    Raises DecodeError for empty prompts, prompts beyond the model's positions, and parts that do not fit each other.
    """
    begun = start(model, decoder, prompts, max_new_tokens=max_new_tokens, templates=templates, cache=cache, seed=seed, compile=compile)
    return loop(begun, decoder.step, max_steps=max_steps, callback=callback, throw=throw)


def loop(
    begun: Start,
    step: Callable[[Engine, State], State],
    *,
    max_steps: int | None = None,
    callback: Callable[[State], None] | None = None,
    throw: bool = True,
) -> Output:
    """Step until nobody is left, within the step limit, and package what came out. `step` is a decoder's, or a driver's own."""
    state, engine, budget = begun.state, begun.engine, begun.budget
    limit = _limit(max_steps, begun.decoder, budget)
    _synchronise(state)
    clock = time.perf_counter()
    with torch.inference_mode():
        for _ in range(limit):
            after = compilable(step, engine, state)
            if engine.finished(after):
                break
            state = after
            if callback is not None:
                callback(trees.over(torch.clone, state) if engine.compile else state)  # the next step overwrites what a graph returned
        else:
            state = _cut(state, limit, throw)
        _synchronise(state)
    return _package(state, engine, budget, time.perf_counter() - clock)


def compilable(step: Callable[[Engine, State], State], engine: Engine, state: State) -> State:
    """One step. Raises DecodeError where a part cannot be compiled, with the compiler's reason."""
    try:
        return step(engine, state)
    except Exception as error:
        if not engine.compile or not type(error).__module__.startswith("torch._dynamo"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DecodeError(
            f"a part of this decode cannot be compiled, got: {' '.join(lines[:3])[:400]} Compiled rules may not read a tensor on the host "
            "(.item(), `if` on a tensor). Write compile: false, or test the part with dllm-toolkit check."
        ) from error


def trace(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    templates: Sequence[Template] | None = None,
    cache: Cache | None = None,
    seed: int | Sequence[int] = 0,
    max_steps: int | None = None,
    listen: Callable[[Asked], None] | None = None,
) -> Iterator[Step]:
    """Step through a decode: the same arguments and states as `decode`, one `Step` at a time. Ends at `max_steps` without an error.

    listen: called with every forward, for decoders that ask several times in one step.
    """
    begun = start(model, decoder, prompts, max_new_tokens=max_new_tokens, templates=templates, cache=cache, seed=seed)
    state, engine = begun.state, begun.engine
    engine.listen = listen
    for _ in range(_limit(max_steps, decoder, begun.budget)):
        with torch.inference_mode():
            after = decoder.step(engine, state)
        if engine.finished(after):
            return
        assert engine.last is not None
        yield Step(state, after, engine.last)
        state = after


def start(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    templates: Sequence[Template] | None = None,
    cache: Cache | None = None,
    seed: int | Sequence[int] = 0,
    compile: bool = False,
    max_reads: int | None = None,
) -> Start:
    """The first state of a decode and its engine. Arguments and errors are those of `decode`.

    max_reads: the most positions that one step reads in a row, for compiled decoding; None: what the decoder says.
    """
    spec = model.spec
    cache = NoCache() if cache is None else cache
    check(spec, decoder, cache)
    check_prompts(spec, prompts, answer_lengths(prompts, max_new_tokens, templates))
    answers = _templates(spec, prompts, max_new_tokens, templates)
    seeds = row_seeds(seed, len(prompts))
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    if compile:
        length = canvas_length(length, _device(model))
    rows = [(list(prompt), list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    # In inference mode like every later state: a compiled step would otherwise be compiled twice, once for the first state alone.
    with torch.inference_mode():
        state = decoder.init(begin_state(spec, rows, seeds, length=length, device=_device(model)))
    budget = [len(answer) for answer in answers]
    return Start(decoder, state, engine_of(model, decoder, cache, state, max(budget), compile, max_reads), budget)


def engine_of(
    model: Model, decoder: Decoder, cache: Cache, state: State, budget: int, compile: bool = False, max_reads: int | None = None
) -> Engine:
    """A new engine that fits a decoder: for a decode from its first state, or one that goes on from `state`.

    budget: the longest answer. max_reads: the most positions that one step reads; None: what the decoder says.
    """
    return Engine(
        model,
        cache,
        state,
        max_reads=decoder.max_reads(budget) if max_reads is None else max_reads,
        compile=compile,
        branches=decoder.branches,
        form=decoder.branch_form,
    )


def _limit(max_steps: int | None, decoder: Decoder, budget: list[int]) -> int:
    """The most steps of a decode. The default is generous: one step a token and what the parts declare beyond it, or four a token."""
    if max_steps is None:
        answer = max(budget)
        return max(4 * answer + 17, answer + extra_steps(decoder, answer))
    limit = _whole("max_steps", max_steps)
    if not isinstance(limit, int) or limit < 1:
        raise DecodeError(f"max_steps must be 1 or more, got {max_steps!r}. It counts decoder steps. Write max_steps: 256, or None.")
    return limit


def _whole(name: str, value: Any) -> int | list[int]:
    """`value` as a whole number or a list of them."""
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return [operator.index(one) for one in value]
    except TypeError:
        raise DecodeError(f"{name} must be a whole number or a list of them, got {value!r}. Write for instance {name}: 96.") from None


def answer_lengths(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int] | None, templates: Sequence[Template] | None
) -> list[int]:
    """The answer length of each prompt. Raises DecodeError."""
    if (max_new_tokens is None) == (templates is None):
        raise DecodeError(
            f"write either max_new_tokens or templates, got max_new_tokens={max_new_tokens} and "
            f"{'no' if templates is None else len(templates)} templates. One of them says how long the answers are."
        )
    lengths = _whole("max_new_tokens", max_new_tokens) if templates is None else [len(template) for template in templates]
    if isinstance(lengths, int):
        lengths = [lengths] * len(prompts)
    if len(lengths) != len(prompts):
        raise DecodeError(f"one answer length a prompt, got {len(lengths)} for {len(prompts)} prompts. Write one number for all.")
    return lengths


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """The noise key of each row, 32 bits of it: the noise reads no more, so seeds of any size and sign are keys. Raises DecodeError."""
    seeds = _whole("seed", seed)
    seeds = [seeds + row for row in range(rows)] if isinstance(seeds, int) else seeds
    if len(seeds) != rows:
        raise DecodeError(f"one seed a prompt, got {len(seeds)} for {rows} prompts. Write seed: 0, or a list of that length.")
    return [one & 0xFFFFFFFF for one in seeds]


def _templates(
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] | None,
    templates: Sequence[Template] | None,
) -> list[Template]:
    """The answer skeleton of each prompt."""
    if templates is None:
        return [[None] * length for length in answer_lengths(prompts, max_new_tokens, None)]
    for row, template in enumerate(templates):
        wrong = [one for one in template if one is not None and not 0 <= one < spec.vocab_size]
        if wrong:
            raise DecodeError(
                f"template {row} pins an id outside the vocabulary, got {wrong[0]} with {spec.vocab_size} rows. Write an id below that, or "
                "None for a position to decode."
            )
    return list(templates)


def check_prompts(spec: ModelSpec, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> None:
    """Can these prompts be decoded by this model? Raises DecodeError for the first that cannot."""
    if len(prompts) == 0:
        raise DecodeError("nothing to decode, got no prompts. Give at least one list of token ids.")
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if len(prompt) == 0:
            raise DecodeError(f"prompt {row} is empty. A model needs at least one token to start from. Write at least a start token.")
        if answer < 1:
            raise DecodeError(f"max_new_tokens must be 1 or more, got {answer} for prompt {row}. Write max_new_tokens: 96.")
        if len(prompt) + answer > spec.max_positions:
            room = spec.max_positions - len(prompt)
            advice = f"Write max_new_tokens: {room}, or shorten the prompt." if room > 0 else "Shorten the prompt."
            raise DecodeError(
                f"prompt {row} is too long, got {len(prompt)} tokens and {answer} to decode with {spec.max_positions} positions. {advice}"
            )
        if min(prompt) < 0 or max(prompt) >= spec.vocab_size:
            raise DecodeError(
                f"prompt {row} holds an id outside the vocabulary, got {min(prompt)} .. {max(prompt)} with {spec.vocab_size} rows. "
                "Encode it with the checkpoint's own tokenizer."
            )


def _cut(state: State, limit: int, throw: bool) -> State:
    """End the rows that reached the step limit; their text ends at their first mask."""
    stuck = ~state.done
    if throw and bool(stuck.any()):
        raise DecodeError(
            f"rows {stuck.nonzero().flatten().tolist()} did not finish in {limit} steps. The decoder keeps changing what it decided, or "
            "max_steps is too small. Write a larger max_steps, or throw=False to get the text so far."
        )
    result = torch.where(stuck, int(Result.MAX_STEPS), state.result)
    return replace(state, done=torch.ones_like(state.done), result=result).fill()


def _package(state: State, engine: Engine, budget: list[int], seconds: float) -> Output:
    begin = state.begin.tolist()
    canvas = state.tokens.tolist()
    return Output(
        tokens=[row[first : first + size] for row, first, size in zip(canvas, begin, budget, strict=True)],
        canvas=state.tokens.clone(),  # a compiled decode leaves its memory to the next one
        born=state.born.clone(),
        begin=state.begin.clone(),
        end=state.end.clone(),
        result=[Result(value) for value in state.result.tolist()],
        stats=Stats(
            nfe=engine.nfe.tolist(),
            lanes=engine.lanes.tolist(),
            steps=state.step.tolist(),
            commits=((state.born >= 0) & ~state.fixed).sum(1).tolist(),
            forced=state.forced.tolist(),
            edits=state.edits.tolist(),
            computed=engine.computed.tolist(),
            seconds=max(seconds - engine.warm_up, 0.0),
            warm_up=engine.warm_up,
        ),
    )


def _device(model: Model) -> torch.device:
    device = getattr(model, "device", None)
    return torch.device("cpu") if device is None else torch.device(device)


def _synchronise(state: State) -> None:
    if state.tokens.is_cuda:
        torch.cuda.synchronize(state.tokens.device)
