"""Checkpoints of adapters: without the frozen base, of that base alone, and resumed with the same losses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from dllm_toolkit.models.transformer import Transformer, transformer
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.training.checkpoint import digest, frozen, resumed
from dllm_toolkit.training.lora import Lora, inject
from dllm_toolkit.training.module import DiffusionModule
from dllm_toolkit.training.run import TrainError, TrainRecipe, run_training


class Dies(pl.Callback):
    at: int | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == Dies.at:
            raise InterruptedError


RECIPE = {
    "model": {"_component_": "fresh", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 160},
    "data": {"_component_": "stories", "size": 24, "heldout": 4, "batch_size": 4, "workers": 0},
    "objective": {"_component_": "d2f", "block_length": 16},
    "lora": {"rank": 2, "alpha": 2, "dropout": 0.1, "frozen": "bfloat16"},
    "optimizer": {"_component_": "adamw", "learning_rate": 0.05},
    "schedule": {"_component_": "cosine", "warmup_steps": 0},
    "trainer": {
        "max_steps": 4,
        "accelerator": "cpu",
        "precision": "bf16-mixed",
        "log_every": 1,
        "validate_every": 2,
        "checkpoint_every": 2,
    },
    "ema": 0.9,
    "callbacks": [f"{__name__}.Dies"],
    "output": "run",
}


def train(place: Path, dies_at: int | None = None, **changes: object) -> DiffusionModule:
    """`output` is relative, so that the runs of all places have one recipe."""
    place.mkdir(exist_ok=True)
    before, Dies.at = Path.cwd(), dies_at
    os.chdir(place)
    try:
        recipe = Recipe.from_tree({**RECIPE, **changes})
        return run_training(recipe, recipe.build(TrainRecipe))
    finally:
        os.chdir(before)


def curve(place: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in ("step", "train/loss", "train/gradient_norm", "validation/loss")) for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and one that died after its first checkpoint; again with a checkpoint as they were before bases were left out."""
    home = tmp_path_factory.mktemp("checkpoints")
    module = train(home / "whole")
    assert module.model.embed.weight.dtype == torch.bfloat16
    with pytest.raises(InterruptedError):
        train(home / "died", dies_at=3)
    shutil.copytree(home / "died", home / "older")
    older = torch.load(home / "died" / "run" / "last.ckpt", weights_only=True)
    del older["dllm_toolkit"]["base"]
    older["state_dict"] |= {f"model.{name}": value for name, value in frozen(module.model).items()}
    torch.save(older, home / "older" / "run" / "last.ckpt")
    shutil.copy(home / "older" / "run" / "last.ckpt", home / "older.ckpt")
    return home


def test_a_run_continues_with_the_same_losses_from_what_is_trained(home: Path) -> None:
    found = torch.load(home / "died" / "run" / "last.ckpt", weights_only=True)
    assert found["global_step"] == 2 and len(found["state_dict"]) == len(found["optimizer_states"][0]["state"]) == 8
    assert all("lora_" in name for name in found["state_dict"])
    for place in (home / "died", home / "older"):
        train(place)
        assert curve(place) == curve(home / "whole") and len(curve(place)) == 6
        assert torch.load(place / "run" / "last.ckpt", weights_only=True)["state_dict"].keys() == found["state_dict"].keys()
    assert len({loss for _, loss, *_ in curve(home / "whole")}) == 5  # of four steps, and none beside two validations


def test_another_base_is_refused(home: Path) -> None:
    """The recipe is the same, and says a path: what stands there is not."""
    model = train(home / "whole").model
    assert resumed(home / "whole" / "run" / "last.ckpt", model, digest(frozen(model))) == 5
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    for file in (home / "whole" / "run" / "last.ckpt", home / "older.ckpt"):
        with pytest.raises(TrainError, match=r"trained on another base, got digest \w{12} where it has \w{12}\."):
            resumed(file, model, digest(frozen(model)))


def small() -> Transformer:
    return transformer(vocab_size=9, mask_id=8, eos_ids=[1], pad_id=1, width=8, layers=1, heads=2, mlp_width=16, max_positions=16, seed=0)


def test_what_is_no_checkpoint_of_this_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    for text in (b"", b"not a checkpoint"):
        file.write_bytes(text)
        with pytest.raises(TrainError, match=r"last\.ckpt cannot be resumed from, got \w+Error: .* delete the file"):
            resumed(file, small(), None)
    torch.save({"global_step": 3, "state_dict": {"model.embed.weight": torch.zeros(1)}, "dllm_toolkit": {}}, file)
    model = inject(small(), Lora(rank=1))
    with pytest.raises(TrainError, match=r"does not hold what is trained, got 1 weights without layers\.0\.\w+\.lora_A"):
        resumed(file, model, digest(frozen(model)))


def test_a_digest_is_of_names_types_shapes_and_values() -> None:
    one = {"a": torch.arange(6.0), "b": torch.zeros(())}
    others = [
        {"a": one["a"], "c": one["b"]},
        {**one, "a": one["a"].view(2, 3)},
        {**one, "a": one["a"].view(torch.int32)},
        {**one, "a": -one["a"]},
    ]
    assert digest(one) == digest(dict(reversed(one.items()))) == digest({**one, "a": one["a"].repeat_interleave(2)[::2]})
    assert len({digest(weights) for weights in (one, *others)}) == 5 and digest({}) is None
