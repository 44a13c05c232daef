"""What a comparison finds wrong after the recipe was checked is told with file, line and key, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_toolkit import cli

RECIPE = """\
task: {_component_: stories, size: 2}
models:
  tiny: {_component_: fresh, width: 16, layers: 1, heads: 2, max_positions: 128}
configurations:
  first.one:
    model: tiny
    decoder: vanilla
  second:
    model: tiny
    decoder: {_component_: d2f, block_length: 4}
    cache: none
run:
  max_new_tokens: 8
  device: cpu
"""


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("cache: none", "cache: block_causal", ":11: configurations.second.cache: the cache block_causal does not fit"),
        ("decoder: vanilla", "decoder: autoregressive", ":7: configurations.first.one.decoder: the decoder "),
        ("max_new_tokens: 8", "max_new_tokens: 120", ":13: run.max_new_tokens: the prompt of "),
        ("device: cpu", "device: meta", ":14: run.device: run.device is no device"),
        ("device: cpu", "device: sofa", ":14: run.device: run.device is no device"),
        ("device: cpu", "threads: 5000", ":14: run.threads: threads must be at most 1024"),
        ("model: tiny\n    decoder: vanilla", "model: tony\n    decoder: vanilla", ":6: configurations.first.one.model: "),
        ("device: cpu", "device: cpu\nbaselines: {vanilla: third}", ":15: baselines.vanilla: baselines.vanilla names no configuration"),
    ],
)
def test_refusals_name_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, place: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.replace(old, new, 1))
    assert cli.main(["compare", str(path), f"output={tmp_path / 'run'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and str(path) + place in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
