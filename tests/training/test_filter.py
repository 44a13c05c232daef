"""Learn2PD's oracle and the training of its filter: the oracle says what the model says, examples are true, a run leaves a filter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.learn2pd import learn2pd, load_filter
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.models.load import load
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.testing.models import Oracle, tiny_transformer
from dllm_toolkit.testing.record import unequal
from dllm_toolkit.training.filter import (
    FilterNetwork,
    FilterRecipe,
    filter_loss,
    judge,
    run_filter_training,
)
from dllm_toolkit.training.oracle import Examples, joined, oracle_steps
from dllm_toolkit.training.run import TrainError

PROMPTS = unequal().prompts
LENGTH, BLOCK = 10, 4


def steps_of(model: Any) -> tuple[Any, Any, list[Examples]]:
    output = decode(model, vanilla(block_length=BLOCK), PROMPTS, max_new_tokens=LENGTH)
    with torch.inference_mode():
        return output, *oracle_steps(model, PROMPTS, output.canvas, LENGTH, BLOCK, NoCache())


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_says_what_the_slow_decode_says(seed: int) -> None:
    """EGP output equals its reference, whatever the model, in at most one step a token of each block, and usually in fewer."""
    model = tiny_transformer(2, "full", 0, seed)
    output, state, found = steps_of(model)
    assert torch.equal(state.tokens[state.inside], output.canvas[state.inside])
    stopping = decode(model, semi_ar(BLOCK), PROMPTS, max_new_tokens=LENGTH)
    assert torch.equal(state.end, stopping.end) and torch.equal(state.tokens, stopping.canvas)
    assert bool((state.step <= torch.tensor(stopping.stats.steps)).all())
    assert sum(stopping.stats.steps) > int(state.step.sum())
    assert len(joined(found).confidence) == int(state.step.sum()), "one example for each step of each row"


def test_a_model_that_is_always_right_needs_one_step_a_block() -> None:
    _, state, found = steps_of(Oracle())
    length = state.end - state.begin
    assert state.step.tolist() == length.div(BLOCK, rounding_mode="floor").add((length % BLOCK > 0).long()).tolist()
    examples = joined(found)
    assert bool(examples.right.all())


def test_examples_say_what_was_masked_and_what_was_right() -> None:
    """Against the logits: confidences of the whole block, 1 behind the answer's end; right where the argmax is the final token."""
    model = tiny_transformer(2, "full", 0, 1)
    output, _, found = steps_of(model)
    first = found[0]
    assert first.masked.all(1).tolist() == [True] * 4 and first.confidence.shape == (4, BLOCK)
    tokens = torch.full_like(output.canvas, model.spec.pad_id)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        tokens[row, len(prompt) : len(prompt) + LENGTH] = model.spec.mask_id
    for row, prompt in enumerate(PROMPTS):
        begin, size = len(prompt), len(prompt) + LENGTH
        with torch.inference_mode():
            logits = model.logits(tokens[row : row + 1, :size], torch.ones(1, size, size, dtype=torch.bool))
        logits = logits[0, begin : begin + BLOCK].clone()
        logits[:, model.spec.mask_id] = -torch.inf
        confidence, said = logits.softmax(-1).max(-1)
        assert torch.allclose(first.confidence[row].double(), confidence, atol=1e-6)
        assert torch.equal(first.right[row], said == output.canvas[row, begin : begin + BLOCK])
    # Once a position is decided, it is a feature still, and no candidate any more.
    later = found[1]
    assert not bool(later.masked.all())
    # Ten positions are two blocks and a half: in a last block two places hold nothing to decode.
    short = joined(found)
    ends = (short.confidence[:, 2:] == 1.0).all(1)
    assert bool(ends.any()) and not bool(short.masked[ends][:, 2:].any()) and bool(short.right[ends][:, 2:].all())


def test_the_loss_is_a_mean_over_all_positions_or_over_the_masked() -> None:
    right = torch.tensor([[True, False], [True, True]])
    masked = torch.tensor([[True, True], [False, True]])
    examples = Examples(torch.zeros(2, 2), right, masked)
    logits = torch.tensor([[0.0, 0.0], [100.0, -2.0]])
    each = torch.tensor([[0.6931472, 0.6931472], [0.0, 2.1269280]])
    assert float(filter_loss(logits, examples, False)) == pytest.approx(float(each.mean()))
    assert float(filter_loss(logits, examples, True)) == pytest.approx(float(each[masked].mean()))
    told = judge(torch.tensor([[3.0, -3.0], [9.0, -3.0]]), examples, 0.9)
    assert told == {"accepted_of_wrong": 0.0, "accepted_of_right": 0.5}


