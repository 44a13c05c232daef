"""LLaDA's generate.py (ML-GSAI/LLaDA): quotas, blocks, end-of-text flags, idle steps, a padded batch."""

from __future__ import annotations

import pytest

from tests.golden import replay

CASES = replay.params("llada_generate")


@pytest.mark.parametrize("case", CASES)
def test_ids_forwards_and_commit_order(case: replay.Case) -> None:
    replay.check(case, *replay.run(case))


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_notice_its_company(case: replay.Case) -> None:
    replay.check(case, *replay.run(case, company=True))


@pytest.mark.parametrize("case", CASES)
def test_query_tokens_of_each_forward(case: replay.Case) -> None:
    # The official batch is padded on the left and runs the padding through the model; ours has nothing to run there.
    padding = [keep.count(0) for keep in replay.rows(case, "attention_mask")] if "attention_mask" in case else [0]
    assert replay.query_lengths(case) == [[length - pad for pad in padding] for length in case["query_lens"]]
