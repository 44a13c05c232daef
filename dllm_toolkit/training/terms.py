"""Terms of a training loss: what is measured at a position, at which positions, with which weight, divided by what.

    loss = sum over terms k, copies c of   share_k(progress) * normalise_k( values_k(logits_c) * weight_k(c) )

    kind            values                                              weight
    CrossEntropy    -log p(token)                                       the noise process's
    ForwardKL       -T^2 sum p_teacher log p_student                    the same, where the teacher counts
    ReverseKL        T^2 KL(student || teacher)                         the same
    Certainty       entropy of softmax(logits / T)                      1 where the most probable token is the right one, else 0

A copy is one noisy version of the batch: complementary masks make two. A term never calls the model and never sees a layout. It is asked
for a number of positions that have a weight, as if they were one row, in any order: what it says of one may depend on that one alone.

References: D2F (arXiv 2508.09192), CD4LM (arXiv 2601.02236), dParallel (arXiv 2509.26488), LLaDA2.0's confidence-aware training
(arXiv 2512.15745).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.training.losses import Normaliser, ObjectiveError, cross_entropy, reverse_kl, soft_cross_entropy, wide


@dataclass(frozen=True)
class Ramp:
    """A number that goes from `start` to `end` over the run: `start` for the share `hold` of it, then along a line or half a cosine."""

    start: float
    end: float
    hold: float = 0.0
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """Its value when a share `progress` of the run is over."""
        rest = 1.0 - self.hold
        u = min(1.0, max(0.0, (progress - self.hold) / rest)) if rest > 0 else 0.0
        if self.shape == "cosine":
            u = 0.5 * (1.0 - math.cos(math.pi * u))
        return self.start + (self.end - self.start) * u


def stage(values: int | Sequence[int], progress: float) -> int:
    """The value of a ladder of equally long stages: block lengths of warm-up, stable phase and decay, or of progressive training."""
    values = (values,) if isinstance(values, int) else values
    return values[min(len(values) - 1, int(progress * len(values)))]


def interpolated(values: Sequence[int], progress: float) -> int:
    """A value on the line through equally spaced knots, rounded down: d3LLM's growing window."""
    place = min(1.0, max(0.0, progress)) * (len(values) - 1)
    low = min(int(place), len(values) - 2) if len(values) > 1 else 0
    high = min(low + 1, len(values) - 1)
    return int(values[low] + (values[high] - values[low]) * (place - low))


class Selected(NamedTuple):
    """Positions as a term sees them. teacher_weight: None is `weight`."""

    tokens: Int[Tensor, "B L"]
    weight: Float[Tensor, "B L"]
    teacher: Float[Tensor, "B L V"] | None = None
    teacher_weight: Float[Tensor, "B L"] | None = None


@dataclass(frozen=True)
class Term(abc.ABC):
    """One summand of a loss. first_only: counted on the first copy alone."""

    share: float | Ramp = 1.0
    normaliser: Normaliser = "masked_count"
    first_only: bool = False

    @abc.abstractmethod
    def __call__(self, logits: Float[Tensor, "B L V"], selected: Selected) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Values and weights of every position."""

    def known_weight(self, selected: Selected) -> Float[Tensor, "B L"]:
        """The weights, as far as they are known before the model is asked: what batches of one step weigh (training/composed.py)."""
        return selected.weight

    def share_at(self, progress: float) -> float:
        """The factor of this term when a share `progress` of the run is over."""
        return self.share.at(progress) if isinstance(self.share, Ramp) else float(self.share)

    @property
    def name(self) -> str:
        """What metrics call it."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class CrossEntropy(Term):
    """-log p of the clean token."""

    def __call__(self, logits: Float[Tensor, "B L V"], selected: Selected) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        return cross_entropy(logits, selected.tokens), selected.weight


@dataclass(frozen=True)
class _Divergence(Term):
    """From or to a frozen teacher, at temperature T on both sides; T^2 keeps the gradient's size."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def known_weight(self, selected: Selected) -> Float[Tensor, "B L"]:
        return selected.weight if selected.teacher_weight is None else selected.teacher_weight


@dataclass(frozen=True)
class ForwardKL(_Divergence):
    """T^2 KL(teacher || student), up to the teacher's entropy, which has no gradient."""

    def __call__(self, logits: Float[Tensor, "B L V"], selected: Selected) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        assert selected.teacher is not None
        return self.temperature**2 * soft_cross_entropy(logits, selected.teacher, self.temperature), self.known_weight(selected)


@dataclass(frozen=True)
class ReverseKL(_Divergence):
    """T^2 KL(student || teacher)."""

    def __call__(self, logits: Float[Tensor, "B L V"], selected: Selected) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        assert selected.teacher is not None
        return self.temperature**2 * reverse_kl(logits, selected.teacher, self.temperature), self.known_weight(selected)


@dataclass(frozen=True)
class Certainty(Term):
    """Entropy in nats of softmax(logits / T) where the most probable token is the clean one: be sure of what is right.

    The gate has no gradient, and the mean is over the positions that pass it. If none does, the term is 0.

    How many pass is known only after the forward. Processes tell each other; of several batches of a step each has its own mean, which
    counts as the batch's supervised positions do, so `accumulate` is one larger batch up to differences in the share that passes. With
    `row_masked_count` every row has its own mean (0 if nothing passes), and there is no difference.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, logits: Float[Tensor, "B L V"], selected: Selected) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        right = (logits.detach().argmax(-1) == selected.tokens) & (selected.weight > 0)
        return entropy(logits, self.temperature), right.to(selected.weight.dtype)

    def known_weight(self, selected: Selected) -> Float[Tensor, "B L"]:
        return (selected.weight > 0).to(selected.weight.dtype)


def entropy(logits: Float[Tensor, "B L V"], temperature: float = 1.0) -> Float[Tensor, "B L"]:
    """Entropy in nats of softmax(logits / temperature), float32 or wider."""
    log_p = (wide(logits) / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def check_temperature(temperature: float) -> None:
    """Raises ObjectiveError unless it can divide logits."""
    if not temperature > 0:
        raise ObjectiveError(f"temperature must be above 0, got {temperature}. It divides the logits. Write temperature: 1.0.")


def check_blocks(block_length: int | Sequence[int], least: int = 1) -> None:
    """Raises ObjectiveError for lengths below `least`, and for a ladder without a step."""
    ladder = (block_length,) if isinstance(block_length, int) else tuple(block_length)
    if not ladder or min(ladder) < least:
        raise ObjectiveError(
            f"block_length must be at least {least}, got {block_length}. It counts tokens of a block, or those of each stage of the run. "
            "Write block_length: 16, or [4, 8, 16]."
        )


def teacher_gap(logits: Tensor, selected: Selected, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of every position without gradient, for people, and where the two agree on the best token."""
    assert selected.teacher is not None
    with torch.no_grad():
        floor = soft_cross_entropy(selected.teacher, selected.teacher, temperature)
        gap = soft_cross_entropy(logits, selected.teacher, temperature) - floor
        return gap, logits.argmax(-1) == selected.teacher.argmax(-1)
