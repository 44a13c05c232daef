"""What losses are: divergences of logits in float32 or wider, what a weighted sum of them is divided by, and what comes out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.training.split import Sums, ratio

Normaliser = Literal["answer_length", "batch_length", "masked_count", "row_masked_count", "sum_of_weights", "none"]


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


def wide(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """At least float32: bf16 log-softmax loses the tail that a distillation loss is about."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Float[Tensor, "B L V"], target: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """-log p(target) of every position, float32 or wider."""
    return F.cross_entropy(wide(logits).flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def soft_cross_entropy(student: Float[Tensor, "B L V"], teacher: Float[Tensor, "B L V"], temperature: float = 1.0) -> Float[Tensor, "B L"]:
    """-sum p_teacher log p_student: the forward KL(teacher || student) plus the teacher's entropy, which has no gradient."""
    target = (wide(teacher) / temperature).softmax(-1).detach()
    return -(target * (wide(student) / temperature).log_softmax(-1)).sum(-1)


def reverse_kl(student: Float[Tensor, "B L V"], teacher: Float[Tensor, "B L V"], temperature: float = 1.0) -> Float[Tensor, "B L"]:
    """KL(student || teacher) = sum p_student (log p_student - log p_teacher): D2F's Eq. 3 as printed."""
    log_student = (wide(student) / temperature).log_softmax(-1)
    log_teacher = (wide(teacher) / temperature).log_softmax(-1).detach()
    return (log_student.exp() * (log_student - log_teacher)).sum(-1)


def normalise(
    values: Float[Tensor, "B L"],
    weight: Float[Tensor, "B L"],
    answer: Bool[Tensor, "B L"],
    how: Normaliser,
) -> Float[Tensor, ""]:
    """Weighted sum of per-position values, divided as named. The choice changes the objective, not only its scale.

    answer_length     each row by its answer length (EOS padding included), mean of the rows: LLaDA's fine-tuning, the bound per token
    batch_length      everything by the number of answer positions in the batch (equal to the former when all answers are equally long)
    masked_count      everything by the number of supervised positions in the batch: D2F's code
    row_masked_count  each row by its supervised positions, mean of the rows; with weight 1/t about ln L times the bound
    sum_of_weights    everything by the sum of the weights
    none              the plain sum
    An empty selection gives 0 with its gradient graph intact.
    """
    return ratio(*summed(values, weight, answer, how))


def summed(
    values: Float[Tensor, "B L"], weight: Float[Tensor, "B L"], answer: Bool[Tensor, "B L"], how: Normaliser
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The weighted sum that `normalise` divides, and what by; 0 is by nothing. Both add up over parts of a batch."""
    total, counted = values * weight, weight > 0 if how in ("masked_count", "row_masked_count") else answer
    if how in ("answer_length", "row_masked_count"):
        return (total.sum(1) / counted.sum(1).clamp(min=1)).sum(), torch.ones_like(weight[:, 0]).sum()
    under = torch.zeros_like(weight) if how == "none" else weight if how == "sum_of_weights" else counted
    return total.sum(), under.sum(1).sum().to(weight.dtype)
