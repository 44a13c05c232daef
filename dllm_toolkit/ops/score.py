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
    if not torch.compiler.is_compiling():
        top = wide.softmax(-1).topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    # A compiler cannot see into topk: it would write all probabilities out first. Two maxima and a sum are reads that it fuses.
    best, where = wide.max(-1, keepdim=True)
    others = wide.masked_fill(torch.arange(wide.shape[-1], device=wide.device) == where, float("-inf"))
    ratio = (others.amax(-1, keepdim=True) - best).exp().squeeze(-1)
    return (1 - ratio) / (wide - best).exp().sum(-1)


def entropy(logits: Float[Tensor, "B R V"]) -> Float[Tensor, "B R"]:
    """Shannon entropy in nats; tokens at -inf count 0.

    With d = z - max z: H = ln sum e^d - sum e^d d / sum e^d, two terms that are never negative, so nothing cancels. No distribution is
    written out, and compiled it is two reads of the logits.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    below = wide - wide.amax(-1, keepdim=True)
    weight = below.exp()
    total = weight.sum(-1)
    lost = torch.linalg.vecdot(weight, below.clamp(min=torch.finfo(below.dtype).min))
    return total.log() - lost / total
