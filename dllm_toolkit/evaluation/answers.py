"""Numbers over many answers that accuracy does not show: how varied the right ones are, and how likely the text is."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def diversity(extras: Iterable[Mapping[str, Any]]) -> float | None:
    """How evenly right answers spread over all right ones, 0 (always the same) to 1; None if no answer had a choice.

    For each operation and number of possible answers: the entropy of the choices over the largest that so many answers can have; then the
    mean over the answers. extras: `Grade.extra` of the answers.
    """
    groups: dict[tuple[Any, int], list[int]] = defaultdict(list)
    for extra in extras:
        if extra.get("choice") is not None and extra.get("choices", 1) > 1:
            groups[extra.get("operation"), extra["choices"]].append(extra["choice"])
    shares = []
    for (_, possible), chosen in groups.items():
        if len(chosen) < 2:
            continue
        counts = Counter(chosen).values()
        entropy = -sum(count / len(chosen) * math.log(count / len(chosen)) for count in counts)
        shares.append((len(chosen), entropy / math.log(min(possible, len(chosen)))))
    total = sum(count for count, _ in shares)
    return sum(count * share for count, share in shares) / total if total else None


def perplexity(losses: Sequence[tuple[float, int]]) -> float | None:
    """exp of nats per token over all texts; None without tokens. losses: (nats, tokens) of each text."""
    tokens = sum(count for _, count in losses)
    return math.exp(min(700.0, sum(loss for loss, _ in losses) / tokens)) if tokens else None
