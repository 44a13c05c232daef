"""Records of a ledger without a decode, for tests of what reads ledgers."""

from __future__ import annotations

import dataclasses
from typing import Any

from dllm_toolkit.evaluation.ledger import Record


def toy_record(configuration: str, index: int, *, forwards: int, correct: bool, **changes: Any) -> Record:
    """Problem number `index`: ten tokens in so many forwards, decoded alone in a tenth of a second for each. changes: fields to set."""
    seconds = 0.1 * forwards
    made = Record(
        configuration=configuration,
        problem=f"p{index}",
        prompt=f"question {index}",
        reference="42",
        prompt_hash=f"{index:02}",
        prompt_tokens=3,
        output=(5,) * 10,
        pieces=("five",) * 10,
        text="42" if correct else "41",
        correct=correct,
        steps_right=1.0 if correct else 0.5,
        exact=correct,
        nfe=forwards,
        tokens=10,
        canvas_tokens=10,
        lanes=10 * forwards,
        steps=forwards,
        commits=10,
        forced=0,
        edits=0,
        born=tuple(min(place, forwards - 1) for place in range(10)),
        seconds=seconds,
        batch=index,
        batch_rows=1,
        batch_seconds=seconds,
        seed=index,
    )
    return dataclasses.replace(made, **changes)
