"""Training objectives: functions from a batch and random numbers to a loss. Long: the contract, and the three that are no sums of terms.

An objective is two steps. `corrupt` is random and cheap (a `View`: what the model sees, which positions count and how much);
`loss` is deterministic and expensive, one graph for torch.compile. Everything is weights on a dense [B, L] grid, never boolean
indexing, so no step waits for the device; D2F and sums of terms wait once, for the number of rows whose logits they need (forward.py).

    MaskedDiffusion   CE at masked positions under full attention          LLaDA, arXiv 2502.09992
    Autoregressive    CE of every answer token given the ones before
    D2FDistillation   frozen teacher (adapter off, full attention) -> student (LoRA, block-causal)   D2F, arXiv 2508.09192
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops.masks import answer_blocks, block_causal
from dllm_toolkit.registry import declare, register
from dllm_toolkit.training.corruptors import Batch, Corruptor, ExactCount, Mixture, Monotone
from dllm_toolkit.training.forward import Forward
from dllm_toolkit.training.split import Split, Sums, ratio
from dllm_toolkit.types import Attention, ModelSpec

Normaliser = Literal["answer_length", "batch_length", "masked_count", "row_masked_count", "sum_of_weights", "none"]


Drawn = TypeVar("Drawn", bound=tuple)  # a View, or what an objective has instead of one


class ObjectiveError(ToolkitError):
    """An objective that the model or the recipe cannot serve."""


class View(NamedTuple):
    """What the model is shown and what counts. For distillation: `rows`, flat positions that the loss asks for (row * L + position), and
    `teacher`, what the frozen teacher's LM head is asked there."""

    tokens: Int[Tensor, "B L"]
    masked: Bool[Tensor, "B L"]
    weight: Float[Tensor, "B L"]
    rows: Int[Tensor, "N"] | None = None
    teacher: Float[Tensor, "N D"] | None = None


class Loss(NamedTuple):
    """The scalar to minimise, and detached scalars for people to read.

    share: of a part of a batch, its share of the whole batch's loss. toward: what it adds to the loss of a step, which may have several
    parts and several batches; this is what is minimised. sums: of a loss made of terms, what it is before it is divided.
    """

    value: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    share: Float[Tensor, ""] | None = None
    toward: Float[Tensor, ""] | None = None
    sums: Sums | None = None


