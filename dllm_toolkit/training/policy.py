"""Policy gradients for diffusion models: the clipped surrogate of PPO on the scores of `estimators.py`, and the published recipes.

    loss = sum_i share_i ( -min(rho_i A, clip(rho_i, 1 - e, 1 + e) A) + beta (exp(d_i) - d_i - 1) )
    rho_i = exp(s_i - s_i of the policy that sampled),   d_i = s_i of the reference - s_i

The penalty is the k3 estimator of KL(present policy || reference). The three scores of a token come from the same views, so that the ratio
is 1 before the first update.

    d1             one_step             arXiv 2504.12216        cj_grpo     trajectory             arXiv 2509.23924
    coupled_grpo   coupled              arXiv 2506.20639        trace_rl    trajectory or rounds   arXiv 2509.06949
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_toolkit.decoders.base import Decoder, Propose, Revise
from dllm_toolkit.registry import declare, name_of, register
from dllm_toolkit.training.estimators import Coupled, Estimator, OneStep, PolicyError, Rounds, Trajectory, Views
from dllm_toolkit.training.rollouts import Baseline, Rollouts
from dllm_toolkit.types import ModelSpec

Share = Literal["tokens", "response", "steps"]


class Surrogate(NamedTuple):
    """The loss of every token; and, for people, whether its ratio was clipped, and its k3."""

    loss: Float[Tensor, "B L"]
    clipped: Bool[Tensor, "B L"]
    k3: Float[Tensor, "B L"]


def surrogate(
    current: Float[Tensor, "B L"],
    old: Float[Tensor, "B L"],
    reference: Float[Tensor, "B L"] | None,
    advantage: Float[Tensor, "B"],
    clip: float,
    beta: float,
) -> Surrogate:
    """-min(rho A, clip(rho) A) + beta k3 of every token, from the scores of the three policies (reference None: no penalty)."""
    ratio, gain = (current - old).exp(), advantage.unsqueeze(1)
    held = ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = -torch.minimum(ratio * gain, held * gain)
    clipped = (held * gain < ratio * gain).detach()
    if reference is None:
        return Surrogate(loss, clipped, torch.zeros_like(ratio))
    away = reference - current
    k3 = away.exp() - away - 1.0
    return Surrogate(loss + beta * k3, clipped, k3.detach())


@dataclass(frozen=True)
class PolicyGradient:
    """How rollouts become gradients: an estimator, the clipped surrogate, and how tokens share it.

    clip, beta: e and beta of the formula above; penalty: the k3 term looks at the policy at the start of training (`reference`) or at
    the one that sampled (`old`). updates: optimiser steps on the same rollouts. sync_every: the reference becomes the present policy
    every so many iterations. baseline, scale, negative: see `advantages`; with negative 0 the worse answers are no rows of the batch any
    more, so shares are of the better ones. after_end: tokens behind the first end of text learn too.
    share: what a token's loss is divided by, so that all shares add up to 1.

        tokens     all counted tokens of the batch: long answers count more
        response   the row's counted tokens, and the rows
        steps      the tokens of its view in the row, the row's views, and the rows: a step with one token counts as one with many
    """

    estimator: Estimator
    clip: float = 0.2
    beta: float = 0.0
    penalty: Literal["reference", "old"] = "reference"
    share: Share = "tokens"
    updates: int = 1
    sync_every: int | None = None
    baseline: Baseline = "mean"
    scale: bool = False
    after_end: bool = False
    negative: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise PolicyError(f"clip must lie in (0, 1), got {self.clip}. Ratios are held within 1 - clip .. 1 + clip. Write clip: 0.2.")
        if self.beta < 0:
            raise PolicyError(f"beta must be 0 or more, got {self.beta}. It weighs the distance from the reference. Write beta: 0.01.")
        if self.negative < 0:
            raise PolicyError(
                f"negative must be 0 or more, got {self.negative}. It weighs answers below the baseline. Write negative: 1.0, or 0 to "
                "leave them out."
            )
        for name in ("updates", "sync_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PolicyError(f"{name} must be at least 1, got {value}. It is a count. Write {name}: 1.")

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 and self.penalty == "reference"

    def check(self, spec: ModelSpec, decoder: Decoder) -> None:
        """Raise PolicyError if rollouts of `decoder` would teach nothing, or are no trace that the estimator can follow."""
        self.estimator.check(spec)
        members = decoder.members()
        if any(isinstance(one, Propose) and getattr(one, "temperature", None) == 0 for one in members):
            raise PolicyError(
                "rollouts must differ, got a decoder of temperature 0. All answers to a problem would be one, without an advantage. "
                "Write temperature: 1.0 in the decoder."
            )
        if self.estimator.needs_trace:
            for one in members:
                if (isinstance(one, Revise) and not one.monotone) or (isinstance(one, Decoder) and one.leaps):
                    raise PolicyError(
                        f"the estimator follows the decoder's steps, got a decoder with {name_of(one) or type(one).__name__}, which "
                        "changes what it decided or skips steps. The states that it went through are not in the answer. "
                        "Write estimator: coupled, or another decoder."
                    )

    def shares(self, rollouts: Rollouts, views: Views) -> Float[Tensor, "B L"]:
        """What each token's loss is multiplied by; they add up to 1 over the batch."""
        counted, rows = rollouts.counted, len(rollouts.tokens)
        if self.share == "tokens":
            return counted / counted.sum().clamp(min=1)
        if self.share == "response":
            return counted / (counted.sum(1, keepdim=True).clamp(min=1) * rows)
        asked = views.weight != 0  # [N, B, L]
        size = asked.sum(-1, keepdim=True)
        steps = (size > 0).sum(0).clamp(min=1)  # [B, 1]
        return (asked / size.clamp(min=1)).sum(0) / (steps * rows)


