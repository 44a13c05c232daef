"""Training on two devices, by DDP and by FSDP, has the losses of one with the same whole batches, accumulated, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.objectives import D2FDistillation, Loss, MaskedDiffusion, Normaliser, Objective, View, normalise
from dllm_toolkit.training.split import Split
from dllm_toolkit.types import ModelSpec

ROOT = Path(__file__).parents[2]
RECIPE = {
    "model": {"_component_": "fresh", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 160},
    "objective": {"_component_": "d2f", "block_length": 16},
    "lora": {"rank": 2, "alpha": 2},
    "optimizer": {"_component_": "adamw", "learning_rate": 0.05},
    "schedule": {"_component_": "cosine", "warmup_steps": 0},
    "ema": 0.9,
}
TRAINER = {"max_steps": 4, "accumulate": 2, "accelerator": "cpu", "log_every": 1, "validate_every": 2, "checkpoint_every": 2}
# Started as torchrun would, but by a process that has imported everything already.
LAUNCH = """
import json, os, signal, socket, sys
import peft, torch.utils.tensorboard, torch.distributed.checkpoint.state_dict  # what a run would import, once for all
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.training.run import TrainRecipe, run_training
from dllm_toolkit.training.module import DiffusionModule


def start(tree, count, dies_at=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            if count > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0", TORCHELASTIC_RUN_ID="test")
            if dies_at is not None:
                step = DiffusionModule.training_step
                def dying(self, *arguments):
                    return os.kill(os.getpid(), signal.SIGKILL) if self.global_step == dies_at else step(self, *arguments)
                DiffusionModule.training_step = dying
            recipe = Recipe.from_tree(tree)
            run_training(recipe, recipe.build(TrainRecipe))
            sys.stderr.flush()
            os._exit(0)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


for run in json.loads(sys.argv[1]):
    start(**run)
"""


def curve(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_two_devices_have_the_losses_of_one(tmp_path: Path) -> None:
    def tree(name: str, count: int, strategy: str) -> dict:
        data = {"_component_": "stories", "size": 24, "heldout": 4, "batch_size": 4 // count, "workers": 0}
        places = {"output": str(tmp_path / name), "export": str(tmp_path / name / "export")}
        return {**RECIPE, "data": data, "trainer": {**TRAINER, "strategy": strategy}, **places}

    fsdp = {"tree": tree("fsdp", 2, "fsdp"), "count": 2}
    runs = [{"tree": tree("one", 1, "auto"), "count": 1}, {"tree": tree("ddp", 2, "ddp"), "count": 2}, {**fsdp, "dies_at": 3}, fsdp]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    killed = str([-signal.SIGKILL] * 2)
    assert done.stdout.splitlines() == ["[0]", "[0, 0]", killed, "[0, 0]"], done.stderr
    weights = load_file(tmp_path / "one" / "export" / "adapter_model.safetensors")
    for name in ("ddp", "fsdp"):
        for metric in ("train/loss", "train/kl", "train/masked_accuracy", "train/gradient_norm", "validation/loss"):
            expected, found = curve(tmp_path / "one", metric), curve(tmp_path / name, metric)
            assert len(found) >= 2 and found == pytest.approx(expected, rel=1e-5, abs=1e-6), (name, metric)
        exported = load_file(tmp_path / name / "export" / "adapter_model.safetensors")
        assert exported.keys() == weights.keys()
        for key, value in exported.items():
            assert torch.allclose(value, weights[key], atol=1e-4), (name, key)
    losses = curve(tmp_path / "one", "train/loss")
    assert len(losses) == 4 and len(set(losses)) == 4
    card = json.loads((tmp_path / "fsdp" / "export" / "card.json").read_text())
    assert card["training"]["devices"] == 2 and card["training"]["sequences"] == 32


SPEC = ModelSpec(
    vocab_size=9, mask_id=8, eos_ids=(1,), pad_id=1, layers=1, heads=1, kv_heads=1, head_dim=4, width=4, max_positions=16, attention="full"
)


def whole_batch() -> tuple[Batch, View, torch.Tensor]:
    """Six rows with unequal numbers of hidden tokens, one with none; and a value for every position."""
    torch.manual_seed(3)
    batch = Batch(torch.randint(2, 8, (6, 10)), torch.full((6,), 4), 6)
    masked = batch.answer & (torch.rand(6, 10) < torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0, 0.3]).unsqueeze(1))
    return batch, View(batch.tokens.masked_fill(masked, 8), masked, masked * torch.rand(6, 10)), torch.rand(6, 10)


@pytest.mark.parametrize("how", ["answer_length", "batch_length", "masked_count", "row_masked_count", "sum_of_weights", "none"])
@pytest.mark.parametrize("kind", [MaskedDiffusion, D2FDistillation])
def test_parts_of_a_batch_add_up(how: Normaliser, kind: type[MaskedDiffusion] | type[D2FDistillation]) -> None:
    batch, view, values = whole_batch()
    mass = kind(normaliser=how).mass(SPEC, batch, view)
    total = torch.zeros(())
    for rank in range(3):
        split = Split(rank, 3)
        part, seen = split.of(batch), split.of(view)
        loss = normalise(values[2 * rank : 2 * rank + 2], seen.weight, part.answer, how)
        total = total + loss * (1 if mass is None else split.share(mass))
    assert torch.allclose(total, normalise(values, view.weight, batch.answer, how))


def test_a_batch_without_anything_to_learn_has_no_share() -> None:
    assert Split(0, 2).share(torch.zeros(4)) == 0


class Mean(Objective):
    """An objective of a researcher: the mean of the rows, with no word about parts."""

    def corrupt(self, batch: Batch, mask_id: int, generator: torch.Generator) -> View:
        return View(batch.tokens, batch.answer, batch.answer.float())

    def loss(self, model: object, batch: Batch, view: View) -> Loss:
        return Loss(view.tokens.float().mean(), {})


def test_the_default_is_the_mean_of_the_rows() -> None:
    class Model:
        spec = SPEC

    batch, *_ = whole_batch()
    parts = [Mean()(Model(), batch, torch.Generator(), split=Split(rank, 2)) for rank in range(2)]  # type: ignore[arg-type]
    whole = Mean()(Model(), batch, torch.Generator())  # type: ignore[arg-type]
    assert whole.share is None and [float(part.share) for part in parts] == [0.5, 0.5]
    assert torch.isclose(sum(part.value * part.share for part in parts), whole.value)