class Objective(abc.ABC):
    """What a model is trained to do."""

    @property
    def splits(self) -> bool:
        """Whether parts of a batch add up to the whole (`mass`), so that several processes can share one."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """Whether `teach` must be called for each batch."""
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

    def show(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> View:
        """Draw what the model sees when a share `progress` of the run is over. Objectives without a schedule define `corrupt` alone."""
        return self.corrupt(batch, spec.mask_id, generator)

    @abc.abstractmethod
    def corrupt(self, batch: Batch, mask_id: int, generator: torch.Generator) -> View:
        """Draw what the model sees."""

    def teach(self, model: Transformer, batch: Batch, view: View) -> View:
        """`view` with what the frozen teacher says; called without gradient and with the adapter off, only if `needs_teacher`."""
        raise ObjectiveError("this objective has no teacher. Nothing was distilled. Ask only where `needs_teacher` is true.")

    def mass(self, spec: ModelSpec, batch: Batch, view: View) -> Num[Tensor, "B"] | None:
        """Each row's part of what the loss divides its sum by, so that parts of a batch add up; None if it divides by nothing.

        The default is that of a loss that is the mean of the rows.
        """
        return torch.ones_like(batch.prompt_length)

    def divisor(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> Num[Tensor, "..."] | None:
        """What the loss of a whole batch divides by, with the noise that `__call__` would draw: batches of one step add up by it."""
        mass = self.mass(spec, batch, self.show(batch, spec, generator, progress))
        return None if mass is None else mass.sum()

    @abc.abstractmethod
    def loss(self, model: Transformer, batch: Batch, view: View) -> Loss:
        """The loss of one view: deterministic, compilable as one graph."""

    def compiled(self) -> Callable[..., Loss]:
        """What is called instead of this objective where it is to be fast: the same, compiled. The whole loss is one static graph."""
        return partial(self.__call__, loss=torch.compile(self.loss, dynamic=False))

    def __call__(
        self,
        model: Transformer,
        batch: Batch,
        generator: torch.Generator,
        *,
        loss: Callable[[Transformer, Batch, View], Loss] | None = None,
        teacher: Transformer | None = None,
        progress: float = 1.0,
        split: Split | None = None,
        step: Num[Tensor, "..."] | None = None,
    ) -> Loss:
        """Corrupt, ask the teacher if there is one, and return the loss.

        loss: the compiled form of the method. teacher: a model of its own; None is `model` with its adapter off. progress: the share of
        the run that is over, for schedules. split: after the corruption of the whole batch the rest is done for this part of it.
        step: if the batch is one of several of a step, the sum of their `divisor`s (None, too, where that is None).
        """
        view = self.show(batch, model.spec, generator, progress)
        share = mass = None
        if split is not None or step is not None:
            mass = self.mass(model.spec, batch, view)
            mass = None if mass is None else mass.to(view.weight.dtype)
        if split is not None:
            share = view.weight.new_ones(()) if mass is None else split.share(mass)
            batch, view = split.of(batch), split.of(view)
        result = (loss or self.loss)(model, batch, self.taught(model, teacher, batch, view))
        toward = result.value if share is None else result.value * share
        if step is not None and mass is not None:
            toward = toward * ratio(mass.sum(), step)
        return result._replace(share=share, toward=toward)

    def taught(self, model: Transformer, teacher: Transformer | None, batch: Batch, view: Drawn) -> Drawn:
        """`view` with what the teacher says, if there is one: `teacher`, or the model with its adapter off."""
        if not self.needs_teacher:
            return view
        from dllm_toolkit.training.lora import adapter_off

        with torch.no_grad(), adapter_off(model) if teacher is None else nullcontext():
            return self.teach(model if teacher is None else teacher, batch, view)  # type: ignore[arg-type,return-value]


declare("objective", Objective)


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
) -> tuple[Float[Tensor, ""], Num[Tensor, ""]]:
    """The weighted sum that `normalise` divides, and what by; 0 is by nothing. Both add up over parts of a batch."""
    total, mass = values * weight, mass_of(weight, answer, how)
    if how in ("answer_length", "row_masked_count"):
        counted = answer if how == "answer_length" else weight > 0
        total = total.sum(1) / counted.sum(1).clamp(min=1)
    return total.sum(), weight.new_zeros(()) if mass is None else mass.sum()


def mass_of(weight: Float[Tensor, "B L"], answer: Bool[Tensor, "B L"], how: Normaliser) -> Num[Tensor, "B"] | None:
    """Each row's part of what `normalise` divides by; None where it divides by nothing."""
    if how == "none":
        return None
    if how == "sum_of_weights":
        return weight.sum(1)
    if how in ("answer_length", "row_masked_count"):
        return torch.ones_like(weight[:, 0])
    return (answer if how == "batch_length" else weight > 0).sum(1)


