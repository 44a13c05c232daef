"""Training on two devices, by DDP and by FSDP, has the losses of one with the same whole batches, accumulated, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer, transformer
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import Doubled, Full
from dllm_toolkit.training.losses import summed
from dllm_toolkit.training.methods.block_diffusion import BlockDiffusion, cap
from dllm_toolkit.training.methods.d3llm import PseudoTrajectory
from dllm_toolkit.training.methods.diffullama import Adaptation
from dllm_toolkit.training.methods.dparallel import CertaintyForcing
from dllm_toolkit.training.methods.dscd import DSCD
from dllm_toolkit.training.objectives import Autoregressive, D2FDistillation, Loss, MaskedDiffusion, Normaliser, Objective, normalise
from dllm_toolkit.training.run import TrainRecipe, run_training
from dllm_toolkit.training.split import Split, ratio
from dllm_toolkit.training.terms import Certainty, CrossEntropy, ForwardKL, Term
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


STRATEGIES = {"one": "auto", "ddp": "ddp", "fsdp": "fsdp"}
TERMS: dict[str, tuple[str, dict]] = {
    "dscd": ("ddp", {"objective": "dscd"}),  # a teacher, the adapter's other side
    # Two copies, and how many positions pass the gate is known after the forward; then the same on the doubled layout.
    "dparallel": ("fsdp", {"objective": {"_component_": "dparallel", "block_length": 16}, "lora": None}),
    "cap": ("ddp", {"objective": {"_component_": "cap", "block_length": 16}, "lora": None}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all trainings of this file left: started by one process, which imports everything once."""
    home = tmp_path_factory.mktemp("devices")

    def run(name: str, place: Path, changes: dict, export: bool = False) -> dict:
        count = 1 if name == "one" else 2
        data = {"_component_": "stories", "size": 24, "heldout": 4, "batch_size": 4 // count, "workers": 0}
        places = {"output": str(place), **({"export": str(place / "export")} if export else {})}
        trainer = {**TRAINER, "strategy": STRATEGIES[name]}
        return {"tree": {**RECIPE, **changes, "data": data, "trainer": trainer, **places}, "count": count}

    one, ddp, fsdp = (run(name, home / "d2f" / name, {}, export=True) for name in STRATEGIES)
    runs = [one, ddp, {**fsdp, "dies_at": 3}, fsdp]
    runs += [run(name, home / key / name, changes) for key, (strategy, changes) in TERMS.items() for name in ("one", strategy)]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    expected = ["[0]", "[0, 0]", str([-signal.SIGKILL] * 2), "[0, 0]"] + ["[0]", "[0, 0]"] * len(TERMS)
    assert done.stdout.splitlines() == expected, done.stderr
    return home


def assert_same_curves(home: Path, name: str, *metrics: str) -> None:
    for metric in ("train/loss", "train/masked_accuracy", "train/gradient_norm", "validation/loss", *metrics):
        expected, found = curve(home / "one", metric), curve(home / name, metric)
        assert len(found) >= 2 and found == pytest.approx(expected, rel=1e-5, abs=1e-6), (name, metric)


def test_two_devices_have_the_losses_of_one(home: Path) -> None:
    home = home / "d2f"
    weights = load_file(home / "one" / "export" / "adapter_model.safetensors")
    one = torch.load(home / "one" / "last.ckpt", weights_only=True)
    for name in ("ddp", "fsdp"):
        assert_same_curves(home, name, "train/kl")
        exported = load_file(home / name / "export" / "adapter_model.safetensors")
        assert exported.keys() == weights.keys()
        for key, value in exported.items():
            assert torch.allclose(value, weights[key], atol=1e-4), (name, key)
        checkpoint = torch.load(home / name / "last.ckpt", weights_only=True)  # whole, and without what is frozen
        assert sorted(checkpoint["state_dict"]) == sorted(one["state_dict"]) and len(one["state_dict"]) == 8
        assert all(torch.allclose(value, one["state_dict"][key], atol=1e-4) for key, value in checkpoint["state_dict"].items())
        assert checkpoint["dllm_toolkit"]["base"] == one["dllm_toolkit"]["base"]
    losses = curve(home / "one", "train/loss")
    assert len(losses) == 4 and len(set(losses)) == 4
    card = json.loads((home / "fsdp" / "export" / "card.json").read_text())
    assert card["training"]["devices"] == 2 and card["training"]["sequences"] == 32


@pytest.mark.parametrize("name", TERMS)
def test_two_devices_have_the_losses_of_one_for_a_sum_of_terms(name: str, home: Path) -> None:
    """T29: each term divides by what both processes hold of a copy, how many answers are right included."""
    metrics = ("train/forwardkl", "train/kl", "train/teacher_agreement") if name == "dscd" else ("train/certainty",)
    assert_same_curves(home / name, TERMS[name][0], "train/crossentropy", *metrics)
    assert max(curve(home / name / "one", metrics[0])) > 0  # something passed the gate


SPEC = ModelSpec(
    vocab_size=9, mask_id=8, eos_ids=(1,), pad_id=1, layers=1, heads=1, kv_heads=1, head_dim=4, width=4, max_positions=16, attention="full"
)


def whole_batch() -> tuple[Batch, Tensor, Tensor]:
    """Six rows; weights of unequal numbers of hidden tokens, in one row none; and a value for every position."""
    torch.manual_seed(3)
    batch = Batch(torch.randint(2, 8, (6, 10)), torch.full((6,), 4), 6)
    masked = batch.answer & (torch.rand(6, 10) < torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0, 0.3]).unsqueeze(1))
    return batch, masked * torch.rand(6, 10), torch.rand(6, 10)