def test_the_published_network() -> None:
    """I14: two layers of 32."""
    assert sum(parameter.numel() for parameter in FilterNetwork(32, 2, 32, "relu").parameters()) == 2112
    assert FilterNetwork(8, 1, 8, "gelu")(torch.rand(3, 8)).shape == (3, 8)
    assert len(FilterNetwork(8, 4, 5, "gelu").layers) == 4


def recipe_of(home: Path, **changes: Any) -> Recipe:
    tree = {
        "model": {"_component_": "fresh", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 192},
        "data": {"_component_": "stories", "size": 6, "heldout": 3, "batch_size": 3},
        "filter": {"block_length": 16, "masked_only": True},
        "trainer": {"max_steps": 20, "accelerator": "cpu", "validate_every": 5},
        "output": str(home / "out"),
        "export": str(home / "filter"),
    }
    return Recipe.from_tree({**tree, **changes})


def train(recipe: Recipe) -> Any:
    return run_filter_training(recipe, recipe.build(FilterRecipe))


def test_a_run_leaves_a_filter_that_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = train(recipe_of(tmp_path))
    read = load_filter(str(tmp_path / "filter"))
    assert all(torch.equal(a, b) for mine, other in zip(made.layers, read.layers, strict=True) for a, b in zip(mine, other, strict=True))
    card = json.loads((tmp_path / "filter" / "card.json").read_text())
    assert card["training"]["parameters"] == 2 * (16 * 16 + 16) and "accepted_of_wrong_at_0.96" in card["metrics"]
    assert "block_length=16" in (tmp_path / "filter" / "README.md").read_text()
    from dllm_toolkit.models.fresh import fresh

    model = fresh(tokenizer="stories", width=16, layers=1, heads=2, mlp_width=32, max_positions=192).eval().requires_grad_(False)
    output = decode(model, learn2pd(read), [[5, 6, 7]], max_new_tokens=20)
    assert output.stats.nfe[0] <= 20
    with pytest.raises(ValueError, match="another model"):
        decode(tiny_transformer(), learn2pd(read), [[5, 6, 7]], max_new_tokens=20)

    # The same command again: what was decoded is kept, and the weights come out the same.
    capsys.readouterr()
    kept = (tmp_path / "out" / "examples.safetensors").stat().st_mtime_ns
    again = train(recipe_of(tmp_path))
    assert (tmp_path / "out" / "examples.safetensors").stat().st_mtime_ns == kept and "slowly" not in capsys.readouterr().err
    assert torch.equal(again.layers[0][0], made.layers[0][0])
    with pytest.raises(TrainError, match="belongs to another recipe"):
        train(recipe_of(tmp_path, seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": {"block_length": 0}}, "block_length must be at least 1"),
        ({"filter": {"layers": 0}}, "layers must be at least 1"),
        ({"filter": {"hidden": 0}}, "hidden must be at least 1"),
        ({"trainer": {"max_steps": 0}}, "max_steps must be at least 1"),
        ({"trainer": {"validate_every": 0}}, "validate_every must be at least 1"),
        ({"data": {"_component_": "stories", "size": 6, "heldout": 3, "batch_size": 3, "answer_length": 120}}, "do not fit the model"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe_of(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_alternating_data_gives_the_examples_of_all_its_parts(tmp_path: Path) -> None:
    parts = [{"_component_": "stories", "size": size, "heldout": 3, "batch_size": 3} for size in (6, 4)]
    parts[1] |= {"answer_length": 96}
    counts = []
    for name, data in (("one", parts[0]), ("other", parts[1]), ("both", {"_component_": "alternating", "parts": parts})):
        train(recipe_of(tmp_path / name, data=data, trainer={"max_steps": 1, "accelerator": "cpu"}))
        counts.append(len(load_file(tmp_path / name / "out" / "examples.safetensors")["train.confidence"]))
    assert counts[0] > 0 and counts[1] > 0 and counts[2] == counts[0] + counts[1]


def test_prompts_in_another_models_tokens_are_refused(tmp_path: Path) -> None:
    model = load("asset:teacher")
    model.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = list(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(TrainError, match="the data's tokens are not the model's"):
        train(recipe_of(tmp_path, model={"_component_": "load", "path": str(tmp_path / "other")}))
