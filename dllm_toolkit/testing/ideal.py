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

    Each lane answers for its own position, given the decided tokens that `allow` lets it see and its own. Positions outside the answer, and
    tokens that no right answer agrees with, get even logits. Decode without a cache: every slot that is seen is part of the forward. Every
    row has the same distribution.
    """

    def __init__(self, answers: Sequence[Sequence[int]], first: int, spec: ModelSpec | None = None) -> None:
        super().__init__(spec)
        assert self.spec.shift == 0
        self.answers = torch.tensor(answers)  # [K, n]
        self.first = first

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        (rows, lanes), mask_id = query.tokens.shape, self.spec.mask_id
        slots = torch.arange(lanes).expand(rows, lanes) if query.slots is None else query.slots  # [B, W]
        size = lanes if kv is None else kv.slots
        tokens = torch.full((rows, size), mask_id).scatter(1, slots, query.tokens)  # [B, S]
        places = torch.full((rows, size), -1).scatter(1, slots, query.positions) - self.first
        if kv is not None:
            tokens[:, -1] = mask_id  # the trash slot
        length, vocabulary = self.answers.shape[1], self.spec.vocab_size
        inside = (places >= 0) & (places < length)
        wanted = self.answers.T[places.clamp(0, length - 1)]  # [B, S, K]: what each answer has there
        conflict = (inside & (tokens != mask_id)).unsqueeze(2) & (tokens.unsqueeze(2) != wanted)  # [B, S, K]
        allow = torch.ones(rows, lanes, size, dtype=torch.bool) if query.allow is None else query.allow
        agree = (allow.double() @ conflict.double()) == 0  # [B, W, K]
        agree &= ~conflict.gather(1, slots.unsqueeze(2).expand(-1, -1, len(self.answers)))
        read = slots if query.read is None else query.read  # [B, R]
        lane = torch.zeros(rows, size, dtype=torch.long).scatter(1, slots, torch.arange(lanes).expand(rows, lanes)).gather(1, read)
        agree = agree.gather(1, lane.unsqueeze(2).expand(-1, -1, len(self.answers)))  # [B, R, K]
        agree &= inside.gather(1, read).unsqueeze(2)
        counts = torch.zeros(*agree.shape[:2], vocabulary, dtype=torch.float64)
        counts.scatter_add_(2, wanted.gather(1, read.unsqueeze(2).expand_as(agree)), agree.double())
        total = counts.sum(2, keepdim=True)
        return torch.where(total > 0, counts / total.clamp(min=1), 1.0 / vocabulary).log()


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