def _accuracy(logits: Float[Tensor, "B L V"], tokens: Int[Tensor, "B L"], selected: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    right = (logits.detach().argmax(-1) == tokens) & selected
    return right.sum() / selected.sum().clamp(min=1)


@register("objective", "masked_diffusion")
@dataclass(frozen=True)
class MaskedDiffusion(Objective):
    """Predict the hidden tokens of the answer: sum over masked i of w_i CE_i, with the corruptor's weights.

    With `exact_count` (or `uniform`) noise and normaliser answer_length this is the negative log-likelihood bound per token. The prompt
    is never masked; EOS padding is masked, predicted and counted, which is how the model learns to stop.
    """

    noise: Corruptor = ExactCount()
    normaliser: Normaliser = "answer_length"

    def check(self, model: Transformer) -> None:
        if model.spec.attention == "causal":
            raise ObjectiveError(
                "masked diffusion needs a model that sees both sides of a mask, got attention 'causal'. "
                "A causal model cannot fill gaps. Write attention: full, or objective: autoregressive."
            )

    def corrupt(self, batch: Batch, mask_id: int, generator: torch.Generator) -> View:
        masked, weight = self.noise(batch, generator)
        return View(batch.tokens.masked_fill(masked, mask_id), masked, weight)

    def mass(self, spec: ModelSpec, batch: Batch, view: View) -> Num[Tensor, "B"] | None:
        return mass_of(view.weight, batch.answer, self.normaliser)

    def loss(self, model: Transformer, batch: Batch, view: View) -> Loss:
        if model.spec.attention == "block_causal":
            allow = block_causal_allow(batch, model.spec.block_size or batch.answer_length)
        else:
            allow = full_allow(batch)
        logits = model.logits(view.tokens, allow)
        answer = batch.answer
        value = normalise(cross_entropy(logits, batch.tokens), view.weight, answer, self.normaliser)
        metrics = {
            "masked_accuracy": _accuracy(logits, batch.tokens, view.weight > 0),
            "masked_share": view.masked.sum() / answer.sum(),
        }
        return Loss(value, metrics)


@register("objective", "autoregressive")
@dataclass(frozen=True)
class Autoregressive(Objective):
    """Predict every answer token from the ones before it, the first EOS included. `padding`: also the EOS fill behind it."""

    padding: bool = False

    def check(self, model: Transformer) -> None:
        if model.spec.attention != "causal" or model.spec.shift != 1:
            raise ObjectiveError(
                f"autoregressive training needs attention 'causal' and shift 1, got {model.spec.attention!r} and "
                f"shift {model.spec.shift}. Otherwise a position sees the token it predicts. Write attention: causal, shift: 1."
            )

    def corrupt(self, batch: Batch, mask_id: int, generator: torch.Generator) -> View:
        return View(batch.tokens, torch.zeros_like(batch.answer), batch.answer.float())

    def loss(self, model: Transformer, batch: Batch, view: View) -> Loss:
        logits = model.logits(view.tokens)
        weight = self._weight(model.spec, batch, view)
        value = normalise(cross_entropy(logits, batch.tokens), weight, batch.answer, "sum_of_weights")
        return Loss(value, {"token_accuracy": _accuracy(logits, batch.tokens, weight > 0)})

    def mass(self, spec: ModelSpec, batch: Batch, view: View) -> Num[Tensor, "B"] | None:
        return mass_of(self._weight(spec, batch, view), batch.answer, "sum_of_weights")

    def _weight(self, spec: ModelSpec, batch: Batch, view: View) -> Float[Tensor, "B L"]:
        """1 at the positions that count."""
        return view.weight if self.padding else view.weight * batch.text(spec.eos_ids)


@register("objective", "d2f")
@dataclass(frozen=True)
class D2FDistillation(Objective):
    """A block-causal student learns the full-attention teacher's distribution at masked positions. Both read the same noised row.

        loss = sum over masked i of w_i D(teacher_i, student_i) / number of masked positions,   w_i = 1 / t_block(i)

    The defaults are the official code (D2F-train/utils/loss.py at 771f745): forward KL, 1/t weights, mean over masked tokens, EOS padding
    kept. The paper's Eq. 3 is `divergence: reverse_kl`, `weighted: false`. `self_align: false` replaces the teacher by the true tokens.
    `forward`: how both passes are computed (training/forward.py); it does not change the loss.
    """

    block_length: int = 16
    noise: Corruptor | None = None
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    weighted: bool = True
    self_align: bool = True
    temperature: float = 1.0
    normaliser: Normaliser = "masked_count"
    forward: Forward = field(default_factory=Forward)

    def __post_init__(self) -> None:
        if self.noise is None:
            object.__setattr__(self, "noise", Monotone(block_length=self.block_length))
        if self.temperature <= 0:
            raise ObjectiveError(f"temperature must be above 0, got {self.temperature}. It divides the logits. Write temperature: 1.0.")
        for part in self.noise.parts if isinstance(self.noise, Mixture) else (self.noise,):
            length = getattr(part, "block_length", self.block_length)
            if length != self.block_length:
                raise ObjectiveError(
                    f"the noise has blocks of {length} tokens and the attention has blocks of {self.block_length}. "
                    f"They are one grid in D2F. Write block_length: {self.block_length} in the noise too."
                )

    @property
    def needs_teacher(self) -> bool:
        return self.self_align

    def decodes(self) -> tuple[Attention, int | None]:
        return "block_causal", self.block_length

    def check(self, model: Transformer) -> None:
        if model.spec.attention == "causal":
            raise ObjectiveError(
                "D2F distils from a bidirectional teacher, got a model with attention 'causal'. "
                "A causal model cannot fill masks. Write a model trained with objective: masked_diffusion."
            )

    def corrupt(self, batch: Batch, mask_id: int, generator: torch.Generator) -> View:
        assert self.noise is not None
        masked, weight = self.noise(batch, generator)
        if not self.weighted:
            weight = (weight > 0).to(weight.dtype)
        return View(batch.tokens.masked_fill(masked, mask_id), masked, weight)

    def mass(self, spec: ModelSpec, batch: Batch, view: View) -> Num[Tensor, "B"] | None:
        return mass_of(view.weight, batch.answer, self.normaliser)

    def compiled(self) -> D2FDistillation:
        """One layer and one chunk of the loss are compiled: the same graphs serve every layer, teacher, and number of masks."""
        return replace(self, forward=replace(self.forward, compile=True))

    def teach(self, model: Transformer, batch: Batch, view: View) -> View:
        rows = self._rows(model, view)
        hidden = self.forward.hidden(model, view.tokens, full_blocks(batch))
        return view._replace(rows=rows, teacher=self.forward.at(model, hidden, rows))

    def loss(self, model: Transformer, batch: Batch, view: View) -> Loss:
        rows = self._rows(model, view)
        hidden = self.forward.hidden(model, view.tokens, student_blocks(batch, self.block_length))
        asked = self.forward.at(model, hidden, rows)
        if self.self_align:
            assert view.teacher is not None, "teach was not called"
            found = self.forward.divergence(model, asked, view.teacher, self.divergence, self.temperature)
        else:
            found = self.forward.cross_entropy(model, asked, batch.tokens.flatten()[rows])

        def spread(values: Shaped[Tensor, "N"]) -> Shaped[Tensor, "B L"]:
            """From the rows back to the grid: 0 where nothing was asked."""
            grid = torch.zeros(batch.tokens.numel(), dtype=values.dtype, device=values.device)
            return grid.scatter(0, rows, values).view(batch.tokens.shape)

        supervised = view.weight > 0
        share = supervised.sum().clamp(min=1)
        metrics = {"masked_accuracy": ((spread(found.guess) == batch.tokens) & supervised).sum() / share}
        if self.self_align:
            assert found.teacher_guess is not None and found.entropy is not None
            if self.divergence == "forward_kl":
                # The loss contains the teacher's entropy, which nothing can remove; people want to see what is left.
                left = spread(found.value.detach() - found.entropy)
                metrics["kl"] = normalise(left, view.weight, batch.answer, self.normaliser)
            metrics["teacher_agreement"] = (spread(found.guess == found.teacher_guess) & supervised).sum() / share
        return Loss(normalise(spread(found.value), view.weight, batch.answer, self.normaliser), metrics)

    def _rows(self, model: Transformer, view: View) -> Int[Tensor, "N"]:
        return self.forward.rows(model, view.weight > 0) if view.rows is None else view.rows


def full_blocks(batch: Batch) -> Int[Tensor, "B L"]:
    """Everybody sees prompt and answer (block 0); the padding behind the answer is block 1, which only itself sees."""
    return (~batch.inside).long()


def student_blocks(batch: Batch, block_length: int) -> Int[Tensor, "B L"]:
    """D2F's student: prompt 0, answer 1, 2, ... for each `block_length` positions, and the padding as a last block."""
    length = batch.tokens.shape[1]
    return answer_blocks(batch.prompt_length, length, block_length).masked_fill(~batch.inside, length + 1)


def full_allow(batch: Batch) -> Bool[Tensor, "B L L"]:
    """Everybody sees prompt and answer; nobody sees the padding behind the answer."""
    rows, length = batch.tokens.shape
    return batch.inside.unsqueeze(1).expand(rows, length, length)


def block_causal_allow(batch: Batch, block_length: int) -> Bool[Tensor, "B L L"]:
    """D2F's student mask. The padding is a last block of its own: it sees the row and only itself sees it.

    k:  p p | 1 1 | 2 2 | .
    p   x x   . .   . .   .      the prompt never sees the answer
    1   x x   x x   . .   .
    2   x x   x x   x x   .
    .   x x   x x   x x   x      padding: no row of the softmax is empty
    """
    return block_causal(student_blocks(batch, block_length))
