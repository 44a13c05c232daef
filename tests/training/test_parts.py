"""Averages, schedules, optimiser groups and the batch source, each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dllm_toolkit.training.data import AlternatingData, DataError, Source, StoryData, Stream, fold
from dllm_toolkit.training.ema import Average
from dllm_toolkit.training.optim import AdamW, Constant, Cosine


def test_average_follows_its_formula_and_swaps_in_and_out() -> None:
    """T32."""
    layer = nn.Linear(2, 2, bias=False)
    layer.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    average = Average(layer, 0.9)
    expected = layer.weight.detach().clone()
    for step in range(1, 120):
        with torch.no_grad():
            layer.weight.add_(0.1)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    live = layer.weight.detach().clone()
    with average.applied():
        assert torch.allclose(layer.weight, expected, atol=1e-4)
        with average.applied():
            assert torch.allclose(layer.weight, expected, atol=1e-4)
    assert torch.equal(layer.weight, live) and average.names == ["weight"]


def test_average_survives_its_state_dict() -> None:
    layer = nn.Linear(2, 2)
    average, other = Average(layer, 0.9), Average(nn.Linear(2, 2), 0.9)
    average.update()
    other.load_state_dict(average.state_dict())
    assert other.updates == 1 and all(torch.equal(a, b) for a, b in zip(average.shadow, other.shadow, strict=True))


def test_schedules() -> None:
    cosine = Cosine(warmup_steps=9, final=0.1)
    assert cosine.factor(0, 0.0) == pytest.approx(0.1) and cosine.factor(9, 0.0) == 1.0
    assert cosine.factor(1000, 0.5) == pytest.approx(0.55) and cosine.factor(1000, 1.0) == pytest.approx(0.1)
    assert Constant(warmup_steps=1).factor(0, 0.9) == 0.5 and Constant().factor(0, 0.9) == 1.0


def test_weight_decay_is_for_matrices_and_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.requires_grad_(False)
    optimizer = AdamW(weight_decay=0.3).build(module.named_parameters(), torch.device("cpu"))
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.3), (2, 0.0)]


def source(**changes) -> Source:
    arguments = {"answer_length": 2, "batch_size": 4, "seed": 7, **changes}
    return Source(torch.arange(20).view(20, 1).expand(20, 5).to(torch.int16), torch.full((20,), 3), **arguments)


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    rows = source()
    epochs = [torch.cat([rows.batch(epoch * 5 + i).tokens[:, 0] for i in range(5)]) for epoch in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(20)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(source().batch(7).tokens, rows.batch(7).tokens)  # no history
    assert not torch.equal(source(seed=8).batch(0).tokens, rows.batch(0).tokens)


def test_ranks_share_an_epoch() -> None:
    parts = [source(batch_size=2, rank=rank, world=2).batch(1).tokens[:, 0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), source().batch(1).tokens[:, 0])


def test_stream_starts_where_it_is_told_when_it_is_iterated() -> None:
    at, rows = [0], source()
    stream = Stream(rows, lambda: at[0])
    at[0] = 6
    first = next(iter(stream))
    assert torch.equal(first.tokens, rows.batch(6).tokens)


def test_too_few_rows_for_a_batch() -> None:
    with pytest.raises(DataError, match="size: 32"):
        source(batch_size=32)


def test_fold_gives_unrelated_seeds() -> None:
    seeds = {fold(seed, step, kind) for seed in range(5) for step in range(50) for kind in range(3)}
    assert len(seeds) == 750 and all(0 <= seed < 1 << 63 for seed in seeds) and fold(1, 2, 3) != fold(1, 3, 2)


def test_alternating_data_gives_a_batch_of_each_part_in_turn() -> None:
    terse = StoryData(size=32, heldout=8, batch_size=8, workers=0)
    worded = StoryData(size=48, heldout=8, batch_size=8, workers=0, style="worded", answer_length=128, prompt_length_max=112)
    both = AlternatingData((terse, worded))
    train, heldout = both.sources(torch.device("cpu"), seed=3)
    assert train.batches_per_epoch == 8
    lengths = [train.batch(index).answer_length for index in range(6)]
    assert lengths == [80, 128] * 3
    assert torch.equal(train.batch(5).tokens, train.batch(5).tokens) and not torch.equal(train.batch(1).tokens, train.batch(3).tokens)
    assert [batch.answer_length for batch in heldout.all_batches()] == [80, 128]
    texts = [example.text for example in both.examples(5)]
    assert [text.endswith("Explain:") for text in texts] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("parts", "message"), [((), "parts is empty"), ((StoryData(batch_size=8), StoryData(batch_size=4)), "differ in batch_size")]
)
def test_alternating_data_refuses_what_does_not_go_together(parts: tuple[StoryData, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        AlternatingData(parts)


def test_worded_rows_are_refused_where_they_would_be_cut() -> None:
    with pytest.raises(DataError, match="style worded"):
        StoryData(style="worded").check(512)
