"""D2F's demo loop: the same pipeline as the evaluation loop, written a second time by its authors."""

from __future__ import annotations

import pytest

from tests.golden import replay

CASES = replay.params("d2f_llada_demo")


@pytest.mark.parametrize("case", CASES)
def test_ids_forwards_and_commit_order(case: replay.Case) -> None:
    replay.check(case, *replay.run(case))


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_notice_its_company(case: replay.Case) -> None:
    replay.check(case, *replay.run(case, company=True))


@pytest.mark.parametrize("case", CASES)
def test_query_tokens_of_each_forward(case: replay.Case) -> None:
    assert replay.query_lengths(case) == [[length] for length in case["query_lens"]]
