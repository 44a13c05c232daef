"""Stateless noise: a hash of (row seed, row step, position, token) instead of a generator.

A sampled row is then the same whatever its batch company, cache, lane width or compilation, and a decode can be resumed from its
state alone. The mixer is the 32-bit finaliser "lowbias32" with full avalanche, run on int64 so that every backend has the operations.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF


def mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """One round of avalanche on the low 32 bits of int64 values."""
    x = (x ^ (x >> 16)) & _WORD
    x = (x * 0x7FEB352D) & _WORD
    x = (x ^ (x >> 15)) & _WORD
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def uniform(*keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Uniform numbers in (0, 1), float32, one for each combination of the broadcast integer keys."""
    state = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for number, key in enumerate(keys):
        state = mix((state + (number + 1) * 0x9E3779B9 + key.to(torch.int64)) & _WORD)
    # The upper 23 bits, centred: never 0 and never 1 in float32.
    return ((state >> 9).to(torch.float32) + 0.5) * (1.0 / (1 << 23))


def gumbel(*keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard Gumbel noise, -ln(-ln u), from the same hash."""
    return -torch.log(-torch.log(uniform(*keys)))
