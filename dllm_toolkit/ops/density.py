"""Certainty density: how much of a position's surroundings is known."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def certainty_density(known: Bool[Tensor, "B L"], sigma: float) -> Float[Tensor, "B L"]:
    """The share of known positions around each one, weighed by a Gaussian of `sigma` positions that is cut at five of them. In float64.

    What is left of the canvas counts as known, like the prompt, what is right of it as unknown. The position itself counts too.

    Reference: d2Cache, arXiv 2509.23094.
    """
    reach = math.ceil(5 * sigma)
    away = torch.arange(-reach, reach + 1, device=known.device, dtype=torch.float64)
    weights = torch.exp(-(away**2) / (2 * sigma**2))
    padded = F.pad(F.pad(known.double(), (reach, 0), value=1.0), (0, reach), value=0.0)
    return F.conv1d(padded.unsqueeze(1), (weights / weights.sum()).view(1, 1, -1)).squeeze(1)
