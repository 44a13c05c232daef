"""Training Learn2PD's filter (`decoders/learn2pd.py`): which proposed tokens of a block are final already?

    decode prompts slowly, then with an oracle that commits what is right already (`training/oracle.py`)
    train an MLP on what the oracle has seen: binary cross-entropy, the whole set in every step
    keep the weights that do best on held-out prompts

The model is frozen and only asked; the network has some hundred weights. Its examples are kept in the output directory, so that a run
that was stopped does not decode again.

Reference: Learn2PD, arXiv 2509.25188: 2,640 prompts, AdamW at 3e-3, 40,000 steps, blocks of 32. The paper does not name its activation
(ReLU here), and selects by the false-positive rate at 0.9, which a filter that rejects everything would win: here the loss decides.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.learn2pd import Activation, Filter, filter_logits, save_filter, traits
from dllm_toolkit.models.base import Model
from dllm_toolkit.recipe import Lazy, Recipe
from dllm_toolkit.training.data import Data, Source
from dllm_toolkit.training.export import write_training_card
from dllm_toolkit.training.optim import AdamW, Constant, LearningRate, OptimizerRecipe
from dllm_toolkit.training.oracle import Examples, joined, oracle_examples
from dllm_toolkit.training.shared import (
    TrainError,
    check_counts,
    check_device,
    check_export,
    check_words,
    claim,
    fit,
    one_device,
    owned,
    placed,
    say,
)


class FilterNetwork(nn.Module):
    """The network that becomes a `Filter`: `layers` linear layers from block_length to block_length."""

    def __init__(self, block_length: int, layers: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        widths = [block_length, *[hidden] * (layers - 1), block_length]
        self.linear = nn.ModuleList(nn.Linear(narrow, wide) for narrow, wide in itertools.pairwise(widths))
        self.activation: Activation = activation

    @property
    def layers(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((layer.weight, layer.bias) for layer in self.linear)  # type: ignore[misc]

    def forward(self, confidence: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
        return filter_logits(self.layers, self.activation, confidence)


def filter_loss(logits: Float[Tensor, "N n"], examples: Examples, masked_only: bool) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over all positions of all blocks, or over the masked ones."""
    each = F.binary_cross_entropy_with_logits(logits, examples.right.to(logits.dtype), reduction="none")
    if not masked_only:
        return each.mean()
    weight = examples.masked.to(logits.dtype)
    return (each * weight).sum() / weight.sum().clamp(min=1)


def judge(logits: Float[Tensor, "N n"], examples: Examples, accept: float) -> dict[str, float]:
    """How a filter does on masked positions: the shares of the wrong and of the right proposals that it accepts."""
    taken = logits.sigmoid() >= accept
    wrong, right = examples.masked & ~examples.right, examples.masked & examples.right
    return {
        "accepted_of_wrong": float((taken & wrong).sum() / wrong.sum().clamp(min=1)),
        "accepted_of_right": float((taken & right).sum() / right.sum().clamp(min=1)),
    }


@dataclass(frozen=True)
class FilterSettings:
    """The network: blocks of block_length, `layers` linear layers, hidden ones as wide as a block unless `hidden` says otherwise.

    masked_only: decided positions, whose label is nearly always yes, do not count in the loss; the paper counts them.
    """

    block_length: int = 32
    layers: int = 2
    hidden: int | None = None
    activation: Activation = "relu"
    masked_only: bool = False

    def __post_init__(self) -> None:
        for name, example in (("block_length", 32), ("layers", 2), ("hidden", 32)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"{name} must be at least 1, got {value}. It is a size of the filter. Write {name}: {example}.")


@dataclass(frozen=True)
class FilterTrainer:
    """How long and where: optimiser steps on the whole set of examples; validate_every also decides which weights are kept."""

    max_steps: int = 2000
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    validate_every: int = 100

    def __post_init__(self) -> None:
        check_counts(self, "max_steps", "validate_every")
        check_device(self.accelerator)


@dataclass(frozen=True)
class FilterRecipe:
    """The root of a recipe that trains a filter for a frozen model.

    data: its prompts are decoded, its answers are not looked at; batch_size rows at a time, with `cache`. output: examples, metrics and
    TensorBoard files. export: where the filter and its card go.
    """

    model: Lazy[Model]
    data: Data
    filter: FilterSettings
    output: Path
    cache: Cache = field(default_factory=NoCache)
    optimizer: OptimizerRecipe = AdamW(learning_rate=3e-3, weight_decay=0.01)
    schedule: LearningRate = Constant()
    trainer: FilterTrainer = field(default_factory=FilterTrainer)
    export: Path | None = None
    summary: str = "A filter for Learn2PD, trained with dllm_toolkit."
    seed: int = 0