@pytest.mark.parametrize("how", ["answer_length", "batch_length", "masked_count", "row_masked_count", "sum_of_weights", "none"])
def test_parts_of_a_batch_add_up(how: Normaliser) -> None:
    batch, weight, values = whole_batch()
    over, under = torch.zeros(2)
    for rank in range(3):
        rows = slice(2 * rank, 2 * rank + 2)
        one, mass = summed(values[rows], weight[rows], Split(rank, 3).of(batch).answer, how)
        over, under = over + one, under + mass
    assert torch.allclose(ratio(over, under), normalise(values, weight, batch.answer, how))


@dataclass(frozen=True)
class ByToken(Composed):
    """Two copies, a teacher and every way to divide, with noise that depends on a row alone, so that batches can be cut anywhere."""

    gate: Normaliser = "row_masked_count"
    copies = 2

    @property
    def terms(self) -> tuple[Term, ...]:  # type: ignore[override]
        ways = [CrossEntropy(0.2 + 0.1 * number, how, bool(number % 2)) for number, how in enumerate(get_args(Normaliser))]
        return *ways, ForwardKL(2.0, "sum_of_weights", temperature=2.0), Certainty(3.0, self.gate)

    def layout(self, progress: float) -> Doubled:
        return Doubled(3)

    def noise(self, batch: Batch, spec: ModelSpec, generator: torch.Generator, progress: float) -> list[Copy]:
        one, level = batch.answer & (batch.tokens % 3 > 0), batch.tokens[:, :1] % 5
        copies = [hidden(batch, spec, masked, masked / (1.0 + level)) for masked in (one, batch.answer & ~one)]
        return [copy._replace(hint=batch.tokens, teacher_weight=copy.weight * (batch.tokens > 3)) for copy in copies]


SEED = 20  # right in both copies of most noises here


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def small(seed: int) -> Transformer:
    """With opinions: a fresh model is nearly uniform."""
    model = transformer(
        vocab_size=9, mask_id=8, eos_ids=[1], pad_id=1, width=8, layers=1, heads=2, mlp_width=16, max_positions=16, seed=seed
    ).double()
    for parameter in model.parameters():
        parameter.data *= 30.0 if parameter.ndim > 1 else 1.0
    return model


def measured(objective: Objective, calls: Sequence[dict], batch: Batch) -> list[Tensor]:
    """Loss, what its gradient is taken of, and that gradient, summed over calls of an objective."""
    model, teacher = small(SEED), small(2)
    found = []
    for call in calls:
        loss = objective(model, **{"batch": batch, "generator": seeded(), "teacher": teacher, **call})
        assert loss.toward is not None
        gradient = torch.autograd.grad(loss.toward, list(model.parameters()), allow_unused=True)
        flat = torch.cat([part.flatten() for part in gradient if part is not None])
        found.append((loss.value.detach(), loss.toward.detach(), flat))
    return [torch.stack(column).sum(0) for column in zip(*found, strict=True)]


