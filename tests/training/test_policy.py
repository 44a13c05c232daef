"""Policy gradients against closed forms: signs, estimators, views; groups and rewards; whole runs that learn, skip, and continue."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_toolkit import decode as decoding
from dllm_toolkit import graphs
from dllm_toolkit.cache.policies import BlockCausalCache
from dllm_toolkit.decode import decode, trace
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.decoders.wino import wino
from dllm_toolkit.evaluation.tasks import Grade, Problem, Task
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.testing.models import EOS, MASK, tiny_transformer
from dllm_toolkit.testing.record import unequal
from dllm_toolkit.training import policy as policies
from dllm_toolkit.training.estimators import Coupled, Estimator, OneStep, PolicyError, Rounds, Trajectory, Views, packed, score
from dllm_toolkit.training.lora import Lora, inject
from dllm_toolkit.training.policy import PolicyGradient, surrogate
from dllm_toolkit.training.reinforce import PolicyModule, PolicyRecipe, run_policy_training
from dllm_toolkit.training.rollouts import Diary, Reward, Rollouts, advantages, rollouts_of
from dllm_toolkit.training.run import TrainError, TrainRecipe, run_training
from dllm_toolkit.training.sampler import Sampler

PROMPTS = unequal().prompts
LENGTH, BLOCK = 10, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rolled(model: Transformer, decoder: Any, after_end: bool = False, **more: Any) -> Rollouts:
    diary = Diary()
    output = decode(model, decoder, PROMPTS, max_new_tokens=LENGTH, seed=3, callback=diary, **more)
    return rollouts_of(output, diary, LENGTH, model.spec.eos_ids, torch.ones(len(PROMPTS)), after_end)


def test_what_lies_behind_the_answers_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas of a compiled decode is longer than the answers, maybe than the model's positions: no view reads there."""
    model, decoder = tiny_transformer(), semi_ar(block_length=4, temperature=1.0)
    exact = rolled(model, decoder)
    begin_state = decoding.begin_state
    monkeypatch.setattr(decoding, "begin_state", lambda *a, length, **k: begin_state(*a, length=length + 70, **k))
    padded = rolled(model, decoder)
    assert all(torch.equal(one, other) for one, other in zip(exact, padded, strict=True) if isinstance(one, Tensor))  # type: ignore[arg-type]


# --- the surrogate


def test_the_surrogate_at_ratio_one_is_reinforce() -> None:
    """T22: the loss falls where A > 0 as log p rises, with slope A exactly, whatever the clip."""
    current = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    advantage = torch.tensor([2.0, -1.0])
    surrogate(current, current.detach(), None, advantage, 0.2, 0.0).loss.sum().backward()
    assert torch.equal(current.grad, torch.tensor([[-2.0, -2.0], [1.0, 1.0]]))  # type: ignore[arg-type]


def test_the_clip_holds_on_one_side_only() -> None:
    """No gain beyond 1 + e where A > 0, none below 1 - e where A < 0; the way back always has its gradient."""
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 0.9]])
    current = ratio.log().requires_grad_(True)
    found = surrogate(current, torch.zeros_like(ratio), None, torch.tensor([1.0, -1.0]), 0.2, 0.0)
    assert torch.allclose(found.loss, torch.tensor([[-1.2, -0.5, -1.1], [1.5, 0.8, 0.9]]))
    assert found.clipped.tolist() == [[True, False, False], [False, True, False]]
    found.loss.sum().backward()
    assert torch.allclose(current.grad, torch.tensor([[0.0, -0.5, -1.1], [1.5, 0.0, 0.9]]))  # type: ignore[arg-type]


