"""A program of stages: each one a decode of its own, over the text of those before it. TCCF (think coarse, critic fine), arXiv 2602.09555.

    stage 1   coarse blocks, until the row has written its end tag; the text behind the tag is dropped
    glue      a fixed sentence is appended: "let me check that"
    stage 2   block length 1, to the end of the text

What earlier stages wrote is pinned in the next one, so it cannot change, and every stage starts with an empty K/V buffer: the whole
text is encoded again under the new stage's blocks. They are counted from the same place as before, so a block-causal model at block
length 1 sees the thinking of stage 1 token by token. The block length is an argument of each stage's decoder.

A row leaves a stage when it has written `until`, and goes on to the next one. A row that ends its text without it has answered, and is
finished; without `until` the end of the text is what leads to the next stage. A row whose stage has used up its tokens goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import Output, Stats, Template, answer_lengths, check_prompts, decode, row_seeds
from dllm_toolkit.decoders.base import DecodeError, Decoder, check
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.sequence import AtSequence
from dllm_toolkit.drivers.base import Driver
from dllm_toolkit.models.base import Model
from dllm_toolkit.registry import register
from dllm_toolkit.state import State
from dllm_toolkit.types import ModelSpec, Result

COUNTS = tuple(item.name for item in fields(Stats) if item.name not in ("seconds", "warm_up", "extra"))
Text = str | tuple[int, ...]
"""Words, encoded on their own by the model's tokenizer, or token ids."""


@dataclass(frozen=True)
class Stage:
    """One stage of a program. Null takes the configuration's decoder and cache, and what is left of the answer's budget.

    until: the text that ends the stage; null: the end of the text. append: glue, written behind the stage's text and counted as given,
    not as generated. max_new_tokens: the most tokens that the stage may write.
    """

    decoder: Decoder | None = None
    cache: Cache | None = None
    until: Text | None = None
    append: Text | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise DecodeError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}. A stage writes something. Write 64, or null.")


