"""A step over several processes that is the step of one process with the whole batch: same rows, same noise, same loss.

Every process gets the rows of all (ids are small), draws the noise of all from one generator, and keeps its part:

    whole batch      r0 r1 r2 r3 r4 r5      hidden positions and weights drawn once, the same in every process
    process 0        r0 r1 r2               n_0, d_0 of every term and copy: its sum over its rows, and what that is divided by
    process 1                 r3 r4 r5      n_1, d_1

Averaging gradients of n_i / d_i would weigh a process with few masked tokens like one with many. The loss of a process is n_i / (d_0 + d_1)
and these are added. How many positions pass a gate is known only after the forward, so a loss stays in sums (`Sums`) until the processes
have told each other what they divide by, K C numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
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

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of all parts' `numbers`, without gradient, the same in every process. All of them must ask for it."""
        whole = numbers.detach().clone()
        torch.distributed.all_reduce(whole)
        return whole


class Sums(NamedTuple):
    """A loss before anything is divided: `over` and `under` of each of K terms on each of C copies, and of numbers for people.

    Where `under` is 0 the sum is divided by nothing.
    """

    over: Float[Tensor, "K C"]
    under: Float[Tensor, "K C"]
    counts: dict[str, tuple[Tensor, Tensor]]

    def of_all(self, split: Split) -> Sums:
        """These sums over what all parts divide by: the values of the parts add up to those of the whole batch. One message."""
        told = [under.to(self.under.dtype) for _, under in self.counts.values()]
        whole = split.total(torch.cat((self.under.flatten(), torch.stack(told)) if told else (self.under.flatten(),)))
        size = self.under.numel()
        counts = {name: (over, under) for (name, (over, _)), under in zip(self.counts.items(), whole[size:], strict=True)}
        return Sums(self.over, whole[:size].view_as(self.under), counts)


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """over / under, and `over` where `under` is 0."""
    return over / torch.where(under > 0, under, 1)
