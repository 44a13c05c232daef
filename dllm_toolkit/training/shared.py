"""What every training run does, whatever it trains: refusals, the output directory, the model and its adapter, one device."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.base import Model
from dllm_toolkit.models.eight_bit import format_of
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.recipe import Lazy, Recipe
from dllm_toolkit.training.lora import Lora, inject


class TrainError(ToolkitError):
    """A training run that cannot start."""


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Raises TrainError for counts below `least`. None is no count."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise TrainError(f"{name} must be at least {least}, got {value}. It is a count. Write {name}: {least}.")


def check_amounts(settings: object, *names: str) -> None:
    """Raises TrainError for numbers that are not above 0. None is no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise TrainError(f"{name} must be above 0, got {value}. Nothing would be trained. Write {name}: 1.0.")


def check_seed(seed: int) -> None:
    """Raises TrainError for a seed that generators do not take."""
    if not 0 <= seed < 1 << 32:
        raise TrainError(f"seed must lie in 0 .. 2^32 - 1, got {seed}. Generators take no other. Write seed: 0.")


def check_device(accelerator: str) -> None:
    """Raises TrainError if a GPU is asked for and none is there."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise TrainError("no GPU is there, got accelerator 'gpu'. Write accelerator: auto, or cpu.")


def progress(step: int, steps: int | None, seconds: float, minutes: float | None) -> float:
    """The share of a run that is over, in [0, 1]: of its steps or of its time, whichever is larger."""
    shares = [0.0] + ([] if steps is None else [step / steps]) + ([] if minutes is None else [seconds / (60.0 * minutes)])
    return min(1.0, max(shares))


def fit(trainer: pl.Trainer, module: pl.LightningModule, batches: Any, checkpoint: Path | None, validation: Any = None) -> None:
    """Train from `checkpoint`, if there is one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own business with torch
            trainer.fit(module, batches, validation, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into exit(1); the command line has its own way to end
            raise KeyboardInterrupt from None
        raise


def one_device(output: Path, accelerator: str, **settings: Any) -> pl.Trainer:
    """A trainer on one device that logs into `output` and says nothing itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=TensorBoardLogger(save_dir=output, name="tensorboard", version=""),
        default_root_dir=output,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def say(text: str, trainer: pl.Trainer | None = None) -> None:
    """A line for people, from one process of a trainer."""
    if trainer is None or trainer.is_global_zero:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def placed(recipe: Recipe, *keys: str) -> Iterator[None]:
    """Errors of the block get the file and the line of the recipe's value under `keys`."""
    try:
        yield
    except (ToolkitError, ValueError) as error:  # Lightning and PEFT raise ValueError for a setting they do not know
        raise TrainError(recipe.at(keys, error)) from error


def owned(output: Path, recipe: Recipe) -> Path | None:
    """The checkpoint in `output` to resume from, if any. Raises TrainError if the directory belongs to another recipe."""
    name = output / "recipe.sha"
    checkpoint = output / "last.ckpt"
    if name.is_file() and name.read_text(encoding="utf-8").strip() != recipe.hash():
        raise TrainError(
            f"{output} belongs to another recipe, got hash {recipe.hash()} where it has {name.read_text(encoding='utf-8').strip()}. "
            f"Resuming would mix two runs; see {output / 'recipe.yaml'}. Write another output:, or delete the directory."
        )
    if checkpoint.is_file() and not name.is_file():
        raise TrainError(
            f"{checkpoint} has no recipe beside it, so it cannot be resumed safely. Write another output:, or delete the file."
        )
    return checkpoint if checkpoint.is_file() else None


def claim(output: Path, recipe: Recipe) -> None:
    """Make `output` this recipe's own. Only once everything that can be refused was looked at: a mistake must not take a directory."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    # Renamed into place: another process of the run must not read half a hash.
    (output / "recipe.sha.new").write_text(recipe.hash() + "\n", encoding="utf-8")
    (output / "recipe.sha.new").replace(output / "recipe.sha")


def check_export(recipe: Recipe, where: Path | None) -> None:
    """Hours of training must not end at a path that cannot be written. An earlier export (it has a card) is replaced."""
    if where is None:
        return
    with placed(recipe, "export"):
        occupied = next((parent for parent in (where, *where.parents) if parent.exists() and not parent.is_dir()), None)
        if occupied is not None:
            raise TrainError(f"{occupied} is a file, and weights are exported into a directory. Write another export:, or null.")
        if where.is_dir() and any(where.iterdir()) and not (where / "card.json").is_file():
            raise TrainError(f"{where} holds files that no training has exported (there is no card.json). Write another export:, or null.")


def trainable(recipe: Recipe, source: Lazy[Model]) -> Transformer:
    """The model, if it is one that can be trained. Raises TrainError."""
    model = source.build()
    with placed(recipe, "model"):
        if not isinstance(model, Transformer):
            raise TrainError(
                f"only the native Transformer is trained here, got {type(model).__name__}. Write model: {{_component_: fresh}}."
            )
        if format_of(model) is not None:
            raise TrainError(
                f"only exact weights are trained, got a model with weights: {format_of(model)}. Rounding has no gradients. "
                "Leave weights: out."
            )
    return model


def check_words(model: Model, tokenizer: Any) -> None:
    """Raises TrainError if ids of this tokenizer, the data's, are other words to the model. A model without a tokenizer has no say."""
    if getattr(model, "tokenizer", None) is None:
        return
    words, ids = tokenizer.get_vocab(), model.tokenizer.get_vocab()  # type: ignore[attr-defined]
    other = next((word for word, number in words.items() if ids.get(word) != number), None)
    if other is not None:
        raise TrainError(
            f"the data's tokens are not the model's, got {other!r} as number {words[other]} of the data and {ids.get(other)} of the model. "
            "Its rows would mean something else. Use a model made for this tokenizer, or data made for this model's."
        )


def adapt(recipe: Recipe, model: Transformer, lora: Lora, source: Lazy[Model], seed: int) -> Transformer:
    """The model with a fresh adapter, whose configuration names the frozen checkpoint as the recipe does (`asset:teacher`, a hub id)."""
    path = source.tree.get("path") if isinstance(source.tree, dict) else None
    with torch.random.fork_rng(devices=[]), placed(recipe, "lora"):
        torch.manual_seed(seed)
        return inject(model, lora, base="" if path is None else str(path))
