"""How sure is the model? Confidence measures of a distribution, always in float32.

Low precision matters here: bf16 probabilities near 0.9 are 2^-8 apart, enough to change which tokens pass a threshold.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def probability(logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """p(token): softmax of the logits at the proposed token."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)).exp()


def margin(logits: Float[Tensor, "B R V"]) -> Float[Tensor, "B R"]:
    """p1 - p2: probability of the best token minus that of the second best."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    top = wide.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Float[Tensor, "B R V"]) -> Float[Tensor, "B R"]:
    """Shannon entropy in nats; tokens at -inf count 0."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = wide.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
