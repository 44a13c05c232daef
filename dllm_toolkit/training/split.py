"""A step over several processes that is the step of one process with the whole batch: same rows, same noise, same loss.

Every process gets the rows of all (ids are small), draws the noise of all from one generator, and keeps its part:

    whole batch      r0 r1 r2 r3 r4 r5      hidden positions and weights drawn once, the same in every process
    process 0        r0 r1 r2               loss l_0, a share s_0 of what the whole loss is divided by (e.g. masked tokens)
    process 1                 r3 r4 r5      loss l_1, share s_1

The whole loss is s_0 l_0 + s_1 l_1. Averaging gradients as they come would weigh a process with few masked tokens like one with many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Rows = TypeVar("Rows", bound=tuple)


@dataclass(frozen=True)
class Split:
    """Which of the whole batch's rows are this process's: the rank-th of `world` equal parts."""

    rank: int
    world: int

    def of(self, rows: Rows) -> Rows:
        """This process's part of a named tuple whose tensors have a row each in their first dimension; what is no tensor is shared."""
        return type(rows)(*(self._part(one) if isinstance(one, Tensor) else one for one in rows))

    def _part(self, rows: Tensor) -> Tensor:
        size, rest = divmod(rows.shape[0], self.world)
        assert rest == 0, f"{rows.shape[0]} rows do not go into {self.world} equal parts"
        return rows[self.rank * size : (self.rank + 1) * size]

    def share(self, mass: Tensor) -> Tensor:
        """This part's share of the sum of `mass` [B], what the whole loss is divided by; 0 if that is 0."""
        whole = mass.sum()
        return self._part(mass).sum() / torch.where(whole > 0, whole, 1)