def test_the_penalty_is_the_k3_estimator() -> None:
    """exp(d) - d - 1, d = reference - current: 0 and flat where they agree, above 0 elsewhere, KL(current || reference) on average."""
    current = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    found = surrogate(current, current.detach(), torch.tensor([[-1.0, -0.5, -2.0]]), torch.zeros(1), 0.2, 0.1)
    assert torch.allclose(found.k3, torch.tensor([[0.0, 0.148721, 0.367879]]), atol=1e-6)
    found.loss.sum().backward()
    assert torch.allclose(current.grad, 0.1 * (1 - torch.tensor([[0.0, 0.5, -1.0]]).exp()))  # type: ignore[arg-type]
    ours, theirs = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    k3 = surrogate(ours.log()[None], ours.log()[None], theirs.log()[None], torch.zeros(1), 0.2, 1.0).k3
    assert torch.allclose((ours * k3).sum(), (ours * (ours / theirs).log()).sum())


# --- the gradient of the expected reward, by enumeration

WORDS = 4  # of the vocabulary, the tokens that the enumerated policy may say


def small_model() -> Transformer:
    """Five tokens, one of them the mask."""
    config = replace(tiny_transformer(1).config, vocab_size=WORDS + 1, mask_id=WORDS, eos_ids=(), pad_id=0)
    torch.manual_seed(0)
    return Transformer(config).double().eval()


