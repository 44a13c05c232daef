"""The contract of training objectives: a batch and random numbers in, a loss out. Nearly all are sums of terms: training/composed.py."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.registry import declare
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.split import Split, Sums
from dllm_toolkit.types import Attention, ModelSpec


class ObjectiveError(ToolkitError):
    """An objective that the model or the recipe cannot serve."""


class Loss(NamedTuple):
    """The scalar to minimise, and detached scalars for people to read.

    toward: what it adds to the loss of a step, which may have several parts and several batches; this is what is minimised. sums: of a
    loss made of terms, what it is before it is divided. part: value and metrics are those of a part of a batch, and parts add up.
    """

    value: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    toward: Float[Tensor, ""] | None = None
    sums: Sums | None = None
    part: bool = False


class Objective(abc.ABC):
    """What a model is trained to do."""

    @property
    def splits(self) -> bool:
        """Whether parts of a batch add up to the whole, so that several processes can share one."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen teacher is asked for each batch."""
        return False

    @property
    def takes_teacher(self) -> bool:
        """Whether the teacher may be a model of its own."""
        return False

    @property
    def needs_steps(self) -> bool:
        """Whether the rows must say at which step of a decode each token was decided."""
        return False

    def check(self, model: Transformer) -> None:  # noqa: B027 - an objective that takes every model has nothing to check
        """Raise ObjectiveError if `model` cannot be trained this way."""

    def check_rows(self, answer_lengths: Sequence[int]) -> None:  # noqa: B027 - as above
        """Raise ObjectiveError if answers of these lengths, in tokens, cannot be trained on."""

    def decodes(self) -> tuple[Attention, int | None] | None:
        """The attention rule and block length that the trained model decodes with; None leaves the model's own."""
        return None

    def lanes(self, length: int, answer_length: int) -> tuple[int, int]:
        """Query tokens of student and teacher for one row of `length` tokens: what a step costs, whatever the machine."""
        return length, length if self.needs_teacher else 0

    def compiled(self) -> Callable[..., Loss]:
        """What is called instead of this objective where it is to be fast: the same, compiled."""
        return self

    @abc.abstractmethod
    def divisor(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Num[Tensor, "..."]:
        """What the loss of a whole batch divides by, with the noise that `__call__` would draw: batches of one step add up by it."""

    @abc.abstractmethod
    def __call__(
        self,
        model: Transformer,
        batch: Batch,
        generator: torch.Generator,
        *,
        teacher: Transformer | None = None,
        progress: float = 1.0,
        split: Split | None = None,
        step: Num[Tensor, "..."] | None = None,
    ) -> Loss:
        """Draw what the model sees, ask the teacher if there is one, and return the loss.

        teacher: a model of its own; None is `model` with its adapter off. progress: the share of the run that is over, for schedules.
        split: after the noise of the whole batch the rest is done for this part of it. step: if the batch is one of several of a step,
        the sum of their `divisor`s.
        """


declare("objective", Objective)
