"""From logits to a proposed token: filtering, temperature, and Gumbel-max with stateless noise."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_toolkit.ops import noise


def filter_top_k(logits: Float[Tensor, "B R V"], k: int) -> Float[Tensor, "B R V"]:
    """Keep the k best tokens of each row (ties with the k-th stay), the rest becomes -inf."""
    floor = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < floor, float("-inf"))


def filter_top_p(logits: Float[Tensor, "B R V"], p: float) -> Float[Tensor, "B R V"]:
    """Keep the smallest set of best tokens whose probability reaches p (at least the best one)."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ranked.float().softmax(-1)
    # A token stays while the mass before it is still below p, so the one that crosses p is kept.
    drop = (mass.cumsum(-1) - mass) > p
    drop[..., 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


def gumbel_argmax(
    logits: Float[Tensor, "B R V"],
    temperature: float,
    seed: Int[Tensor, "B"],
    step: Int[Tensor, "B"],
    positions: Int[Tensor, "B R"],
) -> Int[Tensor, "B R"]:
    """A sample of softmax(logits / temperature); temperature 0 is the argmax (ties: lowest id)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    token = torch.arange(logits.shape[-1], device=logits.device)
    draws = noise.gumbel(seed[:, None, None], step[:, None, None], positions.unsqueeze(-1), token)
    return (logits.float() / temperature + draws).argmax(-1)
