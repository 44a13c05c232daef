"""Fast-dLLM v1 (NVlabs/Fast-dLLM): threshold and factor, without cache, with prefix cache, with dual cache, batches."""

from __future__ import annotations

import pytest

from tests.golden import replay

CAPPED = "fast_dllm_v1_dual_threshold_step_cap"
WAITING = "fast_dllm_v1_none_batch2_threshold"
ALL = replay.params("fast_dllm_v1_llada")
CASES = [case for case in ALL if case.id != CAPPED]


@pytest.mark.parametrize("case", CASES)
def test_ids_forwards_and_commit_order(case: replay.Case) -> None:
    # With a threshold rows need different numbers of forwards. The official loop makes them wait for each other at the end of a
    # block; ours lets each row go on, so only the busiest row's total is the official one.
    replay.check(case, *replay.run(case), waits=case["name"] == WAITING)


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_notice_its_company(case: replay.Case) -> None:
    replay.check(case, *replay.run(case, company=True), waits=case["name"] == WAITING)


@pytest.mark.parametrize("case", [case for case in ALL if case.id == CAPPED])
def test_step_cap_leaves_masks(case: replay.Case) -> None:
    replay.check_until_the_last_forward(case)


@pytest.mark.parametrize("case", ALL)
def test_query_tokens_of_each_forward(case: replay.Case) -> None:
    ours = replay.query_lengths(case)
    if case["name"] == WAITING:
        ours = [[max(lengths)] * len(lengths) for lengths in ours]  # a row that is ahead has finished before the last forwards
    assert ours == [[length] * len(replay.prompts(case)) for length in case["query_lens"]]
