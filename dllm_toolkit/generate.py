"""`dllm-toolkit generate`: load a model, decode the answers to prompts, print them.

The answers go to stdout, everything about them to stderr. With a trace, every step prints each row's answer
so far, `_` where a position is not decided yet. A model without a tokenizer takes ids and answers with ids.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import check_prompts
from dllm_toolkit.decoders.base import Decoder, check
from dllm_toolkit.drivers.base import Denoise, Driver, with_loaded
from dllm_toolkit.engine import whether_to_compile
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.ledger import answer_tokens
from dllm_toolkit.evaluation.pictures import plural
from dllm_toolkit.models.base import Model
from dllm_toolkit.models.tokens import prompt_text
from dllm_toolkit.recipe import Lazy, Recipe
from dllm_toolkit.state import State


class GenerateError(ToolkitError):
    """A generation that cannot start."""


@dataclass(frozen=True)
class GenerateOptions:
    """How to decode. Prompt i uses seed + i.

    dtype, device (cpu, cuda, cuda:1, or auto: cuda if there is one): null leaves the model as it was loaded. compile: compiled steps; auto:
    on a GPU, where the first decode takes half a minute longer and all others a fraction of the time.
    """

    max_new_tokens: int = 96
    batch_size: int = 8
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    device: str | None = None
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerateError(f"{name} must be at least 1, got {getattr(self, name)}. Write {name}: 8.")


@dataclass(frozen=True)
class GenerateRecipe:
    """Root of a generation recipe.

    prompt: one text or a list. prompt_format: the text around it, such as "Question: {prompt} Answer:"; null
    takes the tokenizer's chat template if it has one, and the prompt as it is otherwise. prompt_ids: token ids, one list
    or a list of lists, instead of prompt; they are taken as they are.
    """

    model: Lazy[Model]
    decoder: Decoder
    cache: Cache = field(default_factory=NoCache)
    driver: Driver = field(default_factory=Denoise)
    prompt: str | tuple[str, ...] | None = None
    prompt_ids: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    prompt_format: str | None = None
    run: GenerateOptions = field(default_factory=GenerateOptions)

    def __post_init__(self) -> None:
        if self.prompt_format is not None and "{prompt}" not in self.prompt_format:
            raise GenerateError(
                f"prompt_format must contain {{prompt}}, got {self.prompt_format!r}. The prompt goes there. "
                'Write prompt_format: "Question: {prompt} Answer:".'
            )
        if self.prompt is not None and self.prompt_ids is not None:
            raise GenerateError(
                "a recipe takes prompt or prompt_ids, got both. One is text, the other is the same thing as token ids. Leave one out."
            )


@dataclass(frozen=True)
class Prepared:
    """A generation that can start: the model, on its device, the driver with its other models, and the prompts as text (if any) and ids."""

    model: Any
    tokenizer: Any
    driver: Driver
    texts: tuple[str, ...]
    encoded: tuple[list[int], ...]


def prepare(recipe: Recipe, built: GenerateRecipe) -> Prepared:
    """Load and check everything.

    Raises ToolkitError for a missing or empty prompt, a device that is not there, and a decoder, cache and model that do not fit each
    other.
    """
    texts, given = _prompts(recipe, built)
    with _placed(recipe, "run", "device"):
        device = None if built.run.device is None else _device(built.run.device)
    dtype = None if built.run.dtype is None else getattr(torch, built.run.dtype)
    for argument, other in built.driver.others.items():
        if isinstance(other, str):
            with _placed(recipe, "driver", argument):
                built.driver.other(argument)
    model: Any = built.model.build()
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None and texts:
        raise GenerateError(
            "the model has no tokenizer, got a prompt of text. Its checkpoint lacks tokenizer.json, so text cannot be turned into ids. "
            "Put tokenizer.json next to the weights, or write prompt_ids=[1,2,3] instead of prompt; the answer is then printed as ids."
        )
    encoded = [_encode(tokenizer, prompt, built.prompt_format) for prompt in texts] + given
    with _placed(recipe, "prompt_ids"):
        _check_ids(given, model.spec.vocab_size)
    for key, cache in (("decoder", NoCache()), ("cache", built.cache)):
        with _placed(recipe, key):
            check(model.spec, built.decoder, cache)
    others: dict[str, Any] = {}

    def load(argument: str, other: Any) -> Any:
        others[argument] = model if other == built.model else other.build()
        return others[argument]

    driver = with_loaded(built.driver, load)
    with _placed(recipe, "driver"):
        driver.check(model, built.decoder, built.cache)
    with _placed(recipe, "run", "max_new_tokens"):
        check_prompts(model.spec, encoded, [built.run.max_new_tokens] * len(encoded))
    model = model.to(device=device, dtype=dtype)
    for one in others.values():
        one.to(device=device, dtype=dtype)  # modules move in place, and the driver holds these very ones
    return Prepared(model, tokenizer, driver, tuple(texts), tuple(encoded))


def run_generation(recipe: Recipe, built: GenerateRecipe, *, trace: bool = False) -> list[str]:
    """Decode the recipe's prompts and print the answers to stdout; returns them. Raises what `prepare` raises before the first forward."""
    ready = prepare(recipe, built)
    model, tokenizer = ready.model, ready.tokenizer
    answers: list[str] = []
    for start in range(0, len(ready.encoded), built.run.batch_size):
        rows = ready.encoded[start : start + built.run.batch_size]
        output = ready.driver.run(
            model,
            built.decoder,
            rows,
            max_new_tokens=built.run.max_new_tokens,
            cache=built.cache,
            seed=built.run.seed + start,
            compile=whether_to_compile(built.run.compile, model),
            callback=_tracer(tokenizer, start) if trace else None,
        )
        for row, ids in enumerate(output.tokens):
            counted = answer_tokens(ids, model.spec.eos_ids)
            ended = ids[counted - 1] in model.spec.eos_ids
            answers.append(_answer(tokenizer, ids[: counted - ended]))
            print(answers[-1], flush=True)
            more = "".join(f"; {name.replace('_', ' ')} {values[row]}" for name, values in output.stats.extra.items())
            print(
                f"[{plural(counted, 'token')} in {plural(output.stats.nfe[row], 'forward')}{more}; {output.result[row].text}; "
                f"the batch of {len(rows)} took {output.stats.seconds:.2f} s]",
                file=sys.stderr,
            )
    return answers


