"""Prompts and answers of one's own as training data: a file of rows, or a data set of the hub, in the words of a checkpoint's tokenizer.

    {"prompt": "How many ...", "answer": "There are ..."}           one row a line; other names: `prompt: question`, `answer: solution`

A row becomes `[prompt | answer END EOS EOS ...]` with an answer of `answer_length` tokens: what fills it is learnt like the rest, which is
how a diffusion model learns to end (LLaDA, arXiv 2502.09992). The prompt is written as `dllm-toolkit generate` writes it. Rows that do not
fit are left out and counted. All rows of one prompt are on one side of the held-out split, which depends on the prompts alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from dllm_toolkit.registry import register
from dllm_toolkit.training.data import Data, DataError, Example, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Row(NamedTuple):
    """A prompt as text and as ids, and its answer as text and as ids with the end."""

    text: str
    prompt: list[int]
    reference: str
    answer: list[int]


@register("data", "pairs")
@dataclass(frozen=True)
class PairData(Data):
    """Rows of `path` (JSON lines, a JSON list or CSV, also gzipped), or of the data set `hub` (its `split`).

    checkpoint: directory, hub id or asset:NAME whose tokenizer writes the ids. prompt, answer: names of the columns. prompt_format: the
    text around a prompt, such as "Question: {prompt} Answer:"; null takes the chat template if there is one. end: the token behind an
    answer, such as "<|eot_id|>"; null takes the tokenizer's end of text, which fills up in any case. heldout: prompts set apart. size: the
    most rows used. grade: when a model's own answer is right: the same `text`, or the same last `number`, as GSM8K is graded.
    """

    checkpoint: str
    path: Path | None = None
    hub: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    answer: str = "answer"
    prompt_format: str | None = None
    end: str | None = None
    answer_length: int = 512
    prompt_length_max: int = 512
    heldout: int = 64
    batch_size: int = 8
    size: int | None = None
    grade: Literal["text", "number"] = "text"

    def __post_init__(self) -> None:
        for name in ("answer_length", "prompt_length_max", "heldout", "batch_size", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}. It is a count. Write {name}: 64.")
        if (self.path is None) == (self.hub is None):
            raise DataError(
                f"write either path or hub, got path={self.path} and hub={self.hub}. One of them says where the rows are. "
                "Write path: my_rows.jsonl."
            )
        if self.prompt_format is not None and "{prompt}" not in self.prompt_format:
            raise DataError(
                f"prompt_format must contain {{prompt}}, got {self.prompt_format!r}. The prompt goes there. "
                'Write prompt_format: "Question: {prompt} Answer:".'
            )

    def check(self, max_positions: int) -> None:
        if self.prompt_length_max + self.answer_length > max_positions:
            raise DataError(
                f"rows of {self.prompt_length_max} + {self.answer_length} tokens do not fit the model, got max_positions={max_positions}. "
                f"Every token needs a position. Write prompt_length_max: {max(1, max_positions - self.answer_length)}, or answer less."
            )

    def identity(self) -> str:
        written = blake2b(digest_size=16)  # the file may change under its name
        for rows in self._rows.values():
            for row in rows:
                written.update(repr(row).encode())
        return f"{super().identity()} {written.hexdigest()}"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        from dllm_toolkit.models.hub import resolve
        from dllm_toolkit.models.tokens import load_tokenizer

        found = load_tokenizer(resolve(self.checkpoint, None, "data.checkpoint"))
        if found is None or found.eos_token_id is None:
            lacks = "tokenizer files" if found is None else "end-of-text token"
            raise DataError(
                f"the checkpoint has no {lacks}, got {self.checkpoint!r}. Text becomes ids by it. Write checkpoint: the model's own path."
            )
        return found

    @cached_property
    def _ids(self) -> tuple[int, int]:
        """The token behind an answer, and the one that fills."""
        tokenizer = self._tokenizer
        if self.end is None:
            return tokenizer.eos_token_id, tokenizer.eos_token_id
        found = tokenizer.convert_tokens_to_ids(self.end)
        if found is None or found == tokenizer.unk_token_id:
            raise DataError(
                f"end is no token of this tokenizer, got {self.end!r}. An answer ends with it. Write one such as {tokenizer.eos_token!r}."
            )
        return found, tokenizer.eos_token_id

    def _read(self) -> list[dict[str, Any]]:
        from dllm_toolkit.evaluation.tasks import sources
        from dllm_toolkit.evaluation.tasks.base import TaskError

        columns = (self.prompt, self.answer)
        try:
            found = sources.load(self.path, self.hub or "", self.split, columns)
        except TaskError as error:
            raise DataError(str(error).replace("task.path", "data.path")) from error
        for number, row in enumerate(found, start=1):
            wrong = [name for name in columns if not isinstance(row[name], str) or not row[name].strip()]
            if wrong:
                raise DataError(
                    f"{wrong[0]} of row {number} must be text, got {row[wrong[0]]!r}. There is nothing to learn from it. Correct the row, "
                    "or name another column."
                )
        return found[: self.size]

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        """The rows that fit, by split."""
        from dllm_toolkit.models.tokens import prompt_text

        tokenizer, (end, _) = self._tokenizer, self._ids
        found, long = [], 0
        for row in self._read():
            text = prompt_text(tokenizer, row[self.prompt], self.prompt_format)
            prompt = list(tokenizer.encode(text, add_special_tokens=False))
            answer = [*tokenizer.encode(row[self.answer], add_special_tokens=False), end]
            if len(prompt) > self.prompt_length_max or len(answer) > self.answer_length:
                long += 1
            else:
                found.append(Row(text, prompt, row[self.answer], answer))
        if long:
            print(
                f"data: {long} of {long + len(found)} rows are left out, longer than a prompt of {self.prompt_length_max} or an answer of "
                f"{self.answer_length} tokens",
                file=sys.stderr,
            )
        keys = sorted({_key(row.text) for row in found})
        apart = set(keys[: self.heldout])
        parts = {
            "train": [row for row in found if _key(row.text) not in apart],
            "heldout": [row for row in found if _key(row.text) in apart],
        }
        if not parts["train"]:
            raise DataError(
                f"no rows are left to train on, got {len(found)} that fit, of {len(keys)} prompts, and heldout {self.heldout}. Write a "
                "smaller heldout, or larger answer_length and prompt_length_max."
            )
        return parts

    def sources(self, device: torch.device, seed: int, rank: int = 0, world: int = 1) -> tuple[Source, Source]:
        parts = self._rows
        longest = max(len(row.prompt) for rows in parts.values() for row in rows)
        length = -(-(longest + self.answer_length) // 8) * 8  # a multiple of 8 keeps attention kernels aligned

        def source(rows: list[Row], batch_size: int) -> Source:
            tokens = torch.full((len(rows), length), self._ids[1], dtype=torch.int32)
            for number, row in enumerate(rows):
                written = torch.tensor(row.prompt + row.answer, dtype=torch.int32)
                tokens[number, : len(written)] = written
            lengths = torch.tensor([len(row.prompt) for row in rows])
            return Source(tokens.to(device), lengths.to(device), self.answer_length, batch_size, seed, rank, world)

        heldout = parts["heldout"]
        return source(parts["train"], self.batch_size), source(heldout, max(1, min(self.batch_size, len(heldout) // world)))

    def examples(self, count: int, split: Literal["train", "heldout"] = "heldout") -> list[Example]:
        right = _same_number if self.grade == "number" else _same
        return [Example(row.prompt, row.text, partial(right, row.reference)) for row in self._rows[split][:count]]


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _same(reference: str, text: str) -> bool:
    return " ".join(text.split()) == " ".join(reference.split())


def _same_number(reference: str, text: str) -> bool:
    from dllm_toolkit.evaluation.tasks.numbers import final_number

    wanted = final_number(reference)
    return wanted is not None and final_number(text) == wanted
