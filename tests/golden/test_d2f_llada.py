"""D2F's evaluation loop (zhijie-group/Discrete-Diffusion-Forcing): pipelined blocks with an exact cache, adapter merged."""

from __future__ import annotations

import pytest

from tests.golden import replay

CASES = replay.params("d2f_llada")


@pytest.mark.parametrize("case", CASES)
def test_ids_forwards_and_commit_order(case: replay.Case) -> None:
    replay.check(case, *replay.run(case))


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_notice_its_company(case: replay.Case) -> None:
    replay.check(case, *replay.run(case, company=True))


@pytest.mark.parametrize("case", CASES)
def test_query_tokens_of_each_forward(case: replay.Case) -> None:
    assert replay.query_lengths(case) == [[length] for length in case["query_lens"]]
