"""Metrics as torchmetrics classes, to accumulate over batches and processes: exact match, tokens per forward, AUP, AR-ness.

What a token or a forward is, `ledger.py` says, and what AUP is, `curves.py`; these classes only add up.

References: AUP: d3LLM (arXiv 2601.07568). AR-ness: DiffuCoder (arXiv 2506.20639).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from dllm_toolkit.evaluation import order
from dllm_toolkit.evaluation.curves import ALPHA, DROP, area_under_parallelism
from dllm_toolkit.evaluation.ledger import answer_tokens


class _Mean(Metric):
    """Sum of numerators / sum of denominators; the shared accumulator of the classes below."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, numerator: float | int, denominator: float | int) -> None:
        self.total += numerator
        self.count += denominator

    def compute(self) -> Tensor:
        return self.total / self.count


class ExactMatch(_Mean):
    """Share of right answers. `update(correct)`: one bool a problem."""

    higher_is_better = True

    def update(self, correct: Sequence[bool] | Tensor) -> None:
        values = torch.as_tensor(correct)
        self.add(float(values.sum()), values.numel())


class TokensPerForward(_Mean):
    """Answer tokens up to and including the first end of text / forwards, as a ratio of sums.

    `update(outputs, nfe, eos_ids)`: answer ids of each row, forwards of each row, ids that end a text.
    """

    higher_is_better = True

    def update(self, outputs: Sequence[Sequence[int]], nfe: Sequence[int], eos_ids: Sequence[int]) -> None:
        self.add(sum(answer_tokens(ids, eos_ids) for ids in outputs), sum(nfe))


class LocalOrder(_Mean):
    """Local AR-ness at k, mean over answers. `update(born)`: row-steps of each answer's tokens, -1 for fill."""

    def __init__(self, k: int = 1, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.k = k

    def update(self, born: Sequence[Sequence[int]]) -> None:
        self.add(sum(order.local_order(row, self.k) for row in born), len(born))


class GlobalOrder(_Mean):
    """Global AR-ness at k, mean over answers. `update(born)`: row-steps of each answer's tokens, -1 for fill."""

    def __init__(self, k: int = 1, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.k = k

    def update(self, born: Sequence[Sequence[int]]) -> None:
        self.add(sum(order.global_order(row, self.k) for row in born), len(born))


class AreaUnderParallelism(Metric):
    """AUP of a method. `update(tokens_per_forward, accuracy)`: one point of its curve, accuracy in percent."""

    full_state_update = False
    higher_is_better = True
    parallelism: list[Tensor]
    accuracy: list[Tensor]

    def __init__(self, alpha: float | int = ALPHA, drop: float | int = DROP, best: float | int | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.alpha, self.drop, self.best = alpha, drop, best
        self.add_state("parallelism", default=[], dist_reduce_fx="cat")
        self.add_state("accuracy", default=[], dist_reduce_fx="cat")

    def update(self, tokens_per_forward: float | int, accuracy: float | int) -> None:
        self.parallelism.append(torch.tensor([tokens_per_forward], dtype=torch.float64))
        self.accuracy.append(torch.tensor([accuracy], dtype=torch.float64))

    def compute(self) -> Tensor:
        # A list state is a list before, and a tensor after, it was gathered from several processes.
        parallelism, accuracy = (
            state if isinstance(state, Tensor) else torch.cat(state) if state else torch.empty(0)
            for state in (self.parallelism, self.accuracy)
        )
        points = list(zip(parallelism.tolist(), accuracy.tolist(), strict=True))
        area = area_under_parallelism(points, alpha=self.alpha, drop=self.drop, best=self.best)
        return torch.tensor(area, dtype=torch.float64)