declare("policy", PolicyGradient)


@register("policy", "d1")
def d1(clip: float = 0.5, beta: float = 0.04, updates: int = 12, prompt_masking: float = 0.15, scale: bool = False) -> PolicyGradient:
    """diffu-GRPO of d1 (arXiv 2504.12216): one-step scores, many updates on the same rollouts, each with new prompt masks."""
    return PolicyGradient(OneStep(prompt_masking), clip, beta, updates=updates, scale=scale)


@register("policy", "coupled_grpo")
def coupled_grpo(
    clip: float = 0.5, beta: float = 0.01, updates: int = 2, pairs: int = 1, weighted: bool = True, sync_every: int | None = 64,
    negative: float = 1.0,
) -> PolicyGradient:  # fmt: skip
    """coupled-GRPO of DiffuCoder (arXiv 2506.20639): complementary masks, leave-one-out baseline, a reference that follows."""
    return PolicyGradient(
        Coupled(pairs, weighted=weighted), clip, beta, updates=updates, sync_every=sync_every, baseline="leave_one_out", negative=negative
    )


@register("policy", "cj_grpo")
def cj_grpo(clip: float = 0.5, beta: float = 0.04, updates: int = 8, after_end: bool = True) -> PolicyGradient:
    """CJ-GRPO (arXiv 2509.23924): every state of the decoder's trajectory, each step as heavy as the next; as released, after_end."""
    return PolicyGradient(Trajectory(1), clip, beta, share="steps", updates=updates, after_end=after_end)


@register("policy", "trace_rl")
def trace_rl(
    clip: float = 0.2, beta: float = 0.01, updates: int = 1, shrink: int = 8, rounds: bool = False, scale: bool = False,
    negative: float = 1.0,
) -> PolicyGradient:  # fmt: skip
    """TraceRL (arXiv 2509.06949): the decoder's trace, `shrink` steps a view, penalty against the old policy, mean over responses.

    rounds: the doubled layout for block-causal models; it wants shrink 1. With updates 1 the old policy is the present one, and the
    penalty and the clip do nothing.
    """
    return PolicyGradient(
        Rounds(shrink) if rounds else Trajectory(shrink), clip, beta, penalty="old", share="response", updates=updates, scale=scale,
        negative=negative,
    )  # fmt: skip
