"""`dllm-toolkit train recipe.yaml` for a recipe with `policy`: rollouts, rewards, updates; accuracy before and after on held-out problems.

    for each iteration:
        sample a group of answers to each of a batch of problems       training/rollouts.py
        draw the views once for each update; score them under the old and the reference policy
        for each update: score them under the present policy, clipped surrogate, one optimiser step       training/policy.py

Everything random comes from (seed, iteration, update), so a killed run continues with the rollouts and views it would have had. The model
stays in evaluation mode: dropout would make the three policies three different models. A group that teaches nothing and an update whose
gradient is not finite are skipped and counted. One device.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.base import Decoder, check
from dllm_toolkit.evaluation.tasks import Grade, Task
from dllm_toolkit.models.base import Model
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.recipe import Lazy, Recipe
from dllm_toolkit.training import shared
from dllm_toolkit.training.callbacks import cut_log
from dllm_toolkit.training.checkpoint import digest, frozen, keep_what_is_trained, resumed
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.data import fold
from dllm_toolkit.training.estimators import Views, packed, score
from dllm_toolkit.training.export import export, write_training_card
from dllm_toolkit.training.lora import Lora, adapter_off
from dllm_toolkit.training.optim import AdamW, Constant, LearningRate, OptimizerRecipe
from dllm_toolkit.training.policy import PolicyGradient, surrogate
from dllm_toolkit.training.rollouts import Pool, Reward, Rollouts, collect
from dllm_toolkit.training.sampler import Precision, Sampler
from dllm_toolkit.training.shared import TrainError, placed, say
from dllm_toolkit.training.verify import Evaluation, before, compared, evaluated, share

_ROLLOUT, _VIEWS = 3, 4
HOPELESS = 20
"""A run whose first so many iterations taught nothing ends there."""


@dataclass(frozen=True)
class Sampling:
    """Each iteration's rollouts: `group` answers of max_new_tokens to each of `problems` problems, decoded as one batch.

    dtype: precision of the copy of the policy that decodes, see sampler.py; None: the policy itself. compile: as `decode` has it; it takes
    a minute at first, and pays in runs of many minutes.
    """

    problems: int = 64
    group: int = 8
    max_new_tokens: int = 80
    dtype: Precision | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        shared.check_counts(self, "problems", "max_new_tokens")
        shared.check_counts(self, "group", least=2)


@dataclass(frozen=True)
class PolicyTrainer:
    """How long and where. The run ends after `iterations` or max_minutes of training, whichever comes first.

    sequences: most rows that go through the model at once in an update (rollouts are always one batch). precision bf16: of the updates.
    """

    iterations: int | None = None
    max_minutes: float | None = None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    gradient_clip: float = 0.2
    sequences: int = 512
    log_every: int = 1
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        if self.iterations is None and self.max_minutes is None:
            raise TrainError("the run has no end, got neither iterations nor max_minutes. Write trainer: {iterations: 100}.")
        shared.check_counts(self, "iterations", "sequences", "log_every", "checkpoint_every")
        shared.check_amounts(self, "max_minutes", "gradient_clip")
        shared.check_device(self.accelerator)


@dataclass(frozen=True)
class PolicyRecipe:
    """The root of a recipe that trains a model on rewards.

    task: problems to learn from; decoder (with a temperature) and cache sample the rollouts. evaluation: held-out problems, decoded before
    and after; output/result.json has both and the paired difference. lora: train an adapter; the reference is the model without it.
    """

    model: Lazy[Model]
    task: Task
    policy: PolicyGradient
    decoder: Decoder
    output: Path
    cache: Cache = field(default_factory=NoCache)
    rollouts: Sampling = Sampling()
    reward: Reward = Reward()
    evaluation: Evaluation | None = None
    optimizer: OptimizerRecipe = AdamW(learning_rate=1e-4, weight_decay=0.0, betas=(0.9, 0.99))
    schedule: LearningRate = Constant()
    trainer: PolicyTrainer = field(default_factory=lambda: PolicyTrainer(iterations=100))
    lora: Lora | None = None
    export: Path | None = None
    summary: str = "A model trained on verifiable rewards with dllm_toolkit."
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lora is not None and self.policy.sync_every is not None and self.policy.needs_reference:
            raise TrainError(
                f"with lora the reference is the model without its adapter and cannot follow, got sync_every={self.policy.sync_every}. "
                "Write sync_every: null in the policy."
            )
        shared.check_seed(self.seed)


class PolicyModule(pl.LightningModule):
    """One training step is one iteration: rollouts, then `policy.updates` optimiser steps on them."""

    def __init__(
        self, model: Transformer, built: PolicyRecipe, pool: Pool, judge: Pool | None = None, base: str | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.built, self.pool, self.judge, self.base = model, built, pool, judge, base
        if base is not None:
            keep_what_is_trained(self)
        self.sampler = Sampler(model, built.rollouts.dtype)
        # A part of the module, so that a reference that follows is in the checkpoint.
        keeps = built.policy.needs_reference and built.lora is None
        self.reference = copy.deepcopy(model).requires_grad_(False) if keeps else None
        self.iteration, self.elapsed = 0, 0.0
        self.counts = {"updates": 0, "groups": 0, "unsolved_groups": 0, "equal_groups": 0, "skipped_updates": 0}
        self.told: dict[str, float] = {}
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier processes of the run included."""
        return self.elapsed + (0.0 if self._started is None else time.monotonic() - self._started)

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return shared.progress(self.iteration, self.built.trainer.iterations, self.seconds, self.built.trainer.max_minutes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.built.optimizer.begin(self.model.named_parameters(), self.device)

    def on_train_start(self) -> None:
        self.train(False)
        self._started = time.monotonic()
        self.trainer.should_stop = self.progress >= 1.0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The next iteration. Its number is the module's own: Lightning fetches batches ahead."""
        built, policy, begun, number = self.built, self.built.policy, time.monotonic(), self.iteration
        chosen = self.pool.draw(number, built.rollouts.problems, built.seed)
        rollouts, told = collect(self.sampler.follow(), self.pool, chosen, built, fold(built.seed, _ROLLOUT, number))
        sampled = time.monotonic()
        for name in ("groups", "unsolved_groups", "equal_groups"):
            self.counts[name] += int(told[name])
        if len(rollouts.tokens):
            told |= self.learn(rollouts, number)
        self.iteration = number + 1
        if policy.sync_every is not None and self.reference is not None and self.iteration % policy.sync_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.told = {**told, "seconds_of_rollouts": sampled - begun, "seconds_of_updates": time.monotonic() - sampled, **self.held_out()}

    def held_out(self) -> dict[str, float]:
        """Shares exact and correct of the first held-out problems, every so many iterations; decoded as rollouts are, by the copy."""
        how = self.built.evaluation
        if self.judge is None or how is None or how.every is None or self.iteration % how.every:
            return {}
        grades, _ = evaluated(how, self.sampler.follow(), self.judge, self.built.seed, how.sample)
        return {f"held_out_{what}": share(grades, what) for what in ("exact", "correct")}

    # ---- learning

    def learn(self, rollouts: Rollouts, iteration: int) -> dict[str, float]:
        """All updates on one set of rollouts. Returns means over them of what there is to read."""
        policy = self.built.policy
        plan = []
        for update in range(policy.updates):
            if update and not policy.estimator.random:
                plan.append(plan[0])
                continue
            generator = torch.Generator(self.device).manual_seed(fold(self.built.seed, _VIEWS, iteration, update))
            views = policy.estimator.views(rollouts, self.model.spec, generator)
            # In the first update the present policy is the old one, and what it says of these views serves later updates that see them too.
            old = self.scores("old", rollouts, views) if update else None
            plan.append((views, old, self.scores("reference", rollouts, views) if policy.needs_reference else None))
        found, begun = [], None
        for views, old, reference in plan:
            told, scores = self.update(rollouts, views, begun if old is None else old, reference)
            found.append(told)
            begun = scores if begun is None else begun
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    @torch.no_grad()
    def scores(self, role: Literal["old", "reference"], rollouts: Rollouts, views: Views) -> Tensor:
        """The frozen scores [B, L] of these views: of the policy as it is now, or of the reference."""
        model = self.reference if role == "reference" and self.reference is not None else self.model
        off = adapter_off(self.model) if role == "reference" and self.built.lora is not None else nullcontext()
        with off:
            return torch.cat([self._score(model, rollouts, views, rows) for rows in packed(views, self.built.trainer.sequences)])

    def _score(self, model: Transformer, rollouts: Rollouts, views: Views, rows: slice) -> Tensor:
        # A context for each forward: autocast would go on using weights that it cast before the last update, or without gradients.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.built.trainer.precision == "bf16-mixed"):
            return score(model, rollouts, views, rows)

    def update(self, rollouts: Rollouts, views: Views, old: Tensor | None, reference: Tensor | None) -> tuple[dict[str, float], Tensor]:
        """One optimiser step, in as many backward passes as `sequences` asks for; none if the gradient is not finite.

        old None: the present policy is the one that sampled. Returns what there is to read, and the scores [B, L] before the step.
        """
        policy, optimizer = self.built.policy, self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        shares = policy.shares(rollouts, views)
        totals, scores = torch.zeros(3, device=self.device), []
        for rows in packed(views, self.built.trainer.sequences):
            current = self._score(self.model, rollouts, views, rows)
            scores.append(current.detach())
            before = scores[-1] if old is None else old[rows]
            away = before if policy.penalty == "old" else None if reference is None else reference[rows]
            part = surrogate(current, before, away if policy.beta else None, rollouts.advantage[rows], policy.clip, policy.beta)
            loss = (part.loss * shares[rows]).sum()
            self.manual_backward(loss)
            with torch.no_grad():
                seen = torch.stack([loss, (part.k3 * shares[rows]).sum(), (part.clipped * shares[rows]).sum()])
                totals += seen.to(totals.dtype)
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.built.trainer.gradient_clip, foreach=True))
        finite = norm - norm == 0.0  # neither infinite nor NaN
        if finite:
            self.built.schedule.set(optimizer, self.counts["updates"], self.progress)
            optimizer.step()  # type: ignore[union-attr]
        self.counts["updates" if finite else "skipped_updates"] += 1
        loss, k3, clipped = totals.tolist()
        return {"loss": loss, "k3": k3, "clipped": clipped, "gradient_norm": norm}, torch.cat(scores)

    # ---- after each iteration

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        settings, output = self.built.trainer, self.built.output
        over = self.progress >= 1.0 or (self.iteration == HOPELESS and not self.counts["updates"])
        if self.iteration % settings.log_every == 0 or "held_out_exact" in self.told or over:
            shown = {**self.told, **self.counts, "seconds": self.seconds}
            self.trainer.logger.log_metrics({f"train/{name}": value for name, value in shown.items()}, self.iteration)  # type: ignore[union-attr]
            with (output / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"iteration": self.iteration, **shown}) + "\n")
            say(f"iteration {self.iteration:>5}  " + "  ".join(f"{name} {value:.4g}" for name, value in self.told.items()))
        if self.iteration % settings.checkpoint_every == 0:
            self.trainer.save_checkpoint(output / "last.ckpt")
        self.trainer.should_stop = self.trainer.should_stop or over

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dllm_toolkit"] = {"iteration": self.iteration, "elapsed": self.seconds, "counts": self.counts, "base": self.base}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["dllm_toolkit"]
        self.iteration, self.elapsed, self.counts = own["iteration"], own["elapsed"], own["counts"]
        cut_log(self.built.output / "metrics.jsonl", "iteration", self.iteration)


