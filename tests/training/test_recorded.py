"""Answers that a model wrote: recorded once, read again, refused where they belong to others; and runs that are refused or skip steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.models.fresh import fresh
from dllm_toolkit.recipe import Lazy, Recipe, RecipeError
from dllm_toolkit.training.data import DataError, Example, StoryData
from dllm_toolkit.training.recorded import RecordedData
from dllm_toolkit.training.run import TrainError, TrainRecipe, run_training

TINY = {"_component_": "fresh", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
STORIES = {"_component_": "stories", "size": 8, "heldout": 2, "batch_size": 4}
DECODER = {"_component_": "fast_dllm", "threshold": 0.0, "block_length": 40}


def recorded(store: Path, **changes) -> RecordedData:
    model = Lazy({"tiny": 1}, lambda: fresh(width=16, layers=1, heads=2, mlp_width=32))
    prompts = StoryData(size=8, heldout=2, batch_size=4, workers=0)
    given = {"prompts": prompts, "model": model, "decoder": fast_dllm(40, 0.0), "store": store, "right_only": False, "decode_batch": 3}
    return RecordedData(**{**given, **changes})


def test_answers_are_recorded_once_and_read_again(tmp_path: Path) -> None:
    data = recorded(tmp_path)
    train, heldout = data.sources(torch.device("cpu"), 0)
    batch = train.batch(0)
    assert batch.step_map is not None and data.step_maps and data.answer_lengths == (80,)
    prompts = {tuple(example.prompt) for example in data.examples(8, "train")}
    for row, begin, step in zip(batch.tokens, batch.prompt_length, batch.step_map, strict=True):
        assert tuple(row[:begin].tolist()) in prompts
        assert (step[:begin] == -1).all() and (step[begin : begin + 80] >= -1).all() and (step[begin + 80 :] == -1).all()
        assert step.max() <= 1  # two blocks of 40 in two steps
    again = recorded(tmp_path, model=Lazy({"tiny": 1}, lambda: pytest.fail("decoded again"))).sources(torch.device("cpu"), 0)[0]
    assert torch.equal(again.batch(0).tokens, batch.tokens) and torch.equal(again.batch(0).step_map, batch.step_map)
    assert len(heldout.all_batches()) == 1
    with pytest.raises(DataError, match="recorded otherwise"):
        recorded(tmp_path, decoder=fast_dllm(20, 0.0)).rows("train")
    with pytest.raises(DataError, match="right_only: false"):
        replace(data, right_only=True).rows("train")


def test_only_right_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoryData.examples

    def every_other(self, count, split="heldout"):
        found = original(self, count, split)
        return [Example(one.prompt, one.text, (lambda text, right=number % 2 == 0: right)) for number, one in enumerate(found)]

    monkeypatch.setattr(StoryData, "examples", every_other)
    assert len(recorded(tmp_path, right_only=True).rows("train")["tokens"]) == 4


def train(tmp_path: Path, **changes):
    tree = {
        "model": TINY,
        "data": STORIES,
        "objective": "masked_diffusion",
        "trainer": {"max_steps": 3, "accelerator": "cpu", "log_every": 1, "validate_every": 0},
        "output": str(tmp_path / "run"),
        **changes,
    }
    recipe = Recipe.from_tree(tree)
    return run_training(recipe, recipe.build(TrainRecipe))


def small_tokenizer(directory: Path) -> str:
    """A directory with a tokenizer of other words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<mask>": 2, "a": 3}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), mask_token="<mask>", eos_token="<eos>", pad_token="<pad>"
    )
    made.save_pretrained(directory)
    return str(directory)


def test_what_cannot_be_distilled_is_refused_before_training(tmp_path: Path) -> None:
    stranger = {**TINY, "tokenizer": small_tokenizer(tmp_path / "words")}
    record = {"_component_": "recorded", "prompts": STORIES, "model": TINY, "decoder": DECODER, "store": str(tmp_path / "store")}
    wrong = {
        "different tokenizers": {"objective": "dscd", "teacher": stranger},
        "no lora": {"objective": "dscd"},
        "learns from no teacher": {"teacher": TINY},
        "under one LM head": {"objective": "d2f", "teacher": TINY},
        "attention 'causal'": {"objective": "dscd", "teacher": {**TINY, "attention": "causal", "shift": 1}},
        "follows recorded decodes": {"objective": "path"},
        "do not divide an answer of 80": {"objective": {"_component_": "bd3lm", "block_length": 32}},
        "do not fit the model": {"model": {**TINY, "max_positions": 64}, "data": record},
        "prompts must be data of one kind": {"data": {**record, "prompts": {"_component_": "alternating", "parts": [STORIES]}}},
    }
    for message, change in wrong.items():
        with pytest.raises((RecipeError, ValueError), match=message):
            train(tmp_path, **change)
    assert not (tmp_path / "run").exists()


def test_a_step_of_nan_is_skipped_and_counted_and_a_run_of_them_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from dllm_toolkit.training.objectives import Loss, MaskedDiffusion

    original, calls, bad = MaskedDiffusion.loss, [], {2}

    def poisoned(self, model, batch, view):
        found = original(self, model, batch, view)
        calls.append(1)
        return Loss(found.value * float("nan"), found.metrics) if len(calls) in bad else found

    monkeypatch.setattr(MaskedDiffusion, "loss", poisoned)
    module = train(tmp_path)
    assert int(module.skipped) == 1 and all(parameter.isfinite().all() for parameter in module.model.parameters())
    assert "1 steps since the last line were skipped" in capsys.readouterr().err
    calls.clear()
    bad.update(range(100))
    with pytest.raises((DataError, TrainError), match="The run has diverged"):
        train(tmp_path, output=str(tmp_path / "lost"), trainer={"max_steps": 9, "accelerator": "cpu", "log_every": 3, "validate_every": 0})
