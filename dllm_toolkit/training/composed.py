"""Objectives made of parts: noise gives copies of the batch, a layout shows them to the model, terms are summed.

    copies  = noise(batch)                    what is hidden, what counts and how much; complementary masks make two copies
    seen    = layout(copies)                  lanes, attention, where each position is read        (training/layouts.py)
    hidden  = student(seen)                   one forward for all copies, stacked along the rows   (training/forward.py)
    logits  = head(hidden where it counts)    of positions with a weight, the teacher's too; a chunk of them at a time
    loss    = sum of terms                    (training/terms.py)

A method is a subclass with `terms` and two methods, `noise` and `layout`: see training/methods and examples/my_objective.py. Levels, masks,
block lengths and shares may depend on the run's progress; whatever does is a tensor by the time the loss is computed, so that the graphs of
torch.compile, one for the layers and one for the terms of a chunk, serve the whole run. `noise` may be a corruptor instead of a method, a
field of the recipe. A subclass with a `loss` of its own, whose sums nobody knows, is a mean over the rows, in one process.

Each term divides its sum over each copy by a number of its own. Of a batch that several processes share, noise is drawn for all rows, a
process lays out its rows of each copy, and its sums are divided by what all processes divide by (split.py). Of a step of several batches

    loss = sum over terms k, copies c, batches b of   share_k * (over_kcb / under_kcb) * (known_kcb / sum over b' of known_kcb')

where `known` is `under` as far as it is known before the forward; the noise of all batches is drawn ahead for the sum. Where they are the
same the step is that of one larger batch. They differ for a mean over what passes a gate: see `Certainty`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor, nn

from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.registry import declare
from dllm_toolkit.training.corruptors import Batch, Corruptor
from dllm_toolkit.training.forward import Forward
from dllm_toolkit.training.layouts import Full, Layout, Seen, full_blocks
from dllm_toolkit.training.losses import Loss, ObjectiveError, summed
from dllm_toolkit.training.split import Split, Sums, ratio
from dllm_toolkit.training.terms import ForwardKL, ReverseKL, Selected, Term, teacher_gap
from dllm_toolkit.types import Attention, ModelSpec


class Copy(NamedTuple):
    """One noisy version of the batch. hint: what the teacher sees instead of `tokens`. teacher_weight: its positions, None: `weight`."""

    tokens: Int[Tensor, "B L"]
    weight: Float[Tensor, "B L"]
    hint: Int[Tensor, "B L"] | None = None
    teacher_weight: Float[Tensor, "B L"] | None = None


class Shown(NamedTuple):
    """All C copies of a batch, stacked along the rows, and the shares of the terms at this point of the run.

    rows: flat positions (row * L + position) whose logits the terms ask for. teacher: its logits there, or what its LM head is asked
    where student and teacher have one.
    """

    tokens: Int[Tensor, "CB L"]
    weight: Float[Tensor, "CB L"]
    hint: Int[Tensor, "CB L"]
    teacher_weight: Float[Tensor, "CB L"]
    shares: Float[Tensor, "K"]
    seen: Seen
    rows: Int[Tensor, "N"] | None = None
    teacher: Float[Tensor, "N V"] | Float[Tensor, "N D"] | None = None


@dataclass(frozen=True)
class Composed(abc.ABC):
    """An objective that is a sum of terms over noisy copies of the batch.

    forward: how its passes are computed (training/forward.py); it does not change the loss.
    """

    forward: Forward = field(default_factory=Forward, kw_only=True)

    terms: ClassVar[tuple[Term, ...]]
    copies: ClassVar[int] = 1
    """Noisy copies of each row."""
    needs_steps: ClassVar[bool] = False
    """Whether the rows must say at which step of a decode each token was decided."""
    one_head: ClassVar[bool] = False
    """Whether teacher and student are computed under one LM head, so that the teacher is no model of its own."""
    accuracy: ClassVar[str] = "masked_accuracy"
    """What metrics call the share of the supervised tokens that are the most probable ones."""

    @abc.abstractmethod
    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        """The noisy copies of a batch when a share `progress` of the run is over."""

    def drawn(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Sequence[Copy]:
        """What `noise` says, be it a method or a corruptor."""
        noise: Any = self.noise
        if isinstance(noise, Corruptor):
            return [hidden(batch, spec, *noise(batch, generator))]
        return noise(batch, spec, generator, progress)

    def layout(self, progress: float) -> Layout:
        """How the student reads them."""
        return Full()

    def layout_of(self, spec: ModelSpec, progress: float) -> Layout:
        """The same, where it depends on the model."""
        return self.layout(progress)

    @property
    def splits(self) -> bool:
        """Whether parts of a batch add up to the whole, so that several processes can share one."""
        return type(self).loss is Composed.loss  # nobody knows the sums of another one

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen teacher is asked for each batch."""
        return any(isinstance(term, ForwardKL | ReverseKL) for term in self.terms)

    def decodes(self) -> tuple[Attention, int | None] | None:
        """The attention rule and block length that the trained model decodes with; None leaves the model's own."""
        return self.layout(1.0).decodes()

    def check(self, model: Transformer) -> None:
        """Raise ObjectiveError if `model` cannot be trained this way."""
        spec = model.spec
        if spec.mask_id >= spec.vocab_size:
            raise ObjectiveError(
                f"{type(self).__name__} hides tokens behind a mask token, got a model without one. Nothing could be hidden. Write a model "
                "whose tokenizer has a mask token."
            )

    def check_rows(self, answer_lengths: Sequence[int]) -> None:
        """Raise ObjectiveError if answers of these lengths, in tokens, cannot be trained on."""
        sizes = {self.layout(step / 100).block_length() for step in range(101)}  # of all stages
        for length in answer_lengths:
            for block in sizes:
                if block is not None and length % block:
                    raise ObjectiveError(
                        f"blocks of {block} tokens do not divide an answer of {length}. The last block would be cut short, and no decode "
                        f"ends there. Write an answer_length that is a multiple of {block}, or another block_length."
                    )

    def lanes(self, length: int, answer_length: int) -> tuple[int, int]:
        """Query tokens of student and teacher for one row of `length` tokens: what a step costs, whatever the machine."""
        student = self.layout(1.0).lanes(length, answer_length)
        return self.copies * student, self.copies * length if self.needs_teacher else 0

    def show(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Shown:
        """What the model sees and what counts when a share `progress` of the run is over."""
        return self.shown(batch, self.drawn(batch, spec, generator, progress), spec, generator, progress)

    def shown(self, batch: Batch, copies: Sequence[Copy], spec: ModelSpec, generator: torch.Generator, progress: float) -> Shown:
        """The copies of a batch, or of a part of it, laid out."""
        tokens, weight = torch.cat([copy.tokens for copy in copies]), torch.cat([copy.weight for copy in copies])
        seen = self.layout_of(spec, progress)(repeated(batch, len(copies)), tokens, spec.shift, generator)
        return Shown(
            tokens,
            weight,
            torch.cat([copy.tokens if copy.hint is None else copy.hint for copy in copies]),
            torch.cat([copy.weight if copy.teacher_weight is None else copy.teacher_weight for copy in copies]),
            torch.tensor([term.share_at(progress) for term in self.terms], device=tokens.device),
            seen,
        )

    def compiled(self) -> Composed:
        """The same, fast. One layer and the terms of a chunk are compiled: as few graphs for a large model as for a small one."""
        fast = replace(self, forward=replace(self.forward, compile=True))
        object.__setattr__(fast, "measure", torch.compile(fast.measure, dynamic=False))  # no field: this object's own
        return fast

    def teach(self, model: Transformer, batch: Batch, view: Shown) -> Shown:
        """`view` with what the frozen teacher says; called without gradient and with the adapter off."""
        rows = self._rows(model, view)
        hidden = self.forward.hidden(model, view.hint, full_blocks(repeated(batch, len(view.tokens) // len(batch.tokens))))
        asked = self.forward.at(model, hidden, rows)
        return view._replace(rows=rows, teacher=asked if self.one_head else model.lm_head(asked))

    def taught(self, model: Transformer, teacher: Transformer | None, batch: Batch, view: Shown) -> Shown:
        """`view` with what the teacher says, if there is one: `teacher`, or the model with its adapter off."""
        if not self.needs_teacher:
            return view
        from dllm_toolkit.training.lora import adapter_off

        with torch.no_grad(), adapter_off(model) if teacher is None else nullcontext():
            return self.teach(model if teacher is None else teacher, batch, view)

    def divisor(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Num[Tensor, "..."]:
        """What the loss of a whole batch divides by, with the noise that `__call__` would draw: batches of one step add up by it."""
        return self.known(batch, self.drawn(batch, spec, generator, progress))

    def known(self, batch: Batch, copies: Sequence[Copy]) -> Num[Tensor, "..."]:
        """What each term divides by on each copy, as far as it is known before the model is asked; 0 where that is nothing."""
        if not self.splits:
            return torch.ones_like(batch.prompt_length).sum()
        answer, under = batch.answer, []
        for term in self.terms:
            for copy in copies:
                weight = term.known_weight(Selected(batch.tokens, copy.weight, None, copy.teacher_weight))
                under.append(summed(weight, weight, answer, term.normaliser)[1])
        return torch.stack(under).view(len(self.terms), len(copies))

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
        copies = self.drawn(batch, model.spec, generator, progress)
        known = None if step is None else self.known(batch, copies)
        if split is not None:
            batch, copies = split.of(batch), [split.of(copy) for copy in copies]
        view = self.shown(batch, copies, model.spec, generator, progress)
        result = self.loss(model, batch, self.taught(model, teacher, batch, view))
        if split is not None:
            assert result.sums is not None
            result = self.divided(result.sums.of_all(split), view.shares)._replace(part=True)
        if step is None or known is None:
            return result._replace(toward=result.value)
        weight = torch.where(step > 0, ratio(known, step), 1.0)
        if result.sums is None:
            return result._replace(toward=result.value * weight)
        return result._replace(toward=(view.shares * (ratio(result.sums.over, result.sums.under) * weight).sum(1)).sum())

    def loss(self, model: Transformer, batch: Batch, view: Shown) -> Loss:
        """The loss of one view: deterministic."""
        rows, seen, count = self._rows(model, view), view.seen, len(batch.tokens)
        hidden = self.forward.hidden_of(model, Query(seen.tokens, seen.positions, None, seen.allow), seen.block)
        lane = rows // view.tokens.shape[1] * seen.tokens.shape[1] + seen.read.flatten()[rows]
        asked = model.norm(hidden.flatten(0, 1)[lane])
        target = repeated(batch, len(view.tokens) // count).tokens
        columns = (one.flatten()[rows] for one in (target, view.weight, view.teacher_weight))
        found = self.found(model, asked, *columns, view.teacher)

        def spread(values: Shaped[Tensor, "N"]) -> Shaped[Tensor, "CB L"]:
            """From the rows back to the grid: 0 where nothing was asked."""
            grid = torch.zeros(target.numel(), dtype=values.dtype, device=values.device)
            return grid.scatter(0, rows, values).view(target.shape)

        guess, *rest = (spread(values) for values in found)
        answer, supervised = batch.answer, view.weight > 0
        counts = {self.accuracy: (((guess == target) & supervised).sum(), supervised.sum()), **self.counted(batch, view)}
        over, under = [], []
        for number, term in enumerate(self.terms):
            values, weight = rest[2 * number : 2 * number + 2]
            for start in range(0, len(view.tokens), count):
                part = slice(start, start + count)
                kept = torch.zeros_like(weight[part]) if term.first_only and start else weight[part]
                value, mass = summed(values[part], kept, answer, term.normaliser)
                over.append(value)
                under.append(mass)
        if view.teacher is not None:
            gap, agree = rest[-2:]
            counted = view.teacher_weight > 0
            counts["kl"] = ((gap * view.teacher_weight).sum(), counted.sum())
            counts["teacher_agreement"] = ((agree & counted).sum(), counted.sum())
        shape = len(self.terms), len(view.tokens) // count
        return self.divided(Sums(torch.stack(over).view(shape), torch.stack(under).view(shape), counts), view.shares)

    def divided(self, sums: Sums, shares: Float[Tensor, "K"]) -> Loss:
        """The loss whose terms have these sums."""
        values = ratio(sums.over, sums.under).sum(1)  # [K]
        metrics = {name: ratio(*both) for name, both in sums.counts.items()}
        metrics |= {term.name: values[number].detach() for number, term in enumerate(self.terms)}
        return Loss((shares * values).sum(), metrics, sums=sums)

    def counted(self, batch: Batch, view: Shown) -> dict[str, tuple[Tensor, Tensor]]:
        """More shares for people to read: how many, of how many."""
        return {}

    def found(self, model: Transformer, *columns: Any) -> tuple[Tensor, ...]:
        """What `measure` says of rows."""
        return self.forward.by_chunk(model, partial(self.measure, model.lm_head), *columns)

    def measure(
        self,
        head: nn.Module,
        asked: Float[Tensor, "N D"],
        target: Int[Tensor, "N"],
        weight: Float[Tensor, "N"],
        teacher_weight: Float[Tensor, "N"],
        teacher: Float[Tensor, "N V"] | None,
    ) -> tuple[Shaped[Tensor, "N"], ...]:
        """Of some positions: the student's best token, values and weights of each term, and with a teacher `teacher_gap`."""
        logits, counts = head(asked).unsqueeze(0), (weight > 0) | (teacher_weight > 0)
        told = None if teacher is None else teacher.unsqueeze(0)
        selected = Selected(target.unsqueeze(0), weight.unsqueeze(0), told, teacher_weight.unsqueeze(0))
        found = [logits.detach().argmax(-1)]
        for term in self.terms:
            values, weights = term(logits, selected)
            found += [values, weights * counts]  # positions that only fill up a chunk count for no term
        if told is not None:
            found += teacher_gap(logits, selected, 1.0)
        return tuple(one.squeeze(0) for one in found)

    def _rows(self, model: Transformer, view: Shown) -> Int[Tensor, "N"]:
        return self.forward.rows(model, (view.weight > 0) | (view.teacher_weight > 0), parts=4) if view.rows is None else view.rows


declare("objective", Composed)


def repeated(batch: Batch, times: int) -> Batch:
    """The batch `times` times over, along the rows."""
    if times == 1:
        return batch
    return batch._replace(tokens=batch.tokens.repeat(times, 1), prompt_length=batch.prompt_length.repeat(times))


def hidden(batch: Batch, spec: ModelSpec, masked: Bool[Tensor, "B L"], weight: Float[Tensor, "B L"] | None = None) -> Copy:
    """The copy in which `masked` positions hold the mask token. weight: None counts each of them once."""
    return Copy(batch.tokens.masked_fill(masked, spec.mask_id), masked.float() if weight is None else weight)
