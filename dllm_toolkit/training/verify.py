"""Did training on rewards help? Held-out problems before and after, and the paired difference with its interval."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.evaluation.tasks import Grade, Task
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.rollouts import Pool
from dllm_toolkit.training.shared import check_counts, say


@dataclass(frozen=True)
class Evaluation:
    """What is decoded before and after: every problem of the task once, with a decoder of its own (temperature 0, say).

    every: the first `sample` problems are decoded every so many iterations too, for the log; None: never.
    """

    task: Task
    decoder: Decoder
    cache: Cache = field(default_factory=NoCache)
    batch_size: int = 500
    every: int | None = None
    sample: int = 200

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "every", "sample")


def evaluated(how: Evaluation, model: Transformer, judge: Pool, seed: int, most: int | None = None) -> tuple[list[Grade], Batch]:
    """Grades of the first `most` held-out problems (None: all), and the first answers as a batch (for the export to look at)."""
    count, size, grades, batch = len(judge.problems[:most]), how.batch_size, [], None
    for first in range(0, count, size):
        chosen = range(first, min(first + size, count))
        output, found = judge.answer(model, chosen, how.decoder, how.cache, [seed + one for one in chosen])
        grades += found
        batch = batch or Batch(output.canvas, output.begin, judge.max_new_tokens)
    assert batch is not None
    return grades, batch


def before(how: Evaluation, model: Transformer, judge: Pool, seed: int, output: Path) -> list[Grade]:
    """How the policy does before training; from the output directory if an earlier process of this run measured it."""
    file = output / "before.json"
    if file.is_file():
        return [Grade(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    begun = time.monotonic()
    grades, _ = evaluated(how, model, judge, seed)
    kept = [{"correct": bool(one.correct), "steps_right": float(one.steps_right), "exact": bool(one.exact)} for one in grades]
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(kept), encoding="utf-8")
    unfinished.rename(file)
    say(
        f"before: exact {share(grades, 'exact'):.1%}, correct {share(grades, 'correct'):.1%} of {len(grades)} held-out problems, "
        f"{time.monotonic() - begun:.1f} s"
    )
    return grades


def share(grades: Sequence[Grade], what: str) -> float:
    return sum(float(getattr(grade, what)) for grade in grades) / len(grades)


def compared(first: Sequence[Grade], after: Sequence[Grade]) -> dict[str, Any]:
    """Both accuracies and the paired difference with its 95 % bootstrap interval, of exact solutions and of final answers."""
    from dllm_toolkit.evaluation.decoder_page import paired

    told: dict[str, Any] = {"problems": len(after)}
    for what in ("exact", "correct"):
        difference = paired([float(getattr(one, what)) for one in after], [float(getattr(one, what)) for one in first])
        told[what] = {
            "before": share(first, what),
            "after": share(after, what),
            "difference": difference.mean,
            "interval": [difference.low, difference.high],
            "verdict": difference.verdict,
        }
    return told
