"""Rollouts for reinforcement learning: sampled answers in groups, verifiable rewards, and what each answer is worth within its group.

    problems --decode()--> G answers each --task.grade--> rewards r [P, G] --> advantages A [P, G] --> the groups that teach something

Any decoder, cache and task will do: answers come from the batched `decode()` with a seed for every row, and are cut and graded by the
code that evaluation uses. A group whose rewards are all equal has no advantage, and one without a right answer would only teach the
model to be wrong in another way; both are left out and counted.

References: GRPO (arXiv 2402.03300) for groups; Dr. GRPO (arXiv 2503.20783) for advantages that are not divided by the deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import Output, check_prompts, decode
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.measure import judged
from dllm_toolkit.evaluation.tasks import Grade, Task
from dllm_toolkit.state import State
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.data import fold

if TYPE_CHECKING:
    from dllm_toolkit.training.reinforce import PolicyRecipe

Baseline = Literal["mean", "leave_one_out"]


class RolloutError(ToolkitError):
    """Problems or rewards that reinforcement learning cannot use."""


@dataclass(frozen=True)
class Reward:
    """reward = correct [the final answer is right] + exact [the answer is the reference] + steps_right (share of right steps).

    The three arguments are the weights of what a task's grader says (see `Grade`).
    """

    correct: float = 1.0
    exact: float = 0.0
    steps_right: float = 0.0

    def __post_init__(self) -> None:
        weights = {one.name: getattr(self, one.name) for one in fields(self)}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise RolloutError(
                f"the weights of a reward must be 0 or more, and one of them above 0, got {weights}. Nothing right would be rewarded. "
                "Write reward: {correct: 1.0}."
            )

    def __call__(self, grade: Grade) -> float:
        return self.correct * grade.correct + self.exact * grade.exact + self.steps_right * grade.steps_right


class Rollouts(NamedTuple):
    """Answers to learn from.

    tokens: the finished canvas. decided, born: the token that the decoder decided at each position and the step in which it did, as
    `Diary` has them; born is -1 where it was masked to the end. counted: the tokens that learn.
    """

    tokens: Int[Tensor, "B L"]
    prompt_length: Int[Tensor, "B"]
    answer_length: int
    decided: Int[Tensor, "B L"]
    born: Int[Tensor, "B L"]
    counted: Bool[Tensor, "B L"]
    advantage: Float[Tensor, "B"]

    @property
    def batch(self) -> Batch:
        """The same rows as a training batch: masks and attention rules read it."""
        return Batch(self.tokens, self.prompt_length, self.answer_length)

    def pick(self, rows: Tensor | slice) -> Rollouts:
        """Some rows, by index, mask or slice."""
        return Rollouts(*(part[rows] if isinstance(part, Tensor) else part for part in self))  # type: ignore[arg-type]


class Diary:
    """A callback of `decode` that remembers each position's first token and the step of it.

    The finished canvas does not: what a row decided behind its end of text, before it found that end, is end of text there too, but the
    model saw it. A position that a stop rule filled while its row went on counts as decided in that step.
    """

    def __init__(self) -> None:
        self.tokens = self.born = self.open = torch.empty(0)

    def __call__(self, state: State) -> None:
        if not len(self.tokens):
            self.tokens, self.born, self.open = state.tokens, torch.full_like(state.born, -1), ~state.fixed
        new = self.open & ~state.masked
        step = torch.where(state.done, -1, state.step - 1).unsqueeze(1)
        self.born = torch.where(new, torch.where(state.born >= 0, state.born, step), self.born)
        self.tokens = torch.where(new, state.tokens, self.tokens)
        self.open = self.open & state.masked


class Pool:
    """The problems of a task as prompts of a model's tokenizer. Raises RolloutError for a task that cannot be asked or does not fit."""

    def __init__(self, task: Task, model: Any, max_new_tokens: int) -> None:
        task.ready()
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise RolloutError("the model has no tokenizer, and prompts are text. Put tokenizer.json beside its model.safetensors.")
        self.task, self.tokenizer, self.max_new_tokens = task, tokenizer, max_new_tokens
        self.problems = tuple(task.problems())
        if not self.problems or any(problem.skeleton is not None for problem in self.problems):
            raise RolloutError(
                f"rollouts need problems whose whole answer is decoded, got {len(self.problems)} of {type(task).__name__}. Pinned text has "
                "no policy. Write another task."
            )
        self.prompts = [tokenizer.encode(task.render(problem, tokenizer), add_special_tokens=False) for problem in self.problems]
        check_prompts(model.spec, self.prompts, [max_new_tokens] * len(self.prompts))

    def draw(self, index: int, count: int, seed: int) -> list[int]:
        """The problems of batch `index` (from 0) of an endless run: epochs are permutations seeded by (seed, epoch)."""
        if count > len(self.problems):
            raise RolloutError(f"there are fewer problems than one batch holds, got {len(self.problems)} and {count}. Write size: {count}.")
        epoch, within = divmod(index, len(self.problems) // count)
        order = torch.randperm(len(self.problems), generator=torch.Generator().manual_seed(fold(seed, epoch)))
        return order[within * count : (within + 1) * count].tolist()

    def answer(
        self,
        model: Any,
        chosen: Sequence[int],
        decoder: Decoder,
        cache: Cache,
        seeds: Sequence[int],
        *,
        callback: Callable[[State], None] | None = None,
        compile: bool = False,
    ) -> tuple[Output, list[Grade]]:
        """Decode one answer to each of the `chosen` problems, and grade it. callback, compile: as `decode` has them."""
        prompts = [self.prompts[one] for one in chosen]
        output = decode(
            model, decoder, prompts, max_new_tokens=self.max_new_tokens, cache=cache, seed=seeds,
            callback=callback, compile=compile, throw=False,
        )  # fmt: skip
        eos = model.spec.eos_ids
        grades = [
            judged(self.tokenizer, eos, self.task, self.problems[one], ids).grade for one, ids in zip(chosen, output.tokens, strict=True)
        ]
        return output, grades


def advantages(
    rewards: Float[Tensor, "P G"], baseline: Baseline = "mean", scale: bool = False, negative: float = 1.0
) -> Float[Tensor, "P G"]:
    """Reward minus the group's mean, or minus the mean of the others; `scale` divides by the group's standard deviation, as GRPO does.

    d1, CJ-GRPO and Dr. GRPO do not divide: that would make groups in which nearly all are right (or wrong) count more. negative: what
    advantages below 0 are multiplied by. 0 learns from the better answers only (arXiv 2506.01347 compares the two halves).
    """
    size = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    centred = centred * size / (size - 1) if baseline == "leave_one_out" else centred
    return torch.where(centred < 0, negative * centred, centred)


def collect(model: Any, pool: Pool, chosen: Sequence[int], built: PolicyRecipe, seed: int) -> tuple[Rollouts, dict[str, float]]:
    """Sample a group of answers to each chosen problem and keep the groups that teach something; rows of a group stand together. With
    policy.negative 0 only the better answers of these groups are kept.

    Returns the rollouts (no rows, if no group does) and what happened: mean reward, shares right and exact, the share of groups that teach,
    and how many were left out and why. Row r of the call decodes with a seed made of (seed, r).
    """
    group, policy, diary = built.rollouts.group, built.policy, Diary()
    rows = [one for one in chosen for _ in range(group)]
    seeds = [fold(seed, row) & 0xFFFFFFFF for row in range(len(rows))]
    output, grades = pool.answer(model, rows, built.decoder, built.cache, seeds, callback=diary, compile=built.rollouts.compile)
    device = output.canvas.device
    rewards = torch.tensor([built.reward(grade) for grade in grades], device=device).view(-1, group)
    solved = torch.tensor([grade.correct for grade in grades], device=device).view(-1, group).any(1)
    equal = rewards.amax(1) == rewards.amin(1)
    teaches = (solved & ~equal).repeat_interleave(group)
    told = {
        "reward": float(rewards.mean()),
        "correct": sum(grade.correct for grade in grades) / len(grades),
        "exact": sum(grade.exact for grade in grades) / len(grades),
        "taught": float(teaches.float().mean()),
        "groups": len(chosen),
        "unsolved_groups": int((~solved).sum()),
        "equal_groups": int((solved & equal).sum()),
        "forwards": max(output.stats.nfe),
    }
    learned = advantages(rewards, policy.baseline, policy.scale, policy.negative).flatten()
    found = rollouts_of(output, diary, pool.max_new_tokens, model.spec.eos_ids, learned, policy.after_end)
    return found.pick(teaches & (learned != 0 if policy.negative == 0 else True)), told


def rollouts_of(
    output: Output, diary: Diary, answer_length: int, eos_ids: Sequence[int], advantage: Float[Tensor, "B"], after_end: bool = False
) -> Rollouts:
    """A decode with its diary, as rollouts. What learns is what the decoder committed up to the first end of text, or behind it too."""
    # A compiled decode has a longer canvas, maybe longer than the model's positions; nothing is said of what is behind the answers.
    length = int(output.begin.max()) + answer_length
    batch = Batch(output.canvas[:, :length], output.begin, answer_length)
    counted = (batch.answer if after_end else batch.text(eos_ids)) & (output.born[:, :length] >= 0)
    # Copies: what inference mode made cannot be part of a graph.
    tokens, begin, decided, born, counted = (
        one.clone() for one in (batch.tokens, output.begin, diary.tokens[:, :length], diary.born[:, :length], counted)
    )  # fmt: skip
    return Rollouts(tokens, begin, answer_length, decided, born, counted, advantage)