@register("driver", "staged")
@dataclass(frozen=True)
class Staged(Driver):
    """Stages one after the other over one text: coarse thinking until a tag, a sentence in between, a fine check.

    `max_new_tokens` of the run is for all stages together, glue included; a row that has no room left for glue and a token is finished.
    `given` in `Stats.extra` counts glue. Stage i draws its noise under its own key, so no two stages share it.

    Reference: TCCF, arXiv 2602.09555.
    """

    cite = ("2602.09555",)

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise DecodeError("stages is empty. A program needs some. Write at least one, such as stages: [{until: [17]}, {}].")
        if self.stages[-1].append is not None:
            raise DecodeError("the last stage appends a text that nobody reads. Append it to the stage before, or write another stage.")

    def check(self, model: Model, decoder: Decoder, cache: Cache) -> None:
        for number, stage in enumerate(self.stages):
            try:
                check(model.spec, _decoder(model, stage, decoder), stage.cache or cache)
                _check_glue(model.spec, _ids(model, stage.append))
            except DecodeError as problem:
                raise DecodeError(f"stages.{number}: {problem}") from problem

    def run(
        self,
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
        """Answers for a batch of prompts; whatever `decode` refuses, and templates: stages pin tokens themselves. max_steps: of a stage."""
        cache = NoCache() if cache is None else cache
        self.check(model, decoder, cache)
        if templates is not None:
            raise DecodeError("staged takes no templates. Each stage pins what the stages before it wrote. Write max_new_tokens.")
        budgets, seeds = answer_lengths(prompts, max_new_tokens, None), row_seeds(seed, len(prompts))
        check_prompts(model.spec, prompts, budgets)
        seconds = warm_up = 0.0
        rows = [_Row(list(prompt), budget, key) for prompt, budget, key in zip(prompts, budgets, seeds, strict=True)]
        for number, stage in enumerate(self.stages):
            live = [row for row in rows if row.live]
            if not live:
                break
            output = decode(
                model,
                _decoder(model, stage, decoder),
                [row.prompt for row in live],
                templates=[[*row.text, *[None] * row.room(stage)] for row in live],
                cache=stage.cache or cache,
                seed=[row.seed ^ (number * 0x9E3779B9) for row in live],
                max_steps=max_steps,
                compile=compile,
                callback=callback,
                throw=throw,
            )
            seconds += output.stats.seconds
            warm_up += output.stats.warm_up
            last = number + 1 == len(self.stages)
            for index, row in enumerate(live):
                row.take(output, index, _ids(model, stage.until), None if last else _ids(model, stage.append), model.spec)
        return _package(rows, output.canvas.device, seconds, warm_up, model.spec)


class _Row:
    """One row between stages, on the host: what it has written so far, and its account."""

    def __init__(self, prompt: list[int], budget: int, seed: int) -> None:
        self.prompt, self.budget, self.seed = prompt, budget, seed
        self.text: list[int] = []
        self.born: list[int] = []
        self.live = True
        self.result = Result.RUNNING
        self.counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        self.given = self.stages = 0

    def room(self, stage: Stage) -> int:
        """Tokens that the stage may write."""
        left = self.budget - len(self.text)
        return left if stage.max_new_tokens is None else min(left, stage.max_new_tokens)

    def take(self, output: Output, index: int, until: Sequence[int], append: Sequence[int] | None, spec: ModelSpec) -> None:
        """Add what a stage wrote, and glue behind it if there is another stage (`append` is not None) that this row goes on to."""
        begin, end, stats = int(output.begin[index]), int(output.end[index]), output.stats
        wrote = output.tokens[index][len(self.text) : end - begin]
        born = output.born[index, begin + len(self.text) : end].tolist()
        self.text += wrote
        self.born += [one + self.counts["steps"] if one >= 0 else one for one in born]
        self.counts = {name: count + getattr(stats, name)[index] for name, count in self.counts.items()}
        self.result = output.result[index]
        self.stages += 1
        ended = bool(wrote) and wrote[-1] in spec.eos_ids
        tagged = bool(until) and wrote[-len(until) :] == list(until)
        if append is None or self.result == Result.MAX_STEPS or (ended and until and not tagged):
            self.live = False
            return
        over = ended and not tagged  # the end of this stage's text is not the end of the answer
        if len(self.text) - over + len(append) >= self.budget:
            self.live = False
            return
        if over:
            self.counts["commits"] -= self.born[-1] >= 0
            del self.text[-1], self.born[-1]
        self.text += append
        self.born += [-1] * len(append)
        self.given += len(append)


def _package(rows: Sequence[_Row], device: torch.device, seconds: float, warm_up: float, spec: ModelSpec) -> Output:
    """The rows as one Output on one canvas."""
    filler = spec.eos_ids[0] if spec.eos_ids else spec.pad_id
    length = max(len(row.prompt) + row.budget for row in rows)
    canvas = torch.full((len(rows), length), spec.pad_id)
    born = torch.full((len(rows), length), -1)
    tokens = []
    for index, row in enumerate(rows):
        answer = row.text + [filler] * (row.budget - len(row.text))
        tokens.append(answer)
        begin = len(row.prompt)
        canvas[index, : begin + row.budget] = torch.tensor(row.prompt + answer)
        born[index, begin : begin + len(row.born)] = torch.tensor(row.born, dtype=torch.long)
    begins = [len(row.prompt) for row in rows]
    return Output(
        tokens=tokens,
        canvas=canvas.to(device),
        born=born.to(device),
        begin=torch.tensor(begins, device=device),
        end=torch.tensor([begin + len(row.text) for begin, row in zip(begins, rows, strict=True)], device=device),
        result=[row.result for row in rows],
        stats=Stats(
            **{name: [row.counts[name] for row in rows] for name in COUNTS},
            seconds=seconds,
            warm_up=warm_up,
            extra={"given": [row.given for row in rows], "stages": [row.stages for row in rows]},
        ),
    )


def _decoder(model: Model, stage: Stage, default: Decoder) -> Decoder:
    """The stage's decoder, which also stops at its tag. Raises DecodeError for one that has no stop rule to add to."""
    decoder = stage.decoder or default
    until = _ids(model, stage.until)
    if not until:
        return decoder
    if not isinstance(decoder, BlockDecoder):
        raise DecodeError(
            f"until needs a decoder with a stop rule, got {type(decoder).__name__}. The tag is watched there. Write a preset such as "
            "semi_ar, or leave until out."
        )
    return replace(decoder, stop=AtSequence(until, decoder.stop))


def _check_glue(spec: ModelSpec, ids: Sequence[int]) -> None:
    wrong = [one for one in ids if not 0 <= one < spec.vocab_size]
    if wrong:
        raise DecodeError(
            f"append holds an id outside the vocabulary, got {wrong[0]} with {spec.vocab_size} rows. It becomes part of the text. "
            f"Write ids below {spec.vocab_size}, or the text itself."
        )


def _ids(model: Model, text: Text | None) -> tuple[int, ...]:
    if not isinstance(text, str):
        return text or ()
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DecodeError(f"the model has no tokenizer, got the text {text!r}. Write token ids instead, such as [17, 4].")
    return tuple(tokenizer.encode(text, add_special_tokens=False))
