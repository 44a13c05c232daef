"""Forward processes: what is masked, how often and with which weight (T1-T6, T9; noise statistics of the official D2F code)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dllm_toolkit.ops import corrupt
from dllm_toolkit.training.corruptors import (
    ActiveBlock,
    Batch,
    ExactCount,
    Independent,
    Mixture,
    Monotone,
    Pipelined,
    Uniform,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "vectors" / "training" / "d2f_training.json"
CORRUPTORS = [
    Uniform(),
    Uniform(stratified=False),
    ExactCount(),
    ActiveBlock((4, 8, 0), fully_masked=0.2, rest=0.5),
    Monotone(4),
    Independent(4),
    Pipelined(4),
    Mixture((ExactCount(), ActiveBlock((4,))), (0.3, 0.7)),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: int = 64, answer: int = 16, length: int = 32) -> Batch:
    tokens = torch.randint(0, 7, (rows, length), generator=generator(9))
    prompt = torch.randint(1, length - answer + 1, (rows,), generator=generator(8))
    return Batch(tokens, prompt, answer)


@pytest.mark.parametrize("corruptor", CORRUPTORS, ids=lambda c: type(c).__name__)
def test_only_the_answer_is_masked_and_only_masks_are_weighted(corruptor) -> None:
    rows = batch()
    masked, weight = corruptor(rows, generator())
    assert not (masked & ~rows.answer).any()
    assert not (weight[~masked] != 0).any()
    assert masked.any() and torch.isfinite(weight).all() and (weight >= 0).all()
    assert rows.answer.sum(1).eq(rows.answer_length).all()


@pytest.mark.parametrize("corruptor", CORRUPTORS, ids=lambda c: type(c).__name__)
def test_the_generator_decides_everything(corruptor) -> None:
    torch.manual_seed(1)
    first = corruptor(batch(), generator(3))
    torch.manual_seed(2)
    second = corruptor(batch(), generator(3))
    other = corruptor(batch(), generator(4))
    assert torch.equal(first.masked, second.masked) and torch.equal(first.weight, second.weight)
    assert not torch.equal(first.masked, other.masked)


@pytest.mark.parametrize("corruptor", [Uniform(), ExactCount(), Mixture((Uniform(), ExactCount()))], ids=str)
def test_weights_of_the_bound_sum_to_the_answer_length_on_average(corruptor) -> None:
    rows = batch(20_000)
    total = corruptor(rows, generator()).weight.double().sum(1)
    assert abs(total.mean() - 16) < 5 * total.std() / total.numel() ** 0.5 + 1e-5


def test_exact_count_masks_exactly_k_of_n_and_every_subset_equally_often() -> None:
    candidates = torch.zeros(60_000, 5, dtype=torch.bool)
    candidates[:, 1:] = True
    masked = corrupt.exact_count(torch.full((60_000,), 2), candidates, generator())
    assert masked.sum(1).eq(2).all() and not masked[:, 0].any()
    codes = (masked.long() * torch.tensor([16, 8, 4, 2, 1])).sum(1)
    counts = torch.bincount(codes, minlength=16)
    counts = counts[counts > 0].double()
    assert len(counts) == 6  # 4 choose 2
    assert ((counts - 10_000).abs() < 5 * (60_000 * (1 / 6) * (5 / 6)) ** 0.5).all()


def test_count_from_level_is_uniform_on_one_to_n() -> None:
    counts = corrupt.count_from_level((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, torch.full((1000,), 8))
    assert torch.bincount(counts).tolist() == [0] + [125] * 8
    assert corrupt.count_from_level(torch.tensor([0.9]), torch.tensor([0])).tolist() == [0]


def test_stratified_levels_have_one_draw_in_each_stratum() -> None:
    levels = corrupt.uniform_levels(50, generator()).sort().values
    assert torch.equal((levels * 50).long(), torch.arange(50))


def test_bernoulli_rate_and_limits() -> None:
    candidates = torch.ones(40_000, 3, dtype=torch.bool)
    level = torch.tensor([0.0, 0.3, 1.0]).expand(40_000, 3)
    rate = corrupt.bernoulli(level, candidates, generator()).double().mean(0)
    assert rate[0] == 0 and rate[2] == 1 and abs(rate[1] - 0.3) < 4 * (0.21 / 40_000) ** 0.5


@pytest.mark.parametrize("statistics", json.loads(GOLDEN.read_text())["noise_ratio_statistics"], ids=lambda s: str(s["max_blocks"]))
def test_monotone_levels_have_the_official_statistics(statistics) -> None:
    rows, blocks = 100_000, statistics["max_blocks"]
    levels = corrupt.monotone_levels(rows, blocks, generator())
    assert (levels.diff(dim=1) >= 0).all() and levels.min() >= 0.2 and levels.max() <= 0.7 + 1e-6
    sem = torch.tensor(statistics["std"]) * (1 / rows + 1 / statistics["samples"]) ** 0.5
    assert ((levels.mean(0) - torch.tensor(statistics["mean"])).abs() < 5 * sem).all()
    assert torch.allclose(levels.std(0), torch.tensor(statistics["std"]), atol=2e-3)
    for name, share in (("q05_last", 0.05), ("q50_last", 0.5), ("q95_last", 0.95)):
        assert abs(levels[:, -1].quantile(share) - statistics[name]) < 4e-3


def test_independent_levels_stay_in_their_interval_and_are_unordered() -> None:
    levels = corrupt.independent_levels(2000, 4, generator(), minimum=0.1, maximum=0.9)
    assert levels.min() >= 0.1 and levels.max() <= 0.9 and (levels.diff(dim=1) < 0).any()


def test_pipelined_levels_are_clean_then_rise_to_full() -> None:
    levels = corrupt.pipelined_levels(5000, 6, generator(), span=2, minimum=0.2)
    assert (levels.diff(dim=1) >= 0).all()
    front = (levels > 0).int().argmax(1)
    assert torch.bincount(front, minlength=6).min() > 600  # every block is the front sometimes
    assert levels.gather(1, front.unsqueeze(1)).min() >= 0.2
    beyond = torch.arange(6) >= (front + 2).unsqueeze(1)
    assert (levels[beyond] == 1).all()


def test_active_block_is_clean_before_and_masked_after() -> None:
    rows = batch(500)
    masked, weight = ActiveBlock((4,), rest=0.0)(rows, generator())
    for row in range(500):
        begin = int(rows.prompt_length[row])
        blocks = masked[row, begin : begin + 16].view(4, 4)
        weights = weight[row, begin : begin + 16].view(4, 4)
        active = int((weights.sum(1) > 0).int().argmax())
        assert not blocks[:active].any() and blocks[active + 1 :].all()
        assert (weights.sum(1) > 0).sum() == 1
        k = int(blocks[active].sum())
        assert k >= 1 and torch.allclose(weights[active][blocks[active]], torch.tensor(4 * 4 / k))


def test_active_block_last_block_may_be_short_and_whole_answer_is_one_block() -> None:
    rows = batch(4000, answer=10)
    masked, weight = ActiveBlock((4,))(rows, generator())
    total = weight.double().sum(1)
    assert abs(total.mean() - 10) < 5 * total.std() / 4000**0.5
    masked, weight = ActiveBlock((0,))(rows, generator())
    assert torch.allclose(weight.sum(1), torch.full((4000,), 10.0))


def test_active_block_fully_masked() -> None:
    rows = batch(300)
    masked, weight = ActiveBlock((8,), fully_masked=1.0, rest=0.25)(rows, generator())
    assert set(weight.unique().tolist()) <= {0.0, 0.25, 2.0}
    assert ((weight == 2).sum(1) == 8).all()


def test_mixture_draws_its_parts_with_their_probabilities() -> None:
    rows = batch(20_000)
    masked, _ = Mixture((ActiveBlock((16,), fully_masked=1.0), Monotone(16, 0.0, 0.0)), (3.0, 1.0))(rows, generator())
    share = (masked.sum(1) == 16).double().mean()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 20_000) ** 0.5


def test_block_levels_reach_the_positions_of_their_block() -> None:
    block = torch.tensor([[0, 0, 1, 1, 2, 2, 3]])
    spread = corrupt.spread(torch.tensor([[0.3, 0.6]]), block)
    assert torch.allclose(spread, torch.tensor([[0, 0, 0.3, 0.3, 0.6, 0.6, 0]]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(floor=1.5),
        lambda: Monotone(16, 0.7, 0.2),
        lambda: Monotone(0),
        lambda: ActiveBlock(()),
        lambda: ActiveBlock((8,), fully_masked=2.0),
        lambda: Mixture(()),
        lambda: Mixture((ExactCount(),), (0.5, 0.5)),
    ],
)
def test_bad_parameters_are_refused(make) -> None:
    with pytest.raises(corrupt.CorruptionError, match="Write"):
        make()
