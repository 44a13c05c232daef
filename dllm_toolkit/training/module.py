"""The Lightning module: optimiser, schedule, averaging, clipping, checkpoint state. No mathematics of its own.

`training_step` is `objective(model, batch, generator)`. All randomness of a step comes from (seed, batch number), so a run that was
killed and resumed repeats the losses it would have had. Several processes share each step (split.py), and a step may have several batches:
losses and gradients are those of one process with one whole batch. Under `strategy: fsdp` the weights, their averages and the optimiser's
state are sharded between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.training import shared
from dllm_toolkit.training.checkpoint import keep_what_is_trained
from dllm_toolkit.training.composed import Composed
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.data import fold
from dllm_toolkit.training.ema import Average, whole
from dllm_toolkit.training.losses import Loss
from dllm_toolkit.training.optim import LearningRate, OptimizerRecipe
from dllm_toolkit.training.split import Split

_NOISE, _VALIDATION = 1, 2


class DiffusionModule(pl.LightningModule):
    """Trains `model` on `objective`.

    Progress is the larger of step share and time share, so a time-limited run still anneals to the end. upcoming: the run's batch of a
    number, with the rows of all processes; asked only if a step has several batches. base: digest of the frozen weights, which checkpoints
    have instead of the weights (checkpoint.py).
    """

    def __init__(
        self,
        model: Transformer,
        objective: Composed,
        optimizer: OptimizerRecipe,
        schedule: LearningRate,
        *,
        ema: float | None = None,
        gradient_clip: float | None = 1.0,
        max_steps: int | None = None,
        max_minutes: float | None = None,
        compile: bool = False,
        seed: int = 0,
        teacher: Transformer | None = None,
        upcoming: Callable[[int], Batch] | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimizer_recipe, self.schedule = optimizer, schedule
        self.gradient_clip = gradient_clip
        self.max_steps, self.max_minutes, self.seed = max_steps, max_minutes, seed
        self.base = base
        if base is not None:
            keep_what_is_trained(self)
        self._teacher = (teacher,)  # in a tuple: no part of what is trained, counted and saved
        self.average = Average(model, ema) if ema is not None else None
        self.batches = 0  # micro-batches consumed, over all processes of the run
        self.elapsed = 0.0  # seconds of training before this process
        self.validation_loss: float | None = None
        self.last_loss: Tensor | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None
        self.skipped: Tensor | None = None  # see `skipped_steps`
        self._started: float | None = None
        self.upcoming = upcoming
        self._step: tuple[float, Tensor | None] | None = None  # progress and divisor of this optimiser step, if it has several batches
        self._told: float | None = None  # what process 0 said the time was, for the length of a step
        self._validation_losses: list[Tensor] = []
        # Eager for validation, whose no_grad and eval would be more graphs.
        self._train_objective = objective.compiled() if compile else objective

    # ---- time

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier processes of the run included."""
        if self._told is not None:
            return self._told
        return self.elapsed + (0.0 if self._started is None else time.monotonic() - self._started)

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return shared.progress(self.global_step, self.max_steps, self.seconds, self.max_minutes)

    @property
    def skipped_steps(self) -> int:
        """Optimiser steps of the run whose gradient was NaN or infinite. Waits for the device."""
        return 0 if self.skipped is None else int(self.skipped)

    # ---- one step

    def noise(self, *numbers: int) -> torch.Generator:
        """A generator on the model's device whose state depends on the run's seed and `numbers` only: the same in every process."""
        return torch.Generator(self.device).manual_seed(fold(self.seed, 0, *numbers))

    def on_fit_start(self) -> None:
        if self.average is not None:
            self.average.to(self.device)
        if self._teacher[0] is not None:
            self._teacher[0].to(self.device)

    def on_train_start(self) -> None:
        self._started = time.monotonic()
        if self.progress >= 1.0:  # a finished run that was started again
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout draws from the global generator; tie it to the batch too.
        torch.manual_seed(fold(self.seed, self.global_rank, self.batches))
        self._agree_on_time()
        factor = self.schedule.factor(self.global_step, self.progress)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = group["initial_lr"] * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise, (teacher,), count = self.noise(_NOISE, self.batches), self._teacher, self.trainer.accumulate_grad_batches
        progress, step = self._whole_step(count) if count > 1 else (self.progress, None)
        loss = self._train_objective(self.model, batch, noise, teacher=teacher, progress=progress, split=self._split, step=step)
        self.batches += 1
        self.last_loss, self.last_metrics = self._summed(loss)
        value = loss.value if loss.toward is None else loss.toward
        # Gradients are averaged over processes, and Lightning divides by the number of batches. They are to be added.
        times = count * (1 if self._split is None else self._split.world)
        return value if times == 1 else value * times

    def _whole_step(self, count: int) -> tuple[float, Tensor | None]:
        """Progress and divisor of the step that the present batch is one of `count` of, the same for all of them.

        The noise of all of them is drawn ahead for that, and once more when its batch comes: it depends on the batch's number alone.
        """
        if self._step is None:
            if self.upcoming is None:
                raise ToolkitError(
                    f"a step of several batches divides by what all of them hold, got accumulate_grad_batches={count} and no `upcoming`. "
                    "Pass DiffusionModule(upcoming=source.whole)."
                )
            progress, divisor = self.progress, None
            for number in range(self.batches, self.batches + count):
                noise = self.noise(_NOISE, number)
                one = self.objective.divisor(self.upcoming(number), self.model.spec, noise, progress)
                divisor = one if divisor is None else divisor + one
            self._step = progress, divisor
        return self._step

    def _summed(self, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the whole batch, the same in every process."""
        if not loss.part:
            return loss.value.detach(), loss.metrics
        # One small message a step, which no process waits for before it logs.
        parts = torch.stack([loss.value.detach(), *(value.to(loss.value.dtype) for value in loss.metrics.values())])
        torch.distributed.all_reduce(parts)
        return parts[0], dict(zip(loss.metrics, parts[1:], strict=True))

    @property
    def _split(self) -> Split | None:
        return Split(self.global_rank, self.trainer.world_size) if self.trainer.world_size > 1 else None

    def _agree_on_time(self) -> None:
        """A learning rate that follows the time must be the same everywhere: process 0 has the clock."""
        self._told = None
        if self.max_minutes is not None and self._split is not None:
            seconds = torch.tensor([self.seconds], dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(seconds, src=0)
            self._told = float(seconds)

    # ---- sharded weights

    def configure_model(self) -> None:
        if self._device_mesh is None or self.sharded:
            return
        # One group: whatever an objective does inside a step, it finds whole weights there.
        fully_shard(self, mesh=self._device_mesh["data_parallel"], reshard_after_forward=True)
        register_fsdp_forward_method(self, "training_step")
        if self.average is not None:
            self.average = Average(self.model, self.average.decay)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return isinstance(self, FSDPModule)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        self._step = None
        self.gradient_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
        # One NaN would stay in the weights for ever. Such a gradient counts as zero (and is counted), without waiting for the device.
        usable = self.gradient_norm.isfinite()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = torch.where(usable, parameter.grad, 0.0)
        self.skipped = (~usable).long() if self.skipped is None else self.skipped + (~usable).long()

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        if self.average is not None:
            self.average.update()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.max_minutes is not None:
            self._told = None
            over = self.seconds >= 60.0 * self.max_minutes
            if self.trainer.world_size > 1:
                over = self.trainer.strategy.reduce_boolean_decision(over, all=False)
            if over:
                self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer_recipe.build(self.model.named_parameters(), self.device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    # ---- validation, on the averaged weights, with the same noise every time

    @contextmanager
    def averaged(self) -> Iterator[Transformer]:
        """The model with its averaged weights (if it keeps an average), in evaluation mode, inside the block.

        Where weights are sharded they are whole inside the block, and all processes must enter it.
        """
        training = self.model.training
        self.model.eval()
        try:
            with nullcontext() if self.average is None else self.average.applied(), self._whole():
                yield self.model
        finally:
            self.model.train(training)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Sharded weights are whole inside the block."""
        if not isinstance(self, FSDPModule):
            yield
            return
        self.unshard()
        try:
            yield
        finally:
            self.reshard()

    def on_validation_epoch_start(self) -> None:
        self._validation_losses = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # Rows that do not go into equal parts are read by every process.
        split = None if self._split is None or batch.tokens.shape[0] % self._split.world else self._split
        with self.averaged() as model:
            # As at the end of the run, so that the numbers of one run can be compared.
            loss: Loss = self.objective(model, batch, self.noise(_VALIDATION, batch_idx), teacher=self._teacher[0], split=split)
        self._validation_losses.append(self._summed(loss)[0])

    def on_validation_epoch_end(self) -> None:
        self.validation_loss = float(torch.stack(self._validation_losses).mean())

    # ---- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dllm_toolkit"] = {
            "batches": self.batches,
            "elapsed": self.seconds,
            "last_loss": None if self.last_loss is None else float(self.last_loss),
            "validation_loss": self.validation_loss,
            "average": None if self.average is None else self.average.state_dict(),
            "base": self.base,
            "skipped": self.skipped_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["dllm_toolkit"]
        self.batches, self.elapsed, self.validation_loss = own["batches"], own["elapsed"], own["validation_loss"]
        self.last_loss = None if own["last_loss"] is None else torch.tensor(own["last_loss"])
        self.skipped = torch.tensor(own.get("skipped", 0))  # older checkpoints do not count them
        if self.average is not None:
            self.average.load_state_dict(own["average"])