@pytest.mark.parametrize(
    "objective",
    [ByToken(), ByToken("masked_count"), DSCD(), CertaintyForcing(3), PseudoTrajectory(3), cap(3), BlockDiffusion(3), Adaptation(1.0)]
    + [MaskedDiffusion(), D2FDistillation(3, normaliser="sum_of_weights"), Autoregressive()],
    ids=lambda one: type(one).__name__,
)
def test_parts_of_a_sum_of_terms_add_up(objective: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    """T29: rows of each copy with the noise of one process, divided by what all parts hold: asked in two rounds, as nobody answers here."""
    assert objective.splits
    batch = whole_batch()[0]._replace(step_map=torch.arange(60).view(6, 10) % 4)
    told: list[Tensor] = []
    monkeypatch.setattr(Split, "total", lambda split, numbers: told.append(numbers) or numbers)
    calls = [{"split": Split(rank, 3), "progress": 0.5} for rank in range(3)]
    alone = measured(objective, calls, batch)
    monkeypatch.setattr(Split, "total", lambda split, numbers: sum(told))
    whole, parts = measured(objective, [{"progress": 0.5}], batch), measured(objective, calls, batch)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(alone[0], whole[0], rtol=1e-3)  # divided by what each holds itself


@pytest.mark.parametrize("gate", ["row_masked_count", "masked_count"])
def test_batches_of_a_sum_of_terms_add_up(gate: Normaliser) -> None:
    """T29: a step of three batches is that of one, but for the entropy's mean over all that is right, which is known too late."""
    objective, batch = ByToken(gate), whole_batch()[0]
    batches = [Split(part, 3).of(batch) for part in range(3)]
    step = sum(objective.divisor(one, SPEC, torch.Generator(), 0.5) for one in batches)
    whole = measured(objective, [{"progress": 0.5}], batch)
    summed = measured(objective, [{"batch": one, "step": step, "progress": 0.5} for one in batches], batch)
    same = [torch.allclose(one, other, rtol=1e-6, atol=1e-7) for one, other in zip(whole, summed, strict=True)]
    assert same == [False, gate != "masked_count", gate != "masked_count"]  # the loss that people see is that of each batch
    # Each batch's mean counts as its supervised positions do.
    ways = get_args(Normaliser)
    assert torch.equal(step[:-2][ways.index("masked_count")], step[-1]) == (gate == "masked_count")


def test_certainty_forcing_as_published_is_the_mean_of_its_rows() -> None:
    """`row_masked_count`: a batch is the mean of batches of one row, each with means of its own, the entropy's included."""
    objective, batch, model = CertaintyForcing(3, normaliser="row_masked_count"), whole_batch()[0], small(SEED)
    copies = objective.noise(batch, SPEC, seeded(), 0.0)

    def loss(part: Split) -> Loss:
        rows = part.of(batch)
        return objective.loss(model, rows, objective.shown(rows, [part.of(copy) for copy in copies], SPEC, seeded(), 0.0))

    rows = [loss(Split(number, 6)) for number in range(6)]
    assert torch.isclose(loss(Split(0, 1)).value, torch.stack([row.value for row in rows]).mean())
    assert len({round(float(row.metrics["certainty"]), 6) for row in rows}) > 2


def test_a_loss_of_ones_own_instead_of_terms_is_a_mean_over_rows(tmp_path: Path) -> None:
    """Nobody knows its sums: batches of a step weigh what their rows do, and several processes are refused before anything starts."""

    class Own(ByToken):
        def layout(self, progress: float) -> Full:  # type: ignore[override]
            return Full()

        def loss(self, model: Any, batch: Batch, view: Any) -> Loss:
            return Loss(2.0 * super().loss(model, batch, view).value, {})

    objective, batch = Own(), whole_batch()[0]
    assert not objective.splits
    batches = [Split(part, 2).of(batch) for part in range(2)]
    step = sum(objective.divisor(one, SPEC, torch.Generator(), 0.5) for one in batches)
    loss, toward, _ = measured(objective, [{"batch": one, "step": step} for one in batches], batch)
    assert float(step) == 6 and torch.allclose(toward, loss / 2)
    data = {"_component_": "stories", "size": 4, "heldout": 2, "batch_size": 2}
    recipe = Recipe.from_tree({**RECIPE, "data": data, "trainer": {**TRAINER, "devices": 2}, "output": str(tmp_path / "out")})
    with pytest.raises(ToolkitError, match="got Own with 2 devices.*Write devices: 1"):
        run_training(recipe, replace(recipe.build(TrainRecipe), objective=objective))
    assert not (tmp_path / "out").exists()