class FilterModule(pl.LightningModule):
    """Trains a network on one set of examples; keeps the weights with the least loss on the held-out ones."""

    def __init__(self, built: FilterRecipe, network: FilterNetwork, heldout: Examples) -> None:
        super().__init__()
        self.built, self.network, self.heldout = built, network, heldout
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.last_loss = torch.zeros(())

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        loss = filter_loss(self.network(batch.confidence), batch, self.built.filter.masked_only)
        self.last_loss = loss.detach()
        return loss

    def on_train_batch_start(self, batch: Examples, batch_idx: int) -> None:
        self.built.schedule.set(self.optimizers(), self.global_step, self.global_step / self.built.trainer.max_steps)

    def on_train_batch_end(self, outputs: Any, batch: Examples, batch_idx: int) -> None:
        step, settings = self.global_step, self.built.trainer
        if step % settings.validate_every and step != settings.max_steps:
            return
        loss = self.judged()
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step, {name: value.detach().clone() for name, value in self.network.state_dict().items()})
        metrics = {"train/loss": float(self.last_loss), "validation/loss": loss}
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics(metrics, step)
        if step == settings.max_steps or step % (settings.validate_every * 5) == 0:
            say(f"step {step:>6}  loss {metrics['train/loss']:.4f}  validation loss {loss:.4f}")

    @torch.no_grad()
    def judged(self) -> float:
        """The loss on the held-out examples."""
        heldout = Examples(*(part.to(self.device) for part in self.heldout))
        return float(filter_loss(self.network(heldout.confidence), heldout, self.built.filter.masked_only))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.built.optimizer.begin(self.network.named_parameters(), self.device)


class Whole:
    """The same examples in every step."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Examples]:
        while True:
            yield self.examples


def run_filter_training(recipe: Recipe, built: FilterRecipe) -> Filter:
    """Collect examples (unless they are there), train, and export the filter with its card. Returns the filter.

    Raises TrainError if `output` belongs to another recipe (nothing is overwritten).
    """
    owned(built.output, recipe)
    check_export(recipe, built.export)
    device = torch.device("cuda" if built.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    model: Any = built.model.build()
    with placed(recipe, "data"):
        built.data.check(model.spec.max_positions)
        check_words(model, built.data.tokenizer())
    claim(built.output, recipe)
    started = time.monotonic()
    train, heldout = _examples(built, model.to(device), device)
    collected = time.monotonic() - started
    settings = built.filter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(built.seed)
        network = FilterNetwork(settings.block_length, settings.layers, settings.hidden or settings.block_length, settings.activation)
    module = FilterModule(built, network, heldout)
    trainer = one_device(built.output, built.trainer.accelerator, max_steps=built.trainer.max_steps, log_every_n_steps=1)
    fit(trainer, module, Whole(train), None)
    assert module.best is not None
    loss, step, weights = module.best
    network.cpu().load_state_dict(weights)
    source = built.model.tree.get("path", "") if isinstance(built.model.tree, dict) else ""
    layers = tuple((weight.detach().cpu(), bias.detach().cpu()) for weight, bias in network.layers)
    made = Filter(layers, settings.block_length, settings.activation, traits(model.spec), str(source))
    metrics = {"final_train_loss": float(module.last_loss), "validation_loss": loss, "kept_step": step}
    with torch.no_grad():
        logits = network(heldout.confidence)
    for accept in (0.9, 0.96):
        metrics |= {f"{name}_at_{accept}": value for name, value in judge(logits, heldout, accept).items()}
    say("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if built.export is not None:
        save_filter(made, built.export)
        _card(recipe, built, module, train, heldout, device, collected, metrics)
        say(f"exported to {built.export}")
    return made


def _examples(built: FilterRecipe, model: Model, device: torch.device) -> tuple[Examples, Examples]:
    """Training and held-out examples on the CPU, from the output directory if an earlier process collected them."""
    file = built.output / "examples.safetensors"
    if not file.is_file():
        sources = built.data.sources(torch.device("cpu"), built.seed)
        counts = [sum(len(part.tokens) for part in source.parts) for source in sources]
        say(f"decoding {' and '.join(map(str, counts))} prompts on {device}, slowly and with the oracle")
        parts = [joined([_collect(part, model, built) for part in source.parts]) for source in sources]
        named = {
            f"{name}.{key}": value for name, part in zip(("train", "heldout"), parts, strict=True) for key, value in part._asdict().items()
        }
        unfinished = file.with_suffix(".part")
        save_file(named, unfinished)
        unfinished.rename(file)  # a run that is killed while it writes leaves no half a file
    tensors = load_file(file)
    train, heldout = (Examples(*(tensors[f"{name}.{key}"] for key in Examples._fields)) for name in ("train", "heldout"))
    say(f"{len(train.confidence)} and {len(heldout.confidence)} blocks to learn from, {_share(train):.1%} of the masks proposed right")
    return train, heldout


def _share(examples: Examples) -> float:
    return float(examples.right[examples.masked].float().mean())


def _collect(source: Source, model: Model, built: FilterRecipe) -> Examples:
    found = []
    for start in range(0, len(source.tokens), built.data.batch_size):
        tokens: Int[Tensor, "B L"] = source.tokens[start : start + built.data.batch_size].long()
        lengths = source.prompt_length[start : start + built.data.batch_size].tolist()
        prompts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        part = oracle_examples(model, prompts, source.answer_length, built.filter.block_length, built.cache)
        found.append(Examples(*(piece.cpu() for piece in part)))
    return joined(found)


def _card(
    recipe: Recipe,
    built: FilterRecipe,
    module: FilterModule,
    train: Examples,
    heldout: Examples,
    device: torch.device,
    collected: float,
    metrics: dict[str, float],
) -> None:
    assert built.export is not None
    write_training_card(
        built.export,
        recipe,
        summary=built.summary,
        training={
            "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
            "seed": built.seed,
            "data": repr(built.data),
            "filter": repr(built.filter),
            "blocks": {"train": len(train.confidence), "heldout": len(heldout.confidence)},
            "masks_proposed_right": {"train": _share(train), "heldout": _share(heldout)},
            "steps": built.trainer.max_steps,
            "seconds_of_decoding": round(collected, 1),
        },
        metrics=metrics,
        device=device,
    )