def direction(model: Transformer, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("length", [1, 2])
def test_the_expected_update_is_the_gradient_of_the_expected_reward(length: int) -> None:
    """Enumerated over all answers that a left-to-right decoder can give; for one token every estimator is exact."""
    model = small_model()
    answers = torch.tensor(list(itertools.product(range(WORDS), repeat=length)))
    rows, prompt = len(answers), torch.tensor([[1, 2]])
    tokens = torch.cat((prompt.expand(rows, -1), answers), dim=1)
    born = torch.tensor([-1, -1, *range(length)]).expand(rows, -1)
    reward = torch.rand(rows, generator=generator(), dtype=torch.float64)
    rollouts = Rollouts(tokens, torch.full((rows,), 2), length, tokens, born, born >= 0, torch.zeros(rows))

    def probability() -> Tensor:
        """p(o_1 | M M) p(o_2 | o_1 M), written out."""
        total = torch.ones(rows, dtype=torch.float64)
        for place in range(length):
            seen = tokens.clone()
            seen[:, 2 + place :] = WORDS
            logits = model.logits(seen)[:, 2 + place, :WORDS]
            total = total * logits.softmax(-1).gather(1, answers[:, place : place + 1]).squeeze(1)
        return total

    p = probability()
    assert torch.allclose(p.sum(), torch.ones((), dtype=torch.float64))
    exact = direction(model, (p * reward).sum())
    p = p.detach()
    value = (p * reward).sum()
    exact_estimators: list[Estimator] = [Trajectory(1)] if length > 1 else [Trajectory(1), OneStep(0.0), Coupled(weighted=False)]
    for estimator in exact_estimators:
        rule = PolicyGradient(estimator, clip=0.2, share="response")
        sampled = rollouts._replace(advantage=(reward - value) * p * rows)  # each answer as often as it is sampled
        views = estimator.views(sampled, model.spec, generator())
        current = score(model, sampled, views)
        found = surrogate(current, current.detach(), None, sampled.advantage, rule.clip, 0.0)
        loss = (found.loss * rule.shares(sampled, views)).sum()
        # The share divides by the answer's length; a step of gradient descent climbs the reward.
        assert torch.allclose(-direction(model, loss) * length, exact, atol=1e-10)
    if length > 1:
        views = OneStep(0.0).views(sampled, model.spec, generator())
        current = score(model, sampled, views)
        found = surrogate(current, current.detach(), None, sampled.advantage, 0.2, 0.0)
        assert not torch.allclose(-direction(model, (found.loss / rows).sum()), exact, atol=1e-4), "one-step scores are mean-field"


# --- views along the decoder's trace


def recorded(model: Transformer, decoder: Any, **more: Any) -> tuple[Rollouts, Tensor]:
    """Rollouts, and the log-probability of each token at the forward that decided it."""
    found = torch.zeros(len(PROMPTS), max(map(len, PROMPTS)) + LENGTH, dtype=torch.float64)
    for step in trace(model, decoder, PROMPTS, max_new_tokens=LENGTH, seed=3, **more):
        new = step.before.masked & ~step.after.masked & (step.after.born >= 0)
        for row, lane in itertools.product(range(len(PROMPTS)), range(step.asked.answer.positions.shape[1])):
            place = int(step.asked.answer.positions[row, lane])
            if place < new.shape[1] and new[row, place]:
                logits = step.asked.answer.logits[row, lane].clone()
                logits[MASK] = -torch.inf
                found[row, place] = logits.log_softmax(-1)[step.after.tokens[row, place]]
    return rolled(model, decoder, **more), found


@pytest.mark.parametrize("case", ["full", "full in parallel", "whole canvas", "pipelined", "rounds", "left to right"])
def test_the_trace_is_scored_as_it_was_sampled(case: str) -> None:
    """T7, I7: with one view a step the scores are the log-probabilities of the rollout, on rows of unequal length."""
    attention, shift = ("causal", 1) if case == "left to right" else ("full", 0)
    if case in ("rounds", "pipelined"):
        attention = "block_causal"
    model = tiny_transformer(2, attention, shift, block_size=BLOCK if attention == "block_causal" else None)  # type: ignore[arg-type]
    decoder, cache, estimator = semi_ar(BLOCK, temperature=1.0), None, Trajectory(1)
    if case == "full in parallel":
        decoder = semi_ar(BLOCK, steps=5, temperature=1.0)
    elif case == "whole canvas":
        decoder = vanilla(temperature=1.0, steps=6)
    elif case == "pipelined":
        decoder, cache = d2f(block_length=BLOCK, threshold=0.5, temperature=1.0), BlockCausalCache()
    elif case == "rounds":
        cache, estimator = BlockCausalCache(), Rounds(1)
    elif case == "left to right":
        decoder = autoregressive(temperature=1.0)
    rollouts, wanted = recorded(model, decoder, cache=cache)
    views = estimator.views(rollouts, model.spec, generator())
    found = score(model, rollouts, views)
    assert torch.allclose(found, wanted * rollouts.counted, atol=1e-9) and float(wanted.abs().sum()) > 1
    asked = (views.weight != 0).sum(0)
    assert torch.equal(asked, rollouts.counted.long()), "each token is scored once"
    if case == "rounds":
        assert len(views.tokens) <= BLOCK < max(map(len, PROMPTS)) + LENGTH
        # The same numbers from the states of the whole canvas, one at a time.
        single = score(model, rollouts, Trajectory(1).views(rollouts, model.spec, generator()))
        assert torch.allclose(found, single, atol=1e-9)
    if case == "left to right":
        logits = model.logits(rollouts.tokens).log_softmax(-1).gather(-1, rollouts.tokens.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(found, logits * rollouts.counted, atol=0.2), "the mask token alone is missing"


def test_merged_steps_and_tokens_behind_the_end() -> None:
    model = tiny_transformer()
    rollouts = rolled(model, vanilla(temperature=1.0), after_end=True)
    assert torch.equal(rollouts.counted, rollouts.batch.answer)
    views = Trajectory(4).views(rollouts, model.spec, generator())
    assert views.weight.sum((0, 2)).tolist() == [LENGTH] * 4 and views.weight.sum(2)[:, 0].tolist() == [4, 4, 2]
    assert [int((one == MASK).sum()) for one in views.tokens[:, 0]] == [10, 6, 2]
    shares = PolicyGradient(Trajectory(4), share="steps").shares(rollouts, views)
    assert torch.allclose(shares.sum(), torch.ones(()))
    assert torch.allclose(shares[views.weight[2] != 0], torch.tensor(1 / (2 * 3 * 4))), "a step of two tokens weighs as one of four"
    short = rolled(model, semi_ar(BLOCK, temperature=1.0))
    for row in range(4):
        words = short.tokens[row][short.counted[row]].tolist()
        ends = [place for place, word in enumerate(words) if word in model.spec.eos_ids]
        assert ends in ([], [len(words) - 1]), "nothing behind the first end of text"
    assert EOS in short.tokens[short.counted] or model.spec.eos_ids[1] in short.tokens[short.counted]


def test_estimators_reduce_to_each_other() -> None:
    """CJ-GRPO with one step, coupled masks of level 1, and TraceRL with one group are d1 with a clean prompt."""
    model = tiny_transformer()
    rollouts = rolled(model, semi_ar(BLOCK, temperature=1.0))
    wanted = score(model, rollouts, OneStep(0.0).views(rollouts, model.spec, generator()))
    for estimator in (Trajectory(LENGTH), Coupled(minimum=1.0, maximum=1.0), Coupled(2, 1.0, 1.0, weighted=False)):
        assert torch.allclose(score(model, rollouts, estimator.views(rollouts, model.spec, generator())), wanted)
    blocks = tiny_transformer(2, "block_causal", block_size=BLOCK)
    rollouts = rolled(blocks, semi_ar(BLOCK, temperature=1.0))
    found = score(blocks, rollouts, Rounds(BLOCK).views(rollouts, blocks.spec, generator()))
    for block in range(-(-LENGTH // BLOCK)):
        offset = torch.arange(rollouts.tokens.shape[1]) - rollouts.prompt_length.unsqueeze(1)
        here = (offset >= block * BLOCK) & (offset < min(LENGTH, (block + 1) * BLOCK))
        alone = Views(rollouts.tokens.masked_fill(here, MASK)[None], (here & rollouts.counted).float()[None])
        assert torch.allclose(found * here, score(blocks, rollouts, alone), atol=1e-9)


def test_coupled_masks_complete_each_other() -> None:
    """T5, I9: each token in one half of every pair; the published weights make the score 1.5 times a log-probability on average."""
    model = tiny_transformer()
    rollouts = rolled(model, vanilla(temperature=1.0), after_end=True)
    views = Coupled(pairs=2).views(rollouts, model.spec, generator())
    masked = (views.tokens == MASK) & rollouts.batch.answer
    assert torch.equal(masked[0], rollouts.batch.answer)
    for first in (1, 3):
        assert torch.equal(masked[first] ^ masked[first + 1], rollouts.batch.answer)
    draws = [Coupled().views(rollouts, model.spec, generator(seed)).weight.sum(0)[rollouts.counted].mean() for seed in range(200)]
    assert float(torch.stack(draws).mean()) == pytest.approx(1.5, abs=0.02)
    assert torch.allclose(Coupled(weighted=False).views(rollouts, model.spec, generator()).weight.sum(0)[rollouts.counted], torch.ones(()))


@pytest.mark.parametrize("estimator", [OneStep(0.3), Coupled(), Trajectory(2)])
def test_one_seed_gives_one_set_of_views(estimator: Estimator) -> None:
    """T1, T8: all policies score the same views, so the ratio is 1 before the first update; nothing outside the answer is scored."""
    model = tiny_transformer()
    rollouts = rolled(model, semi_ar(BLOCK, temperature=1.0))
    one, same, other = (estimator.views(rollouts, model.spec, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.tokens, same.tokens) and torch.equal(one.weight, same.weight)
    assert torch.equal(one.tokens, other.tokens) != estimator.random
    assert not bool(one.weight.any(0)[~rollouts.counted].any())
    hidden = (one.tokens == MASK).any(0) & ~rollouts.batch.answer
    assert bool(hidden.any()) == isinstance(estimator, OneStep) and not bool(hidden[~rollouts.batch.inside].any())
    whole, ratio = score(model, rollouts, one), []
    for rows in packed(one, 3):
        ratio.append((score(model, rollouts, one, rows) - whole[rows]).exp())
    assert torch.allclose(torch.cat(ratio), torch.ones(()).double(), atol=1e-9) and len(ratio) > 1


def test_packing_counts_views_with_a_question() -> None:
    weight = torch.zeros(3, 4, 2)
    weight[0], weight[1:, 2] = 1.0, 1.0
    views = Views(weight.long(), weight)
    assert [(one.start, one.stop) for one in packed(views, 3)] == [(0, 2), (2, 3), (3, 4)]
    assert [(one.start, one.stop) for one in packed(views, 100)] == [(0, 4)]


# --- groups and rewards


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert advantages(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]]
    assert torch.allclose(advantages(rewards, "leave_one_out")[1], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    assert torch.allclose(advantages(rewards, scale=True).std(1), torch.ones(2), atol=1e-3)
    assert advantages(rewards, negative=0.5).tolist() == [[0.5, -0.25, -0.25, 0.5], [0.75, -0.125, -0.125, -0.125]]


def test_a_reward_weighs_the_grade() -> None:
    grade = Grade(correct=True, steps_right=0.5, exact=False)
    assert Reward()(grade) == 1.0 and Reward(2.0, 4.0, 0.5)(grade) == 2.25
    with pytest.raises(ValueError, match="weights of a reward"):
        Reward(0.0)


# --- what decodes


def shaken(model: Transformer, seed: int) -> None:
    with torch.no_grad():
        for one in model.parameters():
            one += 0.1 * torch.randn(one.shape, generator=generator(seed), dtype=one.dtype)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_copy_follows_the_policy(adapter: bool) -> None:
    """In its own precision, at its own place, with what an adapter adds; head and embedding are one parameter or two."""
    model = Transformer(replace(tiny_transformer(1).config, tie_embeddings=True, qkv_bias=True)).eval()
    if adapter:
        inject(model, Lora(rank=2, alpha=4, targets=("q_proj", "down_proj")))
    sampler, tokens = Sampler(model, "bfloat16"), torch.tensor([PROMPTS[0]])
    copy = sampler.follow()
    places = [one.data_ptr() for one in copy.parameters()]
    for seed in (1, 2):
        shaken(model, seed)
        assert sampler.follow() is copy and [one.data_ptr() for one in copy.parameters()] == places
        with torch.no_grad():
            wanted, rounded = model.logits(tokens), copy.logits(tokens)
        assert rounded.dtype == torch.bfloat16 and not any("lora_" in name for name, _ in copy.named_parameters())
        assert torch.allclose(rounded.float(), wanted, atol=0.03 * float(wanted.abs().max()))
    assert Sampler(model, None).follow() is model
    merged = Sampler(model, "float32").follow()
    assert (merged is model) != adapter and torch.allclose(merged.logits(tokens), wanted, atol=1e-4)


def test_graphs_recorded_on_the_copy_stay_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every iteration replays what the first one recorded, with the weights of now."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = tiny_transformer(1).float()
    sampler, decoder = Sampler(model, "bfloat16"), semi_ar(BLOCK, temperature=1.0)
    with graphs.emulated():
        for seed in (1, 2):
            shaken(model, seed)
            found = decode(sampler.follow(), decoder, PROMPTS, max_new_tokens=LENGTH, compile=True)
            assert (found.stats.warm_up > 0) == (seed == 1)
            assert found.tokens == decode(Sampler(model, "bfloat16").follow(), decoder, PROMPTS, max_new_tokens=LENGTH).tokens


# --- whole runs


@dataclass(frozen=True)
class Digits(Task):
    """Say digits. `exact`: at least a third of the budget. never: no answer is right."""

    size: int = 16
    first: int = 0
    never: bool = False

    def problems(self) -> tuple[Problem, ...]:
        return tuple(Problem(f"p{one}", f"Question: Noah has {one + self.first} apples. Answer:", "1") for one in range(self.size))

    def grade(self, problem: Problem, text: str) -> Grade:
        found = sum(letter.isdigit() for letter in text)
        return Grade(correct=found > 0 and not self.never, steps_right=min(1.0, found / 6), exact=found >= 2)


def digits(**arguments: Any) -> dict:
    return {"_component_": f"{__name__}.Digits", **arguments}


SAMPLER = {"_component_": "semi_ar", "block_length": 3, "temperature": 1.0}


def recipe_of(home: Path, **changes: Any) -> Recipe:
    tree = {
        "model": {"_component_": "fresh", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 64},
        "task": digits(),
        "policy": "trace_rl",
        "decoder": SAMPLER,
        "rollouts": {"problems": 4, "group": 8, "max_new_tokens": 6},
        "reward": {"correct": 0.0, "steps_right": 1.0},
        "evaluation": {"task": digits(size=40, first=100), "decoder": SAMPLER},
        "optimizer": {"_component_": "adamw", "learning_rate": 0.01, "weight_decay": 0.0},
        "trainer": {"iterations": 12, "accelerator": "cpu", "checkpoint_every": 5},
        "output": str(home / "out"),
    }
    return Recipe.from_tree({**tree, **changes})


def train(recipe: Recipe) -> PolicyModule:
    return run_policy_training(recipe, recipe.build(PolicyRecipe))


def weights(module: PolicyModule) -> list[Tensor]:
    return [one.detach().clone() for one in module.model.parameters()]


def test_a_run_raises_the_reward_and_says_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts = {"problems": 4, "group": 8, "max_new_tokens": 6, "dtype": "bfloat16"}
    evaluation = {"task": digits(size=40, first=100), "decoder": SAMPLER, "every": 6, "sample": 40}
    module = train(recipe_of(tmp_path, rollouts=rollouts, evaluation=evaluation, export=str(tmp_path / "model")))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["exact"]["verdict"] == "raises" and result["exact"]["interval"][0] > 0.03 and result["problems"] == 40
    assert module.counts["updates"] == result["iterations"] == 12 and module.counts["groups"] == 48
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 13)) and lines[-1]["reward"] > lines[0]["reward"]
    held_out = [line["held_out_exact"] for line in lines if "held_out_exact" in line]
    assert len(held_out) == 2 and held_out[-1] == pytest.approx(result["exact"]["after"], abs=0.1)
    assert all(0 < line["taught"] <= 1 for line in lines)
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    assert card["metrics"]["exact"]["after"] == result["exact"]["after"] and "exact: " in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_stopped_run_continues_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what follows along: a reference that became the policy of iteration 1."""
    changes: dict[str, Any] = {
        "policy": {"_component_": "coupled_grpo", "sync_every": 1},
        "evaluation": None,
        "trainer": {"iterations": 3, "accelerator": "cpu", "checkpoint_every": 1},
    }
    whole = train(recipe_of(tmp_path / "whole", **changes))
    finished = PolicyModule.on_train_batch_end

    def dies(self: PolicyModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        finished(self, outputs, batch, batch_idx)
        if self.iteration == 2:
            raise OSError("killed")

    monkeypatch.setattr(PolicyModule, "on_train_batch_end", dies)
    with pytest.raises(OSError, match="killed"):
        train(recipe_of(tmp_path / "parts", **changes))
    monkeypatch.setattr(PolicyModule, "on_train_batch_end", finished)
    parts = train(recipe_of(tmp_path / "parts", **changes))
    assert parts.counts == whole.counts
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(parts), strict=True))
    lines = [json.loads(line)["iteration"] for line in (tmp_path / "parts" / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]


def test_groups_without_a_lesson_are_left_out_and_counted(tmp_path: Path) -> None:
    """And a run in which every group is left out ends early, with an error that says why."""
    changes = {"trainer": {"iterations": 99, "accelerator": "cpu"}, "rollouts": {"problems": 1, "group": 2, "max_new_tokens": 2}}
    with pytest.raises(TrainError, match=r"got 20 groups of rollouts: 20 without a right answer, 0 with equal rewards"):
        train(recipe_of(tmp_path, task=digits(never=True), evaluation=None, export=str(tmp_path / "model"), **changes))
    assert not (tmp_path / "model").exists()


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T27: one poisoned batch changes no weight, and the run goes on."""
    calls = itertools.count()

    def poisoned(rewards: Tensor, *rest: Any) -> Tensor:
        return advantages(rewards, *rest) * (float("nan") if next(calls) == 1 else 1.0)

    monkeypatch.setattr("dllm_toolkit.training.rollouts.advantages", poisoned)
    module = train(recipe_of(tmp_path, evaluation=None, trainer={"iterations": 3, "accelerator": "cpu"}))
    assert module.counts["skipped_updates"] == 1 and module.counts["updates"] == 2
    assert all(bool(one.isfinite().all()) for one in weights(module))


def test_an_adapter_learns_and_its_base_is_the_reference(tmp_path: Path) -> None:
    """In bf16: weights that autocast has cast already must not outlive an update, or k3 would be 0 until the next iteration."""
    trainer = {"iterations": 1, "accelerator": "cpu", "precision": "bf16-mixed"}
    module = train(recipe_of(tmp_path, policy={"_component_": "d1", "updates": 3}, lora={"rank": 2}, evaluation=None, trainer=trainer))
    assert module.reference is None and module.told["k3"] > 1e-6
    trained = [name for name, one in module.model.named_parameters() if one.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_small_passes_give_the_gradient_of_one(tmp_path: Path) -> None:
    """T29: shares are of the whole batch, not of a pass."""
    found = []
    for sequences in (1000, 3):
        changes = {"trainer": {"iterations": 1, "accelerator": "cpu", "sequences": sequences}, "evaluation": None, "policy": "coupled_grpo"}
        found.append(train(recipe_of(tmp_path / str(sequences), **changes)).told["gradient_norm"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    trainer = {"iterations": 12, "accelerator": "gpu", "precision": "bf16-mixed"}
    rollouts = {"problems": 4, "group": 8, "max_new_tokens": 6, "dtype": "bfloat16", "compile": True}
    train(recipe_of(tmp_path, policy={"_component_": "trace_rl", "updates": 2}, trainer=trainer, rollouts=rollouts))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["exact"]["interval"][0] > 0


@pytest.mark.parametrize("measure", ["accuracy", "exact"])
def test_training_can_stop_at_an_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str) -> None:
    """How the under-trained teacher is made: the callback ends the run, and ends it again when it is started again."""
    monkeypatch.setattr(f"dllm_toolkit.training.data.{'_graded' if measure == 'accuracy' else '_exact'}", lambda problem, text: True)
    judge = {"_component_": "decode", "decoder": "semi_ar", "every": 2, "problems": 1, "max_new_tokens": 2}
    judge |= {"stop_at": 0.5, "measure": measure}
    tree = {
        "model": {"_component_": "fresh", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 192},
        "data": {"_component_": "stories", "size": 8, "heldout": 2, "batch_size": 2},
        "objective": "masked_diffusion",
        "trainer": {"max_steps": 9, "accelerator": "cpu", "validate_every": 0},
        "callbacks": [judge],
        "output": str(tmp_path / "out"),
    }
    recipe = Recipe.from_tree(tree)
    assert [run_training(recipe, recipe.build(TrainRecipe)).batches for _ in range(2)] == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": "semi_ar"}, "policy: .*temperature 0"),
        ({"decoder": {"_component_": "remdm_loop", "temperature": 1.0}}, "changes what it decided"),
        ({"policy": {"_component_": "trace_rl", "rounds": True}}, "policy: .*block-causal"),
        ({"policy": {"_component_": "trace_rl", "clip": 1.5}}, "clip must lie in"),
        ({"policy": {"_component_": "trace_rl", "negative": -1.0}}, "negative must be 0 or more"),
        ({"policy": {"_component_": "trace_rl", "shrink": 0}}, "shrink must be at least 1"),
        ({"policy": "coupled_grpo", "lora": {"rank": 2}}, "sync_every"),
        ({"rollouts": {"problems": 99, "max_new_tokens": 6}}, "task: .*fewer problems"),
        ({"rollouts": {"group": 1}}, "group must be at least 2"),
        ({"rollouts": {"max_new_tokens": 60}}, "task: .*too long"),
        ({"task": {"_component_": "infilling", "size": 4}}, "task: "),
        ({"trainer": {}}, "neither iterations nor max_minutes"),
        ({"trainer": {"iterations": 1, "gradient_clip": 0}}, "gradient_clip must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe_of(tmp_path, **change))
    assert not (tmp_path / "out").exists()


def test_wino_has_no_trace() -> None:
    with pytest.raises(PolicyError, match="changes what it decided"):
        policies.cj_grpo().check(tiny_transformer().spec, replace(wino(BLOCK), propose=semi_ar(temperature=1.0).propose))
