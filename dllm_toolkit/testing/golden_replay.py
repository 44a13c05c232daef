"""Replaying a recorded case with our decoder and comparing what happened: ids, forwards, commit order, query tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dllm_toolkit.decode import Step, trace
from dllm_toolkit.testing.golden_plan import Case, Plan, leaves_masks, padding, prompts, rows

WHAT = ("ids", "forwards", "commit forward", "query lengths")


@dataclass(frozen=True)
class Replay:
    """What our decoder did with one row: ids, the forward after which each position stopped being a mask, query tokens of each forward.

    at_commit: the ids as they were when each position was decided, before anything was filled.
    """

    ids: list[int]
    at_commit: list[int]
    commits: list[int]
    lengths: list[int]


def replay(case: Case, planned: Plan, company: Sequence[tuple[list[int], int]] = ()) -> list[Replay]:
    """Decode a case and write down what happened in each of its rows; `company`: strangers (prompt, budget) that share the batch."""
    own = prompts(case)
    together = [(prompt, planned.budget) for prompt in own]
    together = [*company[:1], *together, *company[1:]]
    steps = trace(
        planned.model,
        planned.decoder,
        [prompt for prompt, _ in together],
        max_new_tokens=[budget for _, budget in together],
        cache=planned.cache,
        max_steps=case["nfe"] + 4 * max(budget for _, budget in together),
    )
    first = len(company[:1])
    return _written(list(steps), list(range(first, first + len(own))), len(rows(case, "generated_ids")[0]))


def _written(steps: list[Step], numbers: list[int], size: int) -> list[Replay]:
    commits, at_commit = torch.full_like(steps[0].before.tokens, -1), torch.full_like(steps[0].before.tokens, -1)
    lengths: list[list[int]] = [[] for _ in numbers]
    for number, step in enumerate(steps):
        before, after = step.before, step.after
        decided = before.masked & ~after.masked
        commits = commits.masked_fill(decided, number)  # rows begin together, so a row's forwards are the first ones
        at_commit = torch.where(decided, after.tokens, at_commit)
        compute = step.asked.plan.compute  # a row for every branch
        computed = compute.view(before.tokens.shape[0], -1).sum(1).tolist()
        for place, row in enumerate(numbers):
            if not bool(before.done[row]):
                lengths[place].append(computed[row])
    last, found = steps[-1].after, []
    for place, row in enumerate(numbers):
        begin = int(last.begin[row])
        answer = slice(begin, begin + size)
        found.append(
            Replay(last.tokens[row, answer].tolist(), at_commit[row, answer].tolist(), commits[row, answer].tolist(), lengths[place])
        )
    return found


def compare(case: Case, replays: Sequence[Replay], planned: Plan) -> dict[str, str]:
    """What differs from the recording, each with a sentence; empty if everything is exact."""
    ids, commits = rows(case, "generated_ids"), rows(case, "commit_forward")
    ours, kept = list(replays), [[True] * len(row) for row in commits]
    if leaves_masks(case):
        # Masks that the official loop leaves over cut our text short: what its last forward decides behind the first one is not ours.
        kept = [[_comparable(row, place, case["nfe"] - 1) for place in range(len(row))] for row in commits]
        ours = [replace(one, ids=one.at_commit) for one in ours]
    mine, lengths = [one.commits for one in ours], [one.lengths for one in ours]
    if planned.waits is not None and len(ours) > 1:
        # The official batch waits at the end of a block for its slowest row; ours lets each row go on. Count from block starts.
        lengths, mine = _waiting(ours, planned.waits)
        commits = _from_block_start(commits, planned.waits)
    drafts = case.get("query_batch") if planned.decoder.branches > 1 else None  # drafts that are rows of the official batch
    expected = [
        [length * times - pad for length, times in zip(case["query_lens"], drafts or [1] * len(case["query_lens"]), strict=True)]
        for pad in padding(case)
    ]
    wrong: dict[str, str] = {}
    for what, left, right in (
        ("ids", [one.ids for one in ours], ids),
        ("commit forward", mine, commits),
    ):
        for row, (one, other, keep) in enumerate(zip(left, right, kept, strict=True)):
            bad = [place for place in range(len(other)) if keep[place] and one[place] != other[place]]
            if bad:
                wrong[what] = f"row {row}, position {bad[0]}: {one[bad[0]]} instead of {other[bad[0]]} ({len(bad)} positions differ)"
                break
    if any(len(row) != case["nfe"] for row in lengths):
        wrong["forwards"] = f"{[len(row) for row in lengths]} instead of {case['nfe']}"
    if lengths != expected:
        wrong["query lengths"] = f"{lengths} instead of {expected}"
    return wrong


def _comparable(commits: list[int], place: int, last: int) -> bool:
    return 0 <= commits[place] < last or -1 not in commits[: place + 1]


def _waiting(replays: Sequence[Replay], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Query lengths, and commits from block starts, as they are when rows wait for each other at block ends."""
    lengths: list[int] = []
    for first in range(0, len(replays[0].commits), size):
        pieces = [_forwards_of(one, first, size) for one in replays]
        lengths += max(pieces, key=len)
    return [lengths] * len(replays), [_from_block_start([one.commits], size)[0] for one in replays]


def _forwards_of(one: Replay, first: int, size: int) -> list[int]:
    start = max(one.commits[:first], default=-1) + 1
    return one.lengths[start : max(one.commits[first : first + size]) + 1]


def _from_block_start(commits: list[list[int]], size: int) -> list[list[int]]:
    """Commits counted from the forward at which their block opens, which is when all rows have finished the block before."""
    starts = [max(max(row[:first], default=-1) for row in commits) + 1 for first in range(0, len(commits[0]), size)]
    return [[commit - starts[place // size] for place, commit in enumerate(row)] for row in commits]
