"""Training data as one tensor on the device: no loader workers, no copies, every batch a pure function of (seed, index).

A story costs microseconds to write, a training step milliseconds; so all problems are written once, by worker processes, and a batch is a
row gather. Batch number i of a run depends on nothing but the seed and i, which is what makes a killed run continue with the same data.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.registry import declare, register
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.split import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class DataError(ToolkitError):
    """Training data that cannot be made or does not fit."""


class Example(NamedTuple):
    """A held-out problem to decode while training: prompt ids, prompt text, and graders of the answer's text.

    grade: is the final answer right? exact: is it the reference solution? None where nobody can say.
    """

    prompt: list[int]
    text: str
    grade: Callable[[str], bool]
    exact: Callable[[str], bool] | None = None


class Source:
    """Rows on a device. `batch(i)` is batch number i of an endless run; epochs are permutations seeded by (seed, epoch)."""

    def __init__(
        self,
        tokens: Int[Tensor, "N L"],
        prompt_length: Int[Tensor, "N"],
        answer_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        step_map: Int[Tensor, "N L"] | None = None,
    ) -> None:
        self.tokens, self.prompt_length, self.answer_length = tokens, prompt_length, answer_length
        self.step_map = step_map
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.batches_per_epoch = tokens.shape[0] // (batch_size * world)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"there are fewer problems than one batch holds, got {tokens.shape[0]} problems and batches of {batch_size} on "
                f"{world} devices. An epoch would be empty. Write size: {batch_size * world} or more."
            )
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def size(self) -> str:
        """How much there is, for people."""
        return f"{self.tokens.shape[0]} rows of {self.tokens.shape[1]} tokens"

    @property
    def parts(self) -> Sequence[Source]:
        """The sources whose rows are all of one shape: this one alone."""
        return (self,)

    def batch(self, index: int) -> Batch:
        """Batch number `index` (from 0, over all epochs) of this rank."""
        return Split(self.rank, self.world).of(self.whole(index))

    def whole(self, index: int) -> Batch:
        """Batch number `index` of all ranks, in their order: what one process with as many rows would get."""
        epoch, within = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(fold(self.seed, epoch))
            order = torch.randperm(self.tokens.shape[0], generator=generator)
            self._order, self._epoch = order.to(self.tokens.device), epoch
        size = self.world * self.batch_size
        return self.rows(self._order[within * size : (within + 1) * size])

    def rows(self, chosen: Int[Tensor, "B"]) -> Batch:
        """The batch of the given rows."""
        tokens = self.tokens.index_select(0, chosen).long()
        steps = None if self.step_map is None else self.step_map.index_select(0, chosen).long()
        return Batch(tokens, self.prompt_length.index_select(0, chosen), self.answer_length, steps)

    def all_batches(self) -> list[Batch]:
        """The rows in order, in whole batches of all ranks: a fixed validation set."""
        size = self.world * self.batch_size
        indices = torch.arange(self.batches_per_epoch * size, device=self.tokens.device)
        return [self.rows(part) for part in indices.split(size)]


class Rotation:
    """Several sources in turn: batch i comes from source i modulo their number, so every batch is of one shape."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts
        self.batches_per_epoch = len(parts) * min(part.batches_per_epoch for part in parts)

    @property
    def size(self) -> str:
        return " and ".join(part.size for part in self.parts)

    def batch(self, index: int) -> Batch:
        turn, which = divmod(index, len(self.parts))
        return self.parts[which].batch(turn)

    def whole(self, index: int) -> Batch:
        turn, which = divmod(index, len(self.parts))
        return self.parts[which].whole(turn)

    def all_batches(self) -> list[Batch]:
        return [batch for part in self.parts for batch in part.all_batches()]


class Stream:
    """An endless iterable of training batches that starts where the module says: the loader of the Trainer.

    A batch has the rows of all processes; what is this one's is decided after the noise was drawn (split.py).
    `start` is read when iteration begins, after a checkpoint was restored, so that resuming needs no loader state and Lightning may
    fetch ahead.
    """

    def __init__(self, source: Source | Rotation, start: Callable[[], int]) -> None:
        self.source, self.start = source, start

    def __iter__(self) -> Iterator[Batch]:
        index = self.start()
        while True:
            yield self.source.whole(index)
            index += 1