@contextlib.contextmanager
def _placed(recipe: Recipe, *keys: str) -> Iterator[None]:
    """Errors of the block get the file and the line of the recipe's value under `keys`."""
    try:
        yield
    except ToolkitError as error:
        raise GenerateError(recipe.at(keys, error)) from error


def _prompts(recipe: Recipe, built: GenerateRecipe) -> tuple[list[str], list[list[int]]]:
    """The prompts as texts, or else as lists of ids."""
    texts = [built.prompt] if isinstance(built.prompt, str) else list(built.prompt or ())
    given: list[list[int]] = []
    for item in built.prompt_ids or ():
        if isinstance(item, tuple):
            given.append(list(item))
        else:
            given = given or [[]]
            given[0].append(item)
    prompts = [*texts, *given]
    if not prompts or not all(prompt.strip() if isinstance(prompt, str) else prompt for prompt in prompts):
        raise GenerateError(
            f"{recipe.path}: the prompt is {'empty' if prompts else 'missing'}. There is nothing to answer. "
            'Write prompt="your text" after the recipe, or prompt_ids=[1,2,3].'
        )
    return texts, given


def _check_ids(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for ids in prompts:
        wrong = [one for one in ids if not 0 <= one < vocab_size]
        if wrong:
            raise GenerateError(
                f"these must be ids of the model's vocabulary, got {wrong[0]}. It has {vocab_size} tokens. "
                f"Write ids from 0 to {vocab_size - 1}."
            )


def _answer(tokenizer: Any, ids: list[int]) -> str:
    return str(ids) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True).strip()


def _encode(tokenizer: Any, prompt: str, prompt_format: str | None) -> list[int]:
    text = prompt_text(tokenizer, prompt, prompt_format)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        print(
            f"note: the model's vocabulary lacks {plural(ids.count(tokenizer.unk_token_id), 'word')} of the prompt; "
            "a tiny model knows only the words of its training task",
            file=sys.stderr,
        )
    return ids


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise GenerateError(f"this is no device, got {name!r}. Write cpu, cuda, cuda:1 or auto.") from problem
    if device.type not in ("cpu", "cuda"):
        raise GenerateError(f"this is no device that decoding was tried on, got {name!r}. Write cpu, cuda, cuda:1 or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GenerateError(
            f"this device is not on this machine, got {name!r}. CUDA devices: {torch.cuda.device_count()}. "
            "Write run.device=auto or run.device=cpu."
        )
    return device


def _tracer(tokenizer: Any, first: int) -> Callable[[State], None]:
    steps = 0

    def show(state: State) -> None:
        nonlocal steps
        steps += 1
        tokens, masked = state.tokens.tolist(), state.masked.tolist()
        spans = zip(state.begin.tolist(), state.end.tolist(), strict=True)
        for row, (begin, end) in enumerate(spans):
            text = _canvas(tokenizer, tokens[row][begin:end], masked[row][begin:end])
            print(f"step {steps:3d} row {first + row}: {text}", file=sys.stderr)

    return show


def _canvas(tokenizer: Any, tokens: Sequence[int], masked: Sequence[bool]) -> str:
    shown = (lambda token: f" {token}") if tokenizer is None else (lambda token: tokenizer.decode([token]))
    pieces = [" _" if hidden else shown(token) for token, hidden in zip(tokens, masked, strict=True)]
    return "".join(pieces).replace("\n", " ").strip()
