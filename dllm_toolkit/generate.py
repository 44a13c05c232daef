"""`dllm-toolkit generate`: load a model, decode the answers to prompts, print them.

The answers go to stdout, everything about them to stderr. With a trace, every step prints each row's answer
so far, `_` where a position is not decided yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import Decoder, check
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.ledger import answer_tokens
from dllm_toolkit.models.base import Model
from dllm_toolkit.recipe import Lazy, Recipe
from dllm_toolkit.state import State


class GenerateError(ToolkitError):
    """A generation that cannot start."""


@dataclass(frozen=True)
class GenerateOptions:
    """How to decode. Prompt i uses seed + i.

    dtype, device (cpu, cuda, cuda:1, or auto: cuda if there is one): null leaves the model as it was loaded.
    """

    max_new_tokens: int = 96
    batch_size: int = 8
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    device: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerateError(f"{name} must be at least 1, got {getattr(self, name)}. Write {name}: 8.")


@dataclass(frozen=True)
class GenerateRecipe:
    """Root of a generation recipe.

    prompt: one text or a list. prompt_format: the text around it, such as "Question: {prompt} Answer:"; null
    takes the tokenizer's chat template if it has one, and the prompt as it is otherwise.
    """

    model: Lazy[Model]
    decoder: Decoder
    cache: Cache = field(default_factory=NoCache)
    prompt: str | tuple[str, ...] | None = None
    prompt_format: str | None = None
    run: GenerateOptions = field(default_factory=GenerateOptions)

    def __post_init__(self) -> None:
        if self.prompt_format is not None and "{prompt}" not in self.prompt_format:
            raise GenerateError(
                f"prompt_format must contain {{prompt}}, got {self.prompt_format!r}. The prompt goes there. "
                'Write prompt_format: "Question: {prompt} Answer:".'
            )


def run_generation(recipe: Recipe, built: GenerateRecipe, *, trace: bool = False) -> list[str]:
    """Decode the recipe's prompts and print the answers to stdout; returns them.

    Raises ToolkitError before the first forward for a missing or empty prompt, a device that is not there,
    and a decoder, cache and model that do not fit each other.
    """
    prompts = [built.prompt] if isinstance(built.prompt, str) else list(built.prompt or ())
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise GenerateError(
            f"{recipe.path}: the prompt is {'empty' if prompts else 'missing'}. There is nothing to answer. "
            'Write prompt="your text" after the recipe.'
        )
    device = None if built.run.device is None else _device(built.run.device)
    dtype = None if built.run.dtype is None else getattr(torch, built.run.dtype)
    model: Any = built.model.build()
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise GenerateError("the model has no tokenizer. Prompts are text. Put tokenizer.json next to its weights.")
    check(model.spec, built.decoder, built.cache)
    model = model.to(device=device, dtype=dtype)
    encoded = [_encode(tokenizer, prompt, built.prompt_format) for prompt in prompts]
    answers: list[str] = []
    for start in range(0, len(encoded), built.run.batch_size):
        rows = encoded[start : start + built.run.batch_size]
        output = decode(
            model,
            built.decoder,
            rows,
            max_new_tokens=built.run.max_new_tokens,
            cache=built.cache,
            seed=built.run.seed + start,
            compile=built.run.compile,
            callback=_tracer(tokenizer, start) if trace else None,
        )
        for row, ids in enumerate(output.tokens):
            counted = answer_tokens(ids, model.spec.eos_ids)
            ended = ids[counted - 1] in model.spec.eos_ids
            answers.append(tokenizer.decode(ids[: counted - ended], skip_special_tokens=True).strip())
            print(answers[-1], flush=True)
            print(
                f"[{counted} tokens in {output.stats.nfe[row]} forwards; {output.result[row].text}; "
                f"the batch of {len(rows)} took {output.stats.seconds:.2f} s]",
                file=sys.stderr,
            )
    return answers


def _encode(tokenizer: Any, prompt: str, prompt_format: str | None) -> list[int]:
    if prompt_format is not None:
        text = prompt_format.replace("{prompt}", prompt)
    elif tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        text = prompt
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        print(
            f"note: the model's vocabulary lacks {ids.count(tokenizer.unk_token_id)} words of the prompt; "
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
        raise GenerateError(f"run.device is no device, got {name!r}. Write cpu, cuda, cuda:1 or auto.") from problem
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GenerateError(
            f"run.device is not on this machine, got {name!r}. CUDA devices: {torch.cuda.device_count()}. "
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
    pieces = [" _" if hidden else tokenizer.decode([token]) for token, hidden in zip(tokens, masked, strict=True)]
    return "".join(pieces).replace("\n", " ").strip()
