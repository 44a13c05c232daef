"""`dllm-toolkit train recipe.yaml`: build, resume, fit, export, card. Everything that can be refused is refused before any work."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.processes import ALONE, announced
from dllm_toolkit.models.base import Model
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.recipe import Lazy, Recipe
from dllm_toolkit.training import shared
from dllm_toolkit.training.callbacks import DecodeWhileTraining, Throughput
from dllm_toolkit.training.checkpoint import digest, frozen, resumed
from dllm_toolkit.training.composed import Composed
from dllm_toolkit.training.data import Data, Fixed, Rotation, Source, Stream
from dllm_toolkit.training.ema import whole
from dllm_toolkit.training.export import export, write_training_card
from dllm_toolkit.training.lora import Lora
from dllm_toolkit.training.module import DiffusionModule
from dllm_toolkit.training.optim import AdamW, Cosine, LearningRate, OptimizerRecipe
from dllm_toolkit.training.shared import TrainError, placed, say
from dllm_toolkit.training.split import Split

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")


@dataclass(frozen=True)
class TrainerSettings:
    """How long, where and how precisely to train. The run ends at max_steps or max_minutes, whichever comes first.

    max_minutes: wall minutes of training, compilation and validation included, over all processes of a resumed run; the learning rate
    anneals by the larger of step share and time share. accumulate: batches for each optimiser step, which add up to one larger batch.
    validate_every, checkpoint_every and log_every count optimiser steps; validate_every 0 validates only at the end. devices: of this
    machine; under torchrun there is one for each process that it started, on all machines. strategy: auto (ddp for several devices), ddp,
    ddp_find_unused_parameters_true, or fsdp (weights and the optimiser's state are sharded). A batch of the data is one device's: n
    devices take steps of n batches.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    strategy: str = "auto"
    gradient_clip: float | None = 1.0
    accumulate: int = 1
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_every: int = 1000
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise TrainError("the run has no end, got neither max_steps nor max_minutes. Write trainer: {max_steps: 10000}.")
        shared.check_counts(self, "devices", "accumulate", "log_every", "checkpoint_every", "max_steps")
        if self.strategy not in STRATEGIES:
            raise TrainError(f"strategy has no such name, got {self.strategy!r}. Write one of {', '.join(STRATEGIES)}.")
        if self.strategy == "fsdp" and self.precision == "64-true":
            raise TrainError("precision 64-true is not there with strategy fsdp. Write precision: 32-true, or strategy: ddp.")
        if self.validate_every < 0:
            raise TrainError(f"validate_every must be 0 or more, got {self.validate_every}. 0: at the end. Write validate_every: 0.")
        shared.check_amounts(self, "max_minutes", "gradient_clip")


@dataclass(frozen=True)
class TrainRecipe:
    """The root of a training recipe.

    output: checkpoint, metrics.jsonl and TensorBoard files. export: where the final weights and their card go (omit to keep only the
    checkpoint). ema: decay of the average of the weights that is validated, decoded with and exported. lora: train an adapter instead
    of the model.
    """

    model: Lazy[Model]
    data: Data
    objective: Composed
    output: Path
    optimizer: OptimizerRecipe = AdamW()
    schedule: LearningRate = Cosine()
    trainer: TrainerSettings = field(default_factory=lambda: TrainerSettings(max_steps=1000))
    ema: float | None = None
    lora: Lora | None = None
    teacher: Lazy[Model] | None = None
    callbacks: tuple[pl.Callback, ...] = ()
    export: Path | None = None
    summary: str = "A model trained with dllm_toolkit."
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective.needs_teacher and self.lora is None and self.teacher is None:
            raise TrainError(
                "this objective needs a frozen teacher, got no lora. The teacher is the model with its adapter off. "
                "Write lora: {rank: 32, alpha: 32}, or teacher: with a model of its own."
            )
        if self.teacher is not None and not self.objective.needs_teacher:
            raise TrainError(
                f"objective {type(self.objective).__name__} learns from no teacher, got one. It would be loaded and never asked. "
                "Leave teacher: out, or write another objective, such as dscd."
            )
        if self.teacher is not None and self.objective.one_head:
            raise TrainError(
                f"objective {type(self.objective).__name__} computes teacher and student under one LM head, got a teacher of its own. "
                "Write lora: instead; the teacher is then the model with its adapter off."
            )
        if self.objective.needs_steps and not self.data.step_maps:
            raise TrainError(
                f"objective {type(self.objective).__name__} follows recorded decodes, got {type(self.data).__name__}, which has none. "
                "Write data: {_component_: recorded, prompts: ..., model: ..., decoder: ..., store: ...}."
            )
        if self.objective.one_head and self.lora is not None and "lm_head" in self.lora.targets:
            raise TrainError(
                f"the LM head must be the same for teacher and student, got lora.targets {list(self.lora.targets)}. The loss compares "
                "hidden states under one head. Write lora.targets without lm_head."
            )
        if self.lora is not None and self.lora.frozen != "float32" and self.trainer.precision == "64-true":
            raise TrainError(
                f"precision 64-true widens all weights, got lora.frozen {self.lora.frozen!r}. They would not stay so. "
                "Write precision: bf16-mixed, or frozen: float32."
            )
        self.objective.check_rows(self.data.answer_lengths)
        if self.ema is not None and not 0.0 <= self.ema < 1.0:
            raise TrainError(f"ema must lie in [0, 1), got {self.ema}. It is the share of the old average. Write ema: 0.999.")
        shared.check_seed(self.seed)


def run_training(recipe: Recipe, built: TrainRecipe) -> DiffusionModule:
    """Train as `built` says, resuming from `output/last.ckpt` of the same recipe if there is one; export at the end.

    Raises TrainError if `output` belongs to another recipe (nothing is overwritten).
    """
    settings = built.trainer
    checkpoint = shared.owned(built.output, recipe)
    shared.check_export(recipe, built.export)
    model = _prepare(recipe, built)
    teacher = _teacher(recipe, built, model)
    base = digest(frozen(model))
    trainer = _trainer(recipe, built, resumed(checkpoint, model, base))
    if trainer.world_size > 1 and not built.objective.splits:
        raise ToolkitError(
            f"this objective is trained by one process, got {type(built.objective).__name__} with {trainer.world_size} devices. It has "
            "a loss of its own, and nothing says how losses of parts of a batch add up (`Composed.splits`). Write devices: 1 under "
            "trainer, or give its terms instead."
        )
    pl.seed_everything(built.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    compile = on_gpu if settings.compile == "auto" else settings.compile
    if compile and trainer.world_size > 1:
        # Compiled are pieces of a step; cut up at the buckets of DDP they would only be more graphs, and some operators cannot be cut.
        torch._dynamo.config.optimize_ddp = False
    module = DiffusionModule(
        model,
        built.objective,
        built.optimizer,
        built.schedule,
        ema=built.ema,
        gradient_clip=settings.gradient_clip,
        max_steps=settings.max_steps,
        max_minutes=settings.max_minutes,
        compile=compile,
        seed=built.seed,
        teacher=teacher,
        base=base,
    )
    device = trainer.strategy.root_device
    say(f"making {type(built.data).__name__} on {device}", trainer)
    train, heldout = built.data.sources(device, built.seed, trainer.global_rank, trainer.world_size)
    say(f"{train.size}, {train.batches_per_epoch} batches an epoch", trainer)
    if trainer.is_global_zero:  # data may be refused too: a store of other answers, a file without rows
        shared.claim(built.output, recipe)
    module.upcoming = train.whole
    for callback in built.callbacks:
        if isinstance(callback, DecodeWhileTraining):
            callback.examples = built.data.examples(callback.problems)
    validation = heldout.all_batches()
    shared.fit(trainer, module, Stream(train, lambda: module.batches), checkpoint, Fixed(validation))
    _finish(recipe, built, trainer, module, train, validation)
    return module


def _prepare(recipe: Recipe, built: TrainRecipe) -> Transformer:
    """The model as it is trained: checked against objective and data, with its adapter and the student's attention rule."""
    model = shared.trainable(recipe, built.model)
    with placed(recipe, "objective"):
        built.objective.check(model)
    with placed(recipe, "data"):
        built.data.check(model.spec.max_positions)
        shared.check_words(model, built.data.tokenizer())
    if model.tokenizer is None:
        model.tokenizer = built.data.tokenizer()
    if len(built.data.tokenizer()) > model.spec.vocab_size:
        raise TrainError(
            f"the data has {len(built.data.tokenizer())} token ids, got a model with {model.spec.vocab_size}. "
            "Every id needs a row of the embedding. Use a model made for this tokenizer."
        )
    frozen = torch.float32 if built.lora is None else getattr(torch, built.lora.frozen)
    model.to(frozen).train().requires_grad_(True)  # loaded models come frozen, for decoding
    rule = built.objective.decodes()
    if rule is not None:  # matters for decoding only: every pass of the loss is given its mask
        model.with_attention(*rule)
    if built.lora is not None:
        shared.adapt(recipe, model, built.lora, built.model, built.seed)
    for number, callback in enumerate(built.callbacks):
        if isinstance(callback, DecodeWhileTraining):
            with placed(recipe, "callbacks", str(number)):
                callback.check(model.spec)
    return model


def _teacher(recipe: Recipe, built: TrainRecipe, student: Transformer) -> Transformer | None:
    """The frozen teacher, if it is a model of its own and the objective asks one."""
    if built.teacher is None or not built.objective.needs_teacher:
        return None
    teacher = built.teacher.build()
    with placed(recipe, "teacher"):
        if not isinstance(teacher, Transformer):
            raise TrainError(f"a teacher is a native Transformer, got {type(teacher).__name__}. Write teacher: {{_component_: load, ...}}.")
        words = [None if one.tokenizer is None else one.tokenizer.get_vocab() for one in (teacher, student)]
        if teacher.spec.vocab_size != student.spec.vocab_size or (None not in words and words[0] != words[1]):
            raise TrainError(
                f"teacher and student have different tokenizers, got {teacher.spec.vocab_size} and {student.spec.vocab_size} rows of the "
                "vocabulary. Their distributions are over the same words or cannot be compared. Use a teacher with the student's tokenizer."
            )
        if teacher.spec.mask_id != student.spec.mask_id or teacher.spec.attention == "causal":
            raise TrainError(
                f"the teacher must fill the student's masks, got mask ids {teacher.spec.mask_id} and {student.spec.mask_id}, attention "
                f"{teacher.spec.attention!r}. Write a teacher trained with objective: masked_diffusion."
            )
    return teacher.float().eval().requires_grad_(False)


def _trainer(recipe: Recipe, built: TrainRecipe, resumed: int | None) -> pl.Trainer:
    settings = built.trainer
    # Lightning's own lines (devices found, tips) say nothing about the run.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with placed(recipe, "trainer", "accelerator"):
        shared.check_device(settings.accelerator)
    saver = ModelCheckpoint(
        dirpath=built.output,
        save_last=True,
        save_top_k=0,
        every_n_train_steps=settings.checkpoint_every,
        enable_version_counter=False,
    )
    with placed(recipe, "trainer"):
        devices, nodes = _places(settings)
        return pl.Trainer(
            max_steps=-1 if settings.max_steps is None else settings.max_steps,
            max_epochs=-1,
            precision=settings.precision,
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(settings, devices * nodes),
            accumulate_grad_batches=settings.accumulate,
            val_check_interval=settings.validate_every * settings.accumulate or None,
            check_val_every_n_epoch=None,
            limit_val_batches=None if settings.validate_every else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=settings.log_every,
            # What a killed process logged beyond its last checkpoint is trained and logged again.
            logger=TensorBoardLogger(save_dir=built.output, name="tensorboard", version="", purge_step=resumed),
            callbacks=[Throughput(built.output / "metrics.jsonl", settings.log_every), *built.callbacks, saver],
            default_root_dir=built.output,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


def _places(settings: TrainerSettings) -> tuple[int, int]:
    """Devices a machine, and machines. What torchrun started counts."""
    # Other processes are Lightning's own to start and to announce.
    here = announced() if "TORCHELASTIC_RUN_ID" in os.environ else ALONE
    if here.count == 1:
        return settings.devices, 1
    if settings.devices not in (1, here.local):
        raise TrainError(
            f"devices is {settings.devices}, but torchrun started {here.local} processes on this machine. Each trains on one. "
            f"Write devices: {here.local}, or leave it out."
        )
    return here.local, here.count // here.local


def _strategy(settings: TrainerSettings, world: int) -> Any:
    if settings.strategy != "fsdp":
        return settings.strategy
    # FSDP of DTensors (`fully_shard`): parameters keep their shapes, so weight decay, clipping and averages mean what they always mean.
    return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)


def _finish(
    recipe: Recipe, built: TrainRecipe, trainer: pl.Trainer, module: DiffusionModule, train: Source | Rotation, validation: list
) -> None:
    """The last validation, the checkpoint, the export and its card. Rank 0 writes; all validate, since weights may be sharded."""
    device = trainer.strategy.root_device
    module.to(device)
    if module.average is not None:
        module.average.to(device)
    trainer.save_checkpoint(built.output / "last.ckpt")
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        module.on_validation_epoch_start()
        for number, batch in enumerate(validation):
            module.validation_step(batch, number)
        module.on_validation_epoch_end()
    assert module.last_loss is not None and module.validation_loss is not None
    skipped = module.skipped_steps
    say(
        f"step {trainer.global_step}: train loss {float(module.last_loss):.4f}, validation loss {module.validation_loss:.4f}, "
        f"{module.seconds:.0f} s" + (f", {skipped} steps skipped: their gradient was NaN or infinite" if skipped else ""),
        trainer,
    )
    if 0 < skipped == trainer.global_step or not math.isfinite(module.validation_loss):
        raise TrainError(
            f"the run has no result, got validation loss {module.validation_loss:.4g} after {trainer.global_step} steps, {skipped} of them "
            "skipped. It has diverged, or the data or the first weights hold NaN; nothing was exported. Look at the loss in metrics.jsonl, "
            "and write a smaller optimizer.learning_rate and another output."
        )
    if built.export is None:
        return
    with module.averaged() as model:
        if module.sharded:  # a copy of its own with whole weights: what a sharded module gives away is its shards
            weights = {name: whole(value).cpu() for name, value in model.state_dict().items()}
            model = _prepare(recipe, built) if trainer.is_global_zero else model
            if trainer.is_global_zero:
                model.load_state_dict(weights)
                model.to(device).eval()
        if not trainer.is_global_zero:
            return
        spec = model.spec
        report = export(
            model, built.export, Split(0, trainer.world_size).of(validation[0]), attention=spec.attention, block_size=spec.block_size
        )
    sequences = module.batches * built.data.batch_size * trainer.world_size
    costs = [built.objective.lanes(part.tokens.shape[1], part.answer_length) for part in train.parts]
    lanes = {
        who: round(sequences * sum(cost) / len(costs)) for who, cost in zip(("student", "teacher"), zip(*costs, strict=True), strict=True)
    }
    write_training_card(
        built.export,
        recipe,
        summary=built.summary,
        training={
            "trained_parameters": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
            "all_parameters": sum(p.numel() for p in module.model.parameters()),
            "seed": built.seed,
            "data": repr(built.data),
            "objective": repr(built.objective),
            "steps": trainer.global_step,
            "skipped_steps": skipped,
            "sequences": sequences,
            "rows": train.size,
            "lanes": lanes,
            "seconds": round(module.seconds, 1),
            "devices": trainer.world_size,
            "precision": built.trainer.precision,
        },
        metrics={
            "final_train_loss": float(module.last_loss),
            "final_validation_loss": module.validation_loss,
            **({"float16_export": report} if report else {}),
        },
        device=device,
    )
    say(f"exported to {built.export}")
