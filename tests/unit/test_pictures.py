"""Looks that can be tested: numbers do not cover each other, TensorBoard shows every setting, words agree with their numbers."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as some

from dllm_toolkit.evaluation.page import _runs
from dllm_toolkit.evaluation.pictures import machine, plural, spread

PLACES = some.lists(some.tuples(some.floats(0, 60), some.floats(40, 60)), max_size=8)


@given(PLACES)
def test_numbers_do_not_cover_each_other(places: list[tuple[float, float]]) -> None:
    heights = spread(places, 10, -1000, 1000)
    for (i, a), (j, b) in combinations(enumerate(heights), 2):
        assert math.hypot(places[i][0] - places[j][0], a - b) >= 10 - 1e-3


def test_a_free_number_stays_on_its_point() -> None:
    assert spread([(0, 5), (50, 5)], 10, 0, 100) == [5, 5]
    assert spread([(0, 5), (0, 5)], 10, 0, 100) == [5, 15]  # below would leave the picture


def test_runs_of_the_commit_order() -> None:
    assert _runs([0, 0, 2, -1, 2, 2]) == [(0, 2, 0), (2, 1, 2), (4, 2, 2)]


def test_words() -> None:
    class Header:
        made_on = {"device": "a CPU", "kind": "cpu", "dtype": "float32", "threads": 1}

    assert machine(Header) == "a CPU, 1 thread, float32"  # type: ignore[arg-type]
    assert plural(2, "thread") == "2 threads"


def test_tensorboard_declares_the_settings_of_all_runs(tmp_path: Path) -> None:
    """TensorBoard shows the columns that the first run names, so a decoder's threshold must stand in each."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import plugin_data_pb2

    from dllm_toolkit.evaluation.ledger import Summary
    from dllm_toolkit.evaluation.tensorboard import write_tensorboard

    numbers = {name: 1 for name in Summary.__dataclass_fields__}
    summaries = [Summary(**{**numbers, "name": name}) for name in ("plain", "tuned")]

    class Header:
        recipe = {"configurations": {"plain": {"decoder": "vanilla"}, "tuned": {"decoder": {"_component_": "d2f", "threshold": 0.9}}}}
        counting = ("how",)

    write_tensorboard(tmp_path, Header, [], summaries)  # type: ignore[arg-type]
    for name in ("plain", "tuned"):
        columns = set()
        for event in EventFileLoader(str(next((tmp_path / name).glob("events*")))).Load():
            for value in event.summary.value:
                if value.tag == "_hparams_/experiment":
                    content = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    columns = {info.name for info in content.experiment.hparam_infos}
        assert columns == {"decoder", "decoder.threshold"}