class Endless:
    """A loader of nothing: an iteration makes its own data, with the policy as it is then."""

    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(0)


def run_policy_training(recipe: Recipe, built: PolicyRecipe) -> PolicyModule:
    """Evaluate, train on rewards (resuming from `output/last.ckpt` of the same recipe), evaluate again, export.

    Raises TrainError if `output` belongs to another recipe, or if no rollout of the whole run taught anything.
    """
    checkpoint = shared.owned(built.output, recipe)
    shared.check_export(recipe, built.export)
    device = torch.device("cuda" if built.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    model, pool = _prepare(recipe, built)
    base = digest(frozen(model))
    resumed(checkpoint, model, base)
    judge = None
    if built.evaluation is not None:
        with placed(recipe, "evaluation"):
            check(model.spec, built.evaluation.decoder, built.evaluation.cache)
            judge = Pool(built.evaluation.task, model, built.rollouts.max_new_tokens)
    shared.claim(built.output, recipe)
    pl.seed_everything(built.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    module = PolicyModule(model.to(device), built, pool, judge, base)
    earlier = [] if judge is None or built.evaluation is None else before(built.evaluation, module.model, judge, built.seed, built.output)
    trainer = shared.one_device(built.output, "gpu" if device.type == "cuda" else "cpu", max_epochs=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found .* in eval mode")  # on purpose
        shared.fit(trainer, module, Endless(), checkpoint)
    trainer.save_checkpoint(built.output / "last.ckpt")
    _finish(recipe, built, module.to(device), earlier)
    return module


def _prepare(recipe: Recipe, built: PolicyRecipe) -> tuple[Transformer, Pool]:
    """The model as it is trained, and the prompts; everything that can be refused is refused here."""
    model = shared.trainable(recipe, built.model)
    with placed(recipe, "decoder"):
        check(model.spec, built.decoder, built.cache)
    with placed(recipe, "policy"):
        built.policy.check(model.spec, built.decoder)
    with placed(recipe, "task"):
        pool = Pool(built.task, model, built.rollouts.max_new_tokens)
        pool.draw(0, built.rollouts.problems, built.seed)
    model.to(torch.float32 if built.lora is None else getattr(torch, built.lora.frozen)).eval().requires_grad_(True)
    if built.lora is not None:
        shared.adapt(recipe, model, built.lora, built.model, built.seed).eval()
    return model, pool


def _finish(recipe: Recipe, built: PolicyRecipe, module: PolicyModule, earlier: Sequence[Grade]) -> None:
    counts = module.counts
    say("  ".join(f"{name} {value}" for name, value in counts.items()) + f"  {module.seconds:.0f} s")
    if not counts["updates"]:
        raise TrainError(
            f"nothing was learned, got {counts['groups']} groups of rollouts: {counts['unsolved_groups']} without a right answer, "
            f"{counts['equal_groups']} with equal rewards, and {counts['skipped_updates']} updates that were not finite. The weights are "
            "those of the start; nothing was exported. Write a larger group, an easier task, or a better model."
        )
    result: dict[str, Any] = {"counts": counts, "iterations": module.iteration, "seconds": round(module.seconds, 1)}
    batch = None
    if module.judge is not None and built.evaluation is not None:
        after, batch = evaluated(built.evaluation, module.model, module.judge, built.seed)
        result |= compared(earlier, after)
        for what in ("exact", "correct"):
            one = result[what]
            say(
                f"{what}: {one['before']:.1%} -> {one['after']:.1%}, {100 * one['difference']:+.1f} points, 95 % interval "
                f"{100 * one['interval'][0]:+.1f} to {100 * one['interval'][1]:+.1f}, {result['problems']} held-out problems"
            )
    (built.output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if built.export is None:
        return
    if batch is None:
        chosen = module.pool.draw(0, built.rollouts.problems, built.seed)
        output, _ = module.pool.answer(module.model, chosen, built.decoder, built.cache, [0] * len(chosen))
        batch = Batch(output.canvas, output.begin, module.pool.max_new_tokens)
    spec = module.model.spec
    report = export(module.model, built.export, batch, attention=spec.attention, block_size=spec.block_size)
    write_training_card(
        built.export,
        recipe,
        summary=built.summary,
        training={
            "trained_parameters": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
            "seed": built.seed,
            "task": repr(built.task),
            "policy": repr(built.policy),
            "iterations": module.iteration,
            **counts,
            "seconds": round(module.seconds, 1),
        },
        metrics={**{k: result[k] for k in ("exact", "correct") if k in result}, **({"float16_export": report} if report else {})},
        device=module.device,
    )
    say(f"exported to {built.export}")
