"""Pairs of decoders that must be one: the lattice's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dllm_toolkit.decoders.base import Decoder


@dataclass(frozen=True)
class Pair:
    """Two decoders that must be one, wherever both are accepted."""

    name: str
    one: Callable[[], Decoder]
    other: Callable[[], Decoder]


def pair(name: str, make: Callable[..., Decoder], one: object, other: object) -> Pair:
    """The decoders that `make` builds around two rules."""
    return Pair(name, partial(make, one), partial(make, other))
