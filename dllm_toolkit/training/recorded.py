"""Self-generated data: the answers that a model writes to the prompts of other data, with the step at which it decided each token.

A student that copies its teacher's own text meets no choice that the teacher has not made, which is most of what lets it decide many tokens
at once. The record of a decode is one integer a token, the trace's `born`: the state before step s of a decoder that only commits is
`masked = step_map >= s`, so nothing else need be kept (d3LLM stores every state).

The first run that names a `store` decodes and writes it; later runs, and runs at the same time, read it. Decoding is deterministic.

References: dParallel (arXiv 2509.26488) for self-generated, checked answers; d3LLM (arXiv 2601.07568) for trajectories.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.models.base import Model
from dllm_toolkit.recipe_hints import Lazy, digest
from dllm_toolkit.registry import register
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.data import Data, DataError, Example, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "heldout"]


@register("data", "recorded")
@dataclass(frozen=True)
class RecordedData(Data):
    """The prompts of `prompts`, answered by `model` with `decoder` and `cache`, and kept in the directory `store`.

    right_only: leave out what the task's grader calls wrong. decode_batch: prompts decoded together. device: where the model decodes;
    `auto` takes CUDA when there is one.
    """

    prompts: Data
    model: Lazy[Model]
    decoder: Decoder
    store: Path
    cache: Cache = NoCache()
    right_only: bool = True
    decode_batch: int = 512
    device: Literal["auto", "cpu", "cuda"] = "auto"

    step_maps = True

    def __post_init__(self) -> None:
        if self.decode_batch < 1:
            raise DataError(f"decode_batch must be at least 1, got {self.decode_batch}. It counts prompts. Write decode_batch: 512.")
        if not all(hasattr(self.prompts, name) for name in ("size", "heldout", "answer_length")):
            raise DataError(
                f"prompts must be data of one kind, got {type(self.prompts).__name__}. Rows of one store have one length. Write "
                "prompts: {_component_: stories}, and alternate several `recorded`."
            )

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return self.prompts.batch_size

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        return self.prompts.answer_lengths

    def check(self, max_positions: int) -> None:
        self.prompts.check(max_positions)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.prompts.tokenizer()

    def examples(self, count: int, split: Split = "heldout") -> list[Example]:
        return self.prompts.examples(count, split)

    def sources(self, device: torch.device, seed: int, rank: int = 0, world: int = 1) -> tuple[Source, Source]:
        splits: tuple[Split, Split] = ("train", "heldout")
        train, heldout = (self.rows(split) for split in splits)
        few = min(self.batch_size * world, len(heldout["tokens"]))  # the batches of one process with as many rows
        return self._source(train, device, self.batch_size, seed, rank, world), self._source(heldout, device, few, seed, 0, 1)

    def _source(self, rows: dict[str, Tensor], device: torch.device, batch_size: int, seed: int, rank: int, world: int) -> Source:
        tokens, lengths, steps = (rows[name].to(device) for name in ("tokens", "prompt_length", "step_map"))
        return Source(tokens, lengths.long(), self.answer_lengths[0], batch_size, seed, rank, world, step_map=steps)

    def rows(self, split: Split) -> dict[str, Tensor]:
        """tokens and step_map [N, L], prompt_length [N] of the answers that count, from the store; decoded first if they are not there."""
        file = self.store / f"{split}.safetensors"
        self.store.mkdir(parents=True, exist_ok=True)
        with _alone(self.store / "lock"):
            if not file.is_file():
                self._record(split, file)
        with safe_open(file, "pt") as stored:
            made_by = (stored.metadata() or {}).get("made_by")
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a file, not a mapping
        if made_by != self.made_by():
            raise DataError(
                f"{file} was recorded otherwise, got made_by {made_by!r} where this recipe makes {self.made_by()!r}. Its answers are those "
                "of other prompts, another model or decoder. Write another store:, or delete the directory."
            )
        right = found.pop("right")
        kept = right if self.right_only else torch.ones_like(right)
        if not bool(kept.any()):
            raise DataError(
                f"no answer in {file} is right, got {len(right)} wrong ones. There is nothing to learn from. Write right_only: false, or "
                "record with a better model."
            )
        print(f"{split}: {int(kept.sum())} of {len(kept)} recorded answers are right or wanted, from {self.store}", file=sys.stderr)
        return {name: value[kept] for name, value in found.items()}

    def made_by(self) -> str:
        """16 hex digits of everything that the recorded answers depend on."""
        return digest([self.prompts.identity(), self.model.tree, repr(self.decoder), repr(self.cache)])

    def _record(self, split: Split, file: Path) -> None:
        wanted = getattr(self.prompts, "size" if split == "train" else "heldout")
        examples, answer = self.prompts.examples(sys.maxsize if wanted is None else wanted, split), self.answer_lengths[0]
        size = len(examples)
        where = torch.device("cuda" if self.device == "auto" and torch.cuda.is_available() else self.device.replace("auto", "cpu"))
        model: Any = self.model.build()
        words = self.tokenizer()
        from dllm_toolkit.training.shared import check_words  # Lightning: for `show` this module is imported without it

        check_words(model, words)
        model = model.to(where)
        print(f"decoding {size} prompts ({split}) on {where} for {self.store}", file=sys.stderr, flush=True)
        longest = max(len(example.prompt) for example in examples)
        length = -(-(longest + answer) // 8) * 8  # a multiple of 8 keeps attention kernels aligned
        tokens = torch.full((size, length), model.spec.pad_id, dtype=torch.int32)
        steps = torch.full((size, length), -1, dtype=torch.int32)
        for start in range(0, size, self.decode_batch):
            part = examples[start : start + self.decode_batch]
            output = decode(model, self.decoder, [one.prompt for one in part], max_new_tokens=answer, cache=self.cache, throw=False)
            width = output.canvas.shape[1]
            inside = torch.arange(width) < (output.begin.cpu() + answer).unsqueeze(1)
            tokens[start : start + len(part), :width] = torch.where(inside, output.canvas.cpu(), model.spec.pad_id).int()
            steps[start : start + len(part), :width] = torch.where(inside, output.born.cpu(), -1).int()
        answers = [row[len(one.prompt) : len(one.prompt) + answer] for one, row in zip(examples, tokens.tolist(), strict=True)]
        texts = [_text(words, ids, model.spec.eos_ids) for ids in answers]
        right = torch.tensor([one.grade(text) for one, text in zip(examples, texts, strict=True)])
        lengths = torch.tensor([len(one.prompt) for one in examples], dtype=torch.int32)
        made = {"tokens": tokens, "step_map": steps, "prompt_length": lengths, "right": right}
        unfinished = file.with_suffix(".part")
        save_file(made, unfinished, metadata={"made_by": self.made_by(), "data": json.dumps(repr(self))})
        unfinished.rename(file)  # a run that is killed while it writes leaves no half a file


def require_steps(batch: Batch) -> Int[Tensor, "B L"]:
    """The recorded steps of a batch. Raises DataError for data that has none."""
    if batch.step_map is None:
        raise DataError(
            "this objective follows recorded decodes, got data without steps. Write data: {_component_: recorded, ...}, which records them."
        )
    return batch.step_map


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int], ends: tuple[int, ...]) -> str:
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:stop], skip_special_tokens=True))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside the block no other process records into this store; the lock goes with the process."""
    with path.open("a") as stream:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