class Fixed:
    """The same batches in every pass: a validation loader. (Lightning takes a plain list for several loaders.)"""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Data(abc.ABC):
    """What to train on: makes sources of rows, and held-out examples to decode."""

    batch_size: int
    step_maps: ClassVar[bool] = False
    """Whether the rows say at which step of a decode each token was decided."""

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        """The answer lengths that occur, in tokens; () if unknown."""
        length = getattr(self, "answer_length", None)
        return () if length is None else (length,)

    def identity(self) -> str:
        """Two data of one identity have the same rows, however many of them make a batch and whoever writes them."""
        if not is_dataclass(self):
            return repr(self)
        named = [f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.name not in ("batch_size", "workers")]
        return f"{type(self).__qualname__}({', '.join(named)})"

    @abc.abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer whose ids the rows hold."""

    @abc.abstractmethod
    def sources(self, device: torch.device, seed: int, rank: int = 0, world: int = 1) -> tuple[Source | Rotation, Source | Rotation]:
        """Training rows and held-out rows, on `device`."""

    @abc.abstractmethod
    def examples(self, count: int, split: Literal["train", "heldout"] = "heldout") -> list[Example]:
        """The first `count` problems of a split, held-out ones by default."""

    @abc.abstractmethod
    def check(self, max_positions: int) -> None:
        """Raise DataError if the rows do not fit a model of `max_positions`."""


declare("data", Data)


def fold(seed: int, *numbers: int) -> int:
    """One 63-bit seed from a seed and counters (splitmix64 rounds): neighbouring counters give unrelated streams."""
    word = (1 << 64) - 1
    state = seed & word
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + (number & word) * 0xD1B54A32D192ED03) & word
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
        state ^= state >> 31
    return state >> 1


@register("data", "stories")
@dataclass(frozen=True)
class StoryData(Data):
    """Story arithmetic (data/stories.py): `size` training problems and `heldout` others, disjoint by construction.

    Rows are `[prompt | solution EOS EOS ...]` with an answer of `answer_length` tokens. `style`: `terse`, or `worded`, which needs an
    answer of 128 and a prompt of 112. `data_seed` picks the problems; the order in which they come follows the run's seed.
    `workers`: processes that write them; 0 is this process, None one for each core if many.
    """

    size: int = 100_000
    heldout: int = 2_048
    batch_size: int = 256
    answer_length: int = 80
    prompt_length_max: int = 80
    data_seed: int = 0
    workers: int | None = None
    style: Literal["terse", "worded"] = "terse"

    def __post_init__(self) -> None:
        for name in ("size", "heldout", "batch_size", "answer_length", "prompt_length_max"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}. It is a count. Write {name}: 256.")
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers must be 0 or more, got {self.workers}. It counts processes. Write workers: 0, or null.")
        if self.data_seed < 0:
            raise DataError(f"data_seed must not be negative, got {self.data_seed}. It picks the problems. Write data_seed: 0.")

    def check(self, max_positions: int) -> None:
        from dllm_toolkit.data.stories import LENGTHS

        if self.size < self.batch_size:
            raise DataError(
                f"there are fewer problems than one batch holds, got size {self.size} and batch_size {self.batch_size}. An epoch would be "
                f"empty. Write size: {self.batch_size} or more."
            )
        for name, least in zip(("prompt_length_max", "answer_length"), LENGTHS[self.style], strict=True):
            if getattr(self, name) < least:
                raise DataError(
                    f"{name} must be at least {least}, got {getattr(self, name)}. Stories of style {self.style} are that long. "
                    f"Write {name}: {least}."
                )
        if self.prompt_length_max + self.answer_length > max_positions:
            raise DataError(
                f"rows of {self.prompt_length_max} + {self.answer_length} tokens do not fit the model, got max_positions="
                f"{max_positions}. Every token needs a position. Write max_positions: {self.prompt_length_max + self.answer_length}."
            )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from dllm_toolkit.data.stories import build_tokenizer

        return build_tokenizer()

    def _arrays(self, split: Literal["train", "heldout"], size: int) -> tuple[np.ndarray, np.ndarray]:
        import os

        from dllm_toolkit.data.stories import token_arrays

        # A spawned worker takes seconds to start and writes over ten thousand problems in each of them.
        automatic = (os.cpu_count() or 1) if size > 50_000 else 0
        return token_arrays(
            split,
            size,
            self.data_seed,
            automatic if self.workers is None else self.workers,
            prompt_length_max=self.prompt_length_max,
            answer_length=self.answer_length,
            style=self.style,
        )

    def sources(self, device: torch.device, seed: int, rank: int = 0, world: int = 1) -> tuple[Source, Source]:
        train, heldout = self._arrays("train", self.size), self._arrays("heldout", self.heldout)
        # One static length for the whole run, no longer than the longest prompt needs (a multiple of 8 keeps attention kernels aligned).
        longest = max(int(train[1].max()), int(heldout[1].max()))
        length = min(train[0].shape[1], -(-(longest + self.answer_length) // 8) * 8)

        def source(arrays: tuple[np.ndarray, np.ndarray], batch_size: int, rank: int, world: int) -> Source:
            ids = np.ascontiguousarray(arrays[0][:, :length])
            if int(ids.max()) >= 1 << 15:
                raise DataError(f"token ids must be below 32768, got {int(ids.max())}. Rows are kept as int16. Use a smaller vocabulary.")
            tokens = torch.from_numpy(ids.astype(np.int16)).to(device)
            prompt_length = torch.from_numpy(arrays[1].astype(np.int64)).to(device)
            return Source(tokens, prompt_length, self.answer_length, batch_size, seed, rank, world)

        return source(train, self.batch_size, rank, world), source(
            heldout, max(1, min(self.batch_size, self.heldout // world)), rank, world
        )

    def examples(self, count: int, split: Literal["train", "heldout"] = "heldout") -> list[Example]:
        from functools import partial

        from dllm_toolkit.data import stories

        tokenizer = self.tokenizer()
        problems = [stories.story(self.data_seed, index, split, self.style) for index in range(count)]
        return [
            Example(
                tokenizer.encode(stories.format_prompt(problem), add_special_tokens=False),
                stories.format_prompt(problem),
                partial(_graded, problem),
                partial(_exact, problem),
            )
            for problem in problems
        ]


@register("data", "alternating")
@dataclass(frozen=True)
class AlternatingData(Data):
    """Several kinds of data in turn, a batch of each: rows of different lengths without padding one to the other.

    All parts must speak one tokenizer and have one batch size; an epoch ends with the part that has the fewest batches.
    """

    parts: tuple[Data, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise DataError("parts is empty. There is nothing to alternate. Write at least one kind of data.")
        if len({part.batch_size for part in self.parts}) > 1:
            sizes = [part.batch_size for part in self.parts]
            raise DataError(f"the parts differ in batch_size, got {sizes}. Every step should count the same. Write one number for all.")
        if len({frozenset(part.tokenizer().get_vocab().items()) for part in self.parts}) > 1:
            raise DataError("the parts have different tokenizers. One model reads them all. Use data of one tokenizer.")

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return self.parts[0].batch_size

    def check(self, max_positions: int) -> None:
        for part in self.parts:
            part.check(max_positions)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.parts[0].tokenizer()

    def sources(self, device: torch.device, seed: int, rank: int = 0, world: int = 1) -> tuple[Rotation, Rotation]:
        made = [part.sources(device, fold(seed, number) >> 32, rank, world) for number, part in enumerate(self.parts)]
        return Rotation([train for train, _ in made]), Rotation([heldout for _, heldout in made])  # type: ignore[misc]

    @property
    def step_maps(self) -> bool:  # type: ignore[override]
        return all(part.step_maps for part in self.parts)

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        return tuple(length for part in self.parts for length in part.answer_lengths)

    def examples(self, count: int, split: Literal["train", "heldout"] = "heldout") -> list[Example]:
        """The parts' first problems in turn."""
        share = -(-count // len(self.parts))
        return [one for group in zip(*(part.examples(share, split) for part in self.parts), strict=True) for one in group][:count]


def _graded(problem: object, text: str) -> bool:
    from dllm_toolkit.data.stories import grade_answer

    return grade_answer(text, problem)  # type: ignore[arg-type]


def _exact(problem: object, text: str) -> bool:
    from dllm_toolkit.data.stories import grade_exact

    return grade_exact(text, problem)  # type: ignore[arg-type]
