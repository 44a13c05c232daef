"""A perfect model of a known distribution, and what decoding can make of it: the theory of ParallelBench (arXiv 2510.04767) as code.

`Ideal` knows every right answer and how likely it is, and answers each forward with the exact conditional probability of every undecided
position given the decided ones. Whatever a decoder gets wrong on it, the decoder has done, not the model. For the open list operations on n
names, one token a name, the numbers are known in closed form:

    total correlation      bits that any decode in one step loses at least: shuffle n log2 n - log2 n!, replace (n-1)(log2 n - log2(n-1))
    sampled accuracy       shuffle, k names a step, k | n:  prod_i  m_i! / (m_i - k)! / m_i^k   with m_i = n - (i-1) k left in step i
                           replace in one step:  ((n-1)/n)^(n-1)

An operation with one right answer has total correlation 0, and every commit rule is perfect on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Query
from dllm_toolkit.testing.models import Toy
from dllm_toolkit.types import ModelSpec

Open = Literal["shuffle", "replace_any", "insert_anywhere", "remove_any"]


def right_answers(operation: str, items: Sequence[int], new: int) -> list[tuple[int, ...]]:
    """All answers that count as right for a list of tokens, equally likely for a perfect model. Shuffle: every order, the given one too."""
    items = tuple(items)
    if operation == "shuffle":
        return list(itertools.permutations(items))
    if operation == "replace_any":
        return [(*items[:place], new, *items[place + 1 :]) for place in range(len(items))]
    if operation == "insert_anywhere":
        return [(*items[:place], new, *items[place:]) for place in range(len(items) + 1)]
    if operation == "remove_any":
        return [(*items[:place], *items[place + 1 :]) for place in range(len(items))]
    return [{"copy": items, "reverse": items[::-1], "sort": tuple(sorted(items))}[operation]]


class Ideal(Toy):
    """Exact conditionals of a uniform distribution over `answers`, which stand at canvas positions `first`, `first + 1`, ...

    Positions outside the answer, and an answer that no right one agrees with any more, get even logits over all tokens. Decode without a
    cache: the model reads what is decided off the query. Every row has the same distribution.
    """

    def __init__(self, answers: Sequence[Sequence[int]], first: int, spec: ModelSpec | None = None) -> None:
        super().__init__(spec)
        self.answers = torch.tensor(answers)  # [K, n]
        self.first = first

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        assert self.spec.shift == 0
        length, vocabulary = self.answers.shape[1], self.spec.vocab_size
        positions = torch.arange(self.first, self.first + length)
        # The canvas as far as this forward shows it: [B, S]; positions that it does not show count as undecided.
        rows, size = query.tokens.shape[0], int(query.positions.max()) + self.first + length + 1
        canvas = torch.full((rows, size), self.spec.mask_id).scatter(1, query.positions, query.tokens)
        known = canvas[:, positions]  # [B, n]
        agree = ((known.unsqueeze(1) == self.answers) | (known == self.spec.mask_id).unsqueeze(1)).all(2)  # [B, K]
        counts = torch.zeros(rows, size, vocabulary, dtype=torch.float64)
        one_hot = torch.nn.functional.one_hot(self.answers, vocabulary).double()  # [K, n, V]
        counts[:, positions] = torch.einsum("bk,knv->bnv", agree.double(), one_hot)
        total = counts.sum(2, keepdim=True)
        chances = torch.where(total > 0, counts / total.clamp(min=1), 1.0 / vocabulary)
        read = (query.positions if query.read is None else query.read).clamp(max=size - 1)
        return chances.log().gather(1, read.unsqueeze(-1).expand(-1, -1, vocabulary))


def entropies(answers: Sequence[Sequence[int]]) -> list[float]:
    """Entropy of each position by itself, bits, for equally likely answers."""
    found = []
    for column in zip(*answers, strict=True):
        shares = [column.count(token) / len(answers) for token in set(column)]
        found.append(-sum(share * math.log2(share) for share in shares))
    return found


def correlation(answers: Sequence[Sequence[int]]) -> float:
    """Total correlation of equally likely, different answers, bits: the least that a decode in one step is off, in Kullback-Leibler."""
    return sum(entropies(answers)) - math.log2(len(set(map(tuple, answers))))


def shuffle_accuracy(n: int, per_step: int) -> float:
    """Chance that sampling `per_step` names at a time gives a permutation of n."""
    chance, left = 1.0, n
    while left:
        taken = min(per_step, left)
        chance *= math.perm(left, taken) / left**taken
        left -= taken
    return chance


def replace_accuracy(n: int) -> float:
    """Chance that sampling all n names in one step replaces exactly one."""
    return ((n - 1) / n) ** (n - 1)


def one_step_accuracy(answers: Sequence[Sequence[int]]) -> float:
    """Chance that sampling every position by itself gives one of the equally likely `answers`."""
    columns = list(zip(*answers, strict=True))
    return sum(
        math.prod(column.count(token) / len(answers) for token, column in zip(answer, columns, strict=True))
        for answer in set(map(tuple, answers))
    )
