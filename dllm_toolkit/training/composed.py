"""Objectives made of parts: noise gives copies of the batch, a layout shows them to the model, terms are summed.

    copies  = noise(batch)                    what is hidden, what counts and how much; complementary masks make two copies
    seen    = layout(copies)                  lanes, attention, where each position is read        (training/layouts.py)
    logits  = student(seen)                   one forward for all copies, stacked along the rows
    loss    = sum of terms                    (training/terms.py)

A method is a subclass with `terms` and two methods, `noise` and `layout`: see training/methods and examples/my_objective.py. Levels, masks,
block lengths and shares may depend on the run's progress; whatever does is a tensor by the time the loss is computed, so the loss stays one
graph for torch.compile.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import Full, Layout, Seen, read_logits
from dllm_toolkit.training.objectives import Loss, Objective, ObjectiveError, full_allow, normalise
from dllm_toolkit.training.terms import ForwardKL, ReverseKL, Selected, Term, teacher_gap
from dllm_toolkit.types import Attention, ModelSpec


class Copy(NamedTuple):
    """One noisy version of the batch. hint: what the teacher sees instead of `tokens`. teacher_weight: its positions, None: `weight`."""

    tokens: Int[Tensor, "B L"]
    weight: Float[Tensor, "B L"]
    hint: Int[Tensor, "B L"] | None = None
    teacher_weight: Float[Tensor, "B L"] | None = None


class Shown(NamedTuple):
    """All C copies of a batch, stacked along the rows, and the shares of the terms at this point of the run."""

    tokens: Int[Tensor, "CB L"]
    weight: Float[Tensor, "CB L"]
    hint: Int[Tensor, "CB L"]
    teacher_weight: Float[Tensor, "CB L"]
    shares: Float[Tensor, "K"]
    seen: Seen
    teacher: Float[Tensor, "CB L V"] | None = None


class Composed(Objective):
    """An objective that is a sum of terms over noisy copies of the batch."""

    terms: tuple[Term, ...]
    copies: int = 1
    """Noisy copies of each row."""

    @abc.abstractmethod
    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        """The noisy copies of a batch when a share `progress` of the run is over."""

    def layout(self, progress: float) -> Layout:
        """How the student reads them."""
        return Full()

    @property
    def splits(self) -> bool:
        return False  # its copies stand one behind the other, and each term divides by its own sum

    @property
    def needs_teacher(self) -> bool:
        return any(isinstance(term, ForwardKL | ReverseKL) for term in self.terms)

    @property
    def takes_teacher(self) -> bool:
        return True

    def decodes(self) -> tuple[Attention, int | None]:
        return self.layout(1.0).decodes()

    def check(self, model: Transformer) -> None:
        spec = model.spec
        if spec.mask_id >= spec.vocab_size:
            raise ObjectiveError(
                f"{type(self).__name__} hides tokens behind a mask token, got a model without one. Nothing could be hidden. Write a model "
                "whose tokenizer has a mask token."
            )

    def check_rows(self, answer_lengths: Sequence[int]) -> None:
        sizes = {self.layout(step / 100).block_length() for step in range(101)}  # of all stages
        for length in answer_lengths:
            for block in sizes - {None}:
                assert block is not None
                if length % block:
                    raise ObjectiveError(
                        f"blocks of {block} tokens do not divide an answer of {length}. The last block would be cut short, and no decode "
                        f"ends there. Write an answer_length that is a multiple of {block}, or another block_length."
                    )

    def lanes(self, length: int, answer_length: int) -> tuple[int, int]:
        student = self.layout(1.0).lanes(length, answer_length)
        return self.copies * student, self.copies * length if self.needs_teacher else 0

    def show(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Shown:
        copies = self.noise(batch, spec, generator, progress)
        tokens, weight = torch.cat([copy.tokens for copy in copies]), torch.cat([copy.weight for copy in copies])
        seen = self.layout(progress)(repeated(batch, len(copies)), tokens, spec.shift, generator)
        return Shown(
            tokens,
            weight,
            torch.cat([copy.tokens if copy.hint is None else copy.hint for copy in copies]),
            torch.cat([copy.weight if copy.teacher_weight is None else copy.teacher_weight for copy in copies]),
            torch.tensor([term.share_at(progress) for term in self.terms], device=tokens.device),
            seen,
        )

    def corrupt(self, batch: Batch, mask_id: int, generator: torch.Generator) -> Shown:  # type: ignore[override]
        raise ObjectiveError("an objective made of terms is asked with `show`, got `corrupt`. Its noise may depend on the run's progress.")

    def teach(self, model: Transformer, batch: Batch, view: Shown) -> Shown:  # type: ignore[override]
        return view._replace(teacher=model.logits(view.hint, full_allow(repeated(batch, len(view.tokens) // len(batch.tokens)))))

    def loss(self, model: Transformer, batch: Batch, view: Shown) -> Loss:  # type: ignore[override]
        logits, rows, answer = read_logits(model, view.seen), len(batch.tokens), batch.answer
        total = logits.new_zeros((), dtype=torch.float32)
        supervised = view.weight > 0
        target = repeated(batch, len(view.tokens) // rows).tokens
        right = (logits.detach().argmax(-1) == target) & supervised
        metrics = {"masked_accuracy": right.sum() / supervised.sum().clamp(min=1)}
        for number, term in enumerate(self.terms):
            value = torch.zeros_like(total)
            for start in range(0, rows if term.first_only else len(view.tokens), rows):
                part = slice(start, start + rows)
                teacher = None if view.teacher is None else view.teacher[part]
                selected = Selected(batch.tokens, view.weight[part], teacher, view.teacher_weight[part])
                values, weight = term(logits[part], selected)
                value = value + normalise(values, weight, answer, term.normaliser)
            metrics[term.name] = value.detach()
            total = total + view.shares[number] * value
        if view.teacher is not None:
            gap, agree = teacher_gap(logits, Selected(target, view.weight, view.teacher), 1.0)
            counted = view.teacher_weight > 0
            metrics["kl"] = normalise(gap, view.teacher_weight, counted, "masked_count")
            metrics["teacher_agreement"] = (agree & counted).sum() / counted.sum().clamp(min=1)
        return Loss(total, metrics)


def repeated(batch: Batch, times: int) -> Batch:
    """The batch `times` times over, along the rows."""
    if times == 1:
        return batch
    return batch._replace(tokens=batch.tokens.repeat(times, 1), prompt_length=batch.prompt_length.repeat(times))


def hidden(batch: Batch, spec: ModelSpec, masked: Bool[Tensor, "B L"], weight: Float[Tensor, "B L"] | None = None) -> Copy:
    """The copy in which `masked` positions hold the mask token. weight: None counts each of them once."""
    return Copy(batch.tokens.masked_fill(masked, spec.mask_id), masked.float() if weight is None else weight)
