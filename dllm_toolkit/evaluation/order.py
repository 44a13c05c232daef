"""Commit order: in which order were the tokens of an answer decided, and how close to left-to-right is that?

Works on `born`, the row-step at which each answer token was written (-1: never written by a step, such as the fill after the
end), which every decode returns. Tokens that one step wrote together are ordered left to right, the house rule for ties.

Reference: DiffuCoder (arXiv 2506.20639), section on autoregressive-ness: local and global AR-ness at k.
"""

from collections.abc import Sequence


def commit_order(born: Sequence[int]) -> list[int]:
    """Answer positions (0-based) in the order in which they were decided; fill is left out."""
    return sorted((index for index, step in enumerate(born) if step >= 0), key=lambda index: (born[index], index))


def local_order(born: Sequence[int], k: int = 1) -> float:
    """Share of commits whose k predecessors are exactly the k positions to the left, in increasing order (local AR-ness).

    1 for left-to-right, 0 for right-to-left, non-increasing in k. An answer of at most k tokens has no commit to judge and
    counts as 1.
    """
    _require_positive(k)
    order = commit_order(born)
    judged = range(k, len(order))
    if not judged:
        return 1.0
    hits = sum(all(order[t - j] == order[t] - j for j in range(1, k + 1)) for t in judged)
    return hits / len(judged)


def global_order(born: Sequence[int], k: int = 1) -> float:
    """Share of commits that take one of the k leftmost positions still undecided (global AR-ness).

    1 for left-to-right at k = 1, 1/T for right-to-left at k = 1 with T tokens, H_T/T in expectation for a uniformly random
    order; non-decreasing in k.
    """
    _require_positive(k)
    ranks = _ranks(born)
    return sum(rank < k for rank in ranks) / len(ranks) if ranks else 1.0


def _ranks(born: Sequence[int]) -> list[int]:
    """Of each commit, in order, how many places to its left were still undecided."""
    order = commit_order(born)
    undecided, ranks = sorted(order), []
    for position in order:
        ranks.append(undecided.index(position))
        undecided.pop(ranks[-1])
    return ranks


def order_curves(answers: Sequence[Sequence[int]], most: int = 10) -> tuple[list[float], list[float]]:
    """Local and global AR-ness at k = 1 .. `most`, means over answers (each one's `born`); two empty lists for no answers."""
    _require_positive(most)
    if not answers:
        return [], []
    local = [sum(local_order(born, k) for born in answers) / len(answers) for k in range(1, most + 1)]
    ranks = [_ranks(born) for born in answers]
    shares = [[sum(rank < k for rank in one) / len(one) if one else 1.0 for one in ranks] for k in range(1, most + 1)]
    return local, [sum(share) / len(answers) for share in shares]


def commits_per_step(born: Sequence[int]) -> list[int]:
    """How many of the answer's present tokens each row-step wrote, from step 0 to the last that wrote one."""
    steps = [step for step in born if step >= 0]
    counts = [0] * (max(steps) + 1 if steps else 0)
    for step in steps:
        counts[step] += 1
    return counts


def _require_positive(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}. AR-ness looks at k neighbours. Write k=1 or more.")
