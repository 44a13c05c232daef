"""Whole runs on a tiny model: kill and resume, export and load, cards, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dllm_toolkit import recipe as recipes
from dllm_toolkit.data.stories import build_tokenizer
from dllm_toolkit.models.load import load
from dllm_toolkit.recipe import Recipe, RecipeError
from dllm_toolkit.training.export import ExportError, update_card
from dllm_toolkit.training.objectives import Loss, MaskedDiffusion
from dllm_toolkit.training.run import TrainError, TrainRecipe, run_training
from dllm_toolkit.training.shared import check_words

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {"_component_": "fresh", "width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "max_positions": 192},
    "data": {"_component_": "stories", "size": 200, "heldout": 8, "batch_size": 4},
    "objective": "masked_diffusion",
    "optimizer": {"_component_": "adamw", "learning_rate": 0.01},
    "schedule": {"_component_": "cosine", "warmup_steps": 2},
    "trainer": {"max_steps": 12, "accelerator": "cpu", "log_every": 1, "validate_every": 6, "checkpoint_every": 4, "accumulate": 2},
    "ema": 0.9,
}
DIES = """
import os, signal
import lightning.pytorch as pl


class Dies(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if "DIE_AT" in os.environ and trainer.global_step == int(os.environ["DIE_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
"""
TRAIN = """
import sys
from dllm_toolkit import recipe as recipes
from dllm_toolkit.training.run import TrainRecipe, run_training

loaded = recipes.load(sys.argv[1]).checked(TrainRecipe)
run_training(loaded, loaded.build(TrainRecipe))
"""


def train(tree: dict):
    recipe = Recipe.from_tree(tree)
    return run_training(recipe, recipe.build(TrainRecipe))


def curve(output: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    values = [(line["step"], line[name]) for line in lines if name in line]
    assert len({step for step, _ in values}) == len(values), "a step was written twice"
    return dict(values)


def test_a_killed_run_continues_with_the_same_losses(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dying.py").write_text(DIES)
    (tmp_path / "train.py").write_text(TRAIN)
    tree = {**SMALL, "output": "killed", "callbacks": ["dying.Dies"]}
    (tmp_path / "killed.yaml").write_text(json.dumps(tree))
    environment = {**os.environ, "DIE_AT": "10", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.run([sys.executable, "train.py", "killed.yaml"], env=environment, capture_output=True, text=True, timeout=240)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert max(curve(tmp_path / "killed", "train/loss")) >= 8

    recipe = recipes.load(tmp_path / "killed.yaml").checked(TrainRecipe)
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, which hold the second of their creation
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed process: sums of floats depend on how they are split
    try:
        resumed = run_training(recipe, recipe.build(TrainRecipe))
        whole = train({**SMALL, "output": "whole", "callbacks": ["dying.Dies"]})
    finally:
        torch.set_num_threads(threads)
    assert resumed.batches == whole.batches == 24
    for name in ("train/loss", "train/gradient_norm", "validation/loss", "train/learning_rate"):
        assert curve(tmp_path / "killed", name) == curve(tmp_path / "whole", name)
    assert len(curve(tmp_path / "killed", "train/loss")) == 12
    for a, b in zip(resumed.average.shadow, whole.average.shadow, strict=True):
        assert torch.equal(a, b)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "killed" / "tensorboard"))
    events.Reload()
    # What the killed process logged beyond its checkpoint (step 8) is not there twice.
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A teacher, exported."""
    home = tmp_path_factory.mktemp("run")
    module = train({**SMALL, "output": str(home / "teacher"), "export": str(home / "model")})
    torch.save({"averaged": [t.clone() for t in module.average.shadow]}, home / "averages.pt")
    return home


def test_the_averaged_weights_are_exported_and_load_without_lightning(exported) -> None:
    code = (
        "import sys; from dllm_toolkit.models.load import load; m = load(sys.argv[1]); "
        "assert 'lightning' not in sys.modules and 'peft' not in sys.modules; print(m.spec.mask_id, m.tokenizer.mask_token_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported / "model")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1
    averages = torch.load(exported / "averages.pt", weights_only=True)["averaged"]
    for parameter, average in zip(load(str(exported / "model")).parameters(), averages, strict=True):
        assert torch.allclose(parameter, average, atol=1e-3)


def test_the_card_says_where_the_weights_come_from(exported) -> None:
    card = json.loads((exported / "model" / "card.json").read_text())
    assert card["training"]["steps"] == 12 and card["training"]["sequences"] == 12 * 2 * 4
    assert card["metrics"]["final_validation_loss"] > 0 and card["metrics"]["float16_export"]["as_good_argmax"] > 0.99
    update_card(exported / "model", {"accuracy": {"vanilla": 0.5}})
    card = json.loads((exported / "model" / "card.json").read_text())
    assert card["metrics"]["accuracy"] == {"vanilla": 0.5} and card["metrics"]["final_train_loss"] > 0
    assert "vanilla 0.5" in (exported / "model" / "README.md").read_text()
    with pytest.raises(ExportError, match="no card"):
        update_card(exported, {})


def test_distillation_end_to_end(exported) -> None:
    tree = {
        **SMALL,
        "model": {"_component_": "load", "path": str(exported / "model")},
        "objective": {"_component_": "d2f", "block_length": 16},
        "lora": {"rank": 4, "alpha": 4},
        "callbacks": [
            {
                "_component_": "decode",
                "decoder": {"_component_": "d2f", "block_length": 16},
                "cache": "block_causal",
                "every": 6,
                "problems": 2,
            }
        ],
        "output": str(exported / "student"),
        "export": str(exported / "adapter"),
    }
    module = train(tree)
    student = load(str(exported / "model"), adapter=str(exported / "adapter"))
    assert (student.spec.attention, student.spec.block_size) == ("block_causal", 16)
    tokens = torch.arange(64).view(2, 32) % 50
    with module.averaged() as model:
        assert torch.allclose(model.logits(tokens), student.logits(tokens), atol=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(exported / "student" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("decode/accuracy")] == [6, 12]
    assert "decode/text/text_summary" in events.Tags()["tensors"]
    assert {"train/kl", "train/samples_per_second", "decode/tokens_per_forward"} <= set(events.Tags()["scalars"])


def test_a_finished_run_trains_no_further_and_exports_again(exported, tmp_path) -> None:
    recipe = {**SMALL, "output": str(exported / "teacher"), "export": str(exported / "model")}
    before = load(str(exported / "model")).state_dict()
    (exported / "model" / "model.safetensors").unlink()
    assert train(recipe).batches == 24
    after = load(str(exported / "model")).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    timed = {**SMALL, "trainer": {"max_minutes": 0.01, "accelerator": "cpu", "validate_every": 0}, "output": str(tmp_path / "timed")}
    assert train(timed).batches == train(timed).batches


def test_data_in_other_words_than_the_models_is_refused() -> None:
    words = build_tokenizer().get_vocab()
    for ids in (words, {**words, "<more>": 1000}):
        check_words(SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=ids.copy)), build_tokenizer())
    check_words(SimpleNamespace(tokenizer=None), build_tokenizer())
    one, other = list(words)[20:22]
    swapped = {**words, one: words[other], other: words[one]}
    with pytest.raises(TrainError, match=r"as number \d+ of the data and \d+ of the model"):
        check_words(SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=swapped.copy)), build_tokenizer())


def test_a_run_without_a_number_has_no_result(tmp_path, monkeypatch) -> None:
    """Shorter than a line of the log, so that nothing has said so before."""
    monkeypatch.setattr(MaskedDiffusion, "loss", lambda self, model, batch, view: Loss(model.embed.weight.sum() * float("nan"), {}))
    trainer = {"max_steps": 2, "accelerator": "cpu", "log_every": 50, "validate_every": 0}
    with pytest.raises(TrainError, match="validation loss nan after 2 steps, 2 of them skipped.*nothing was exported"):
        train({**SMALL, "trainer": trainer, "output": str(tmp_path / "run"), "export": str(tmp_path / "model")})
    assert not (tmp_path / "model").exists()


def test_another_recipes_directory_is_left_alone(exported) -> None:
    before = (exported / "teacher" / "last.ckpt").read_bytes()
    with pytest.raises(TrainError, match="belongs to another recipe"):
        train({**SMALL, "seed": 1, "output": str(exported / "teacher")})
    assert (exported / "teacher" / "last.ckpt").read_bytes() == before


def test_time_ends_a_run_and_anneals_it(tmp_path) -> None:
    trainer = {"max_minutes": 0.03, "accelerator": "cpu", "log_every": 1, "validate_every": 0}
    module = train({**SMALL, "trainer": trainer, "output": str(tmp_path / "timed")})
    rates = list(curve(tmp_path / "timed", "train/learning_rate").values())
    assert module.seconds < 20 and rates[-1] < 0.15 * max(rates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "autoregressive"}, "attention 'causal'"),
        ({"objective": "d2f"}, "no lora"),
        ({"trainer": {"log_every": 1}}, "neither max_steps nor max_minutes"),
        ({"model": {"_component_": "fresh", "max_positions": 64}}, "do not fit the model"),
        ({"data": {"_component_": "stories", "size": 2, "heldout": 8, "batch_size": 4}}, "fewer problems than one batch"),
        ({"lora": {"rank": 4, "targets": ["query"]}}, "match no linear module"),
        ({"ema": 1.5}, r"ema must lie in \[0, 1\)"),
        ({"seed": -1}, "seed must lie in 0"),
        ({"trainer": {"max_steps": -1}}, "trainer.max_steps: max_steps must be at least 1"),
        ({"trainer": {"max_minutes": 0}}, "max_minutes must be above 0"),
        ({"trainer": {"max_steps": 1, "gradient_clip": 0}}, "gradient_clip must be above 0"),
        ({"trainer": {"max_steps": 1, "validate_every": -1}}, "validate_every must be 0 or more"),
        ({"trainer": {"max_steps": 1, "accelerator": "cpu", "strategy": "x"}}, "no such name, got .x.. Write one of auto"),
        ({"trainer": {"max_steps": 1, "strategy": "fsdp", "precision": "64-true"}}, "64-true is not there with strategy fsdp"),
        ({"data": {"_component_": "stories", "batch_size": 4, "answer_length": 2}}, "data: answer_length must be at least 80"),
        ({"data": {"_component_": "stories", "batch_size": 4, "workers": -1}}, "workers must be 0 or more"),
        ({"optimizer": {"_component_": "adamw", "betas": [2, 3]}}, "betas must lie in"),
        ({"schedule": {"_component_": "cosine", "warmup_steps": -1}}, "warmup_steps must be 0 or more"),
        ({"lora": {"rank": 4, "dropout": 2}}, "dropout must lie in"),
        ({"callbacks": [{"_component_": "decode", "decoder": "autoregressive"}]}, "callbacks.0: the decoder .* does not fit"),
        ({"export": str(Path(__file__))}, "export: .* is a file"),
        ({"export": str(Path(__file__).parent)}, "export: .* no card.json"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, change, message) -> None:
    with pytest.raises((RecipeError, ValueError), match=message):
        train({**SMALL, "output": str(tmp_path / "run"), **change})
    assert not (tmp_path / "run").exists(), "a mistake took the directory: the corrected recipe would be refused as another one"
