"""`dllm-toolkit compare` end to end on untrained tiny models: what it writes, how it resumes, what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_toolkit import cli
from dllm_toolkit.evaluation import ledger, report
from dllm_toolkit.models.fresh import fresh

COMMAND = [sys.executable, "-c", "import sys; from dllm_toolkit.cli import main; sys.exit(main())", "compare"]
ROWS = ("vanilla", "semi_ar", "fast_dllm", "confidence_adaptive", "autoregressive", "d2f")

RECIPE = """
task: {{_component_: stories, size: 4, seed: 7}}
models:
  teacher: {{_component_: load, path: "{models}/teacher"}}
  student: {{_component_: load, path: "{models}/teacher", attention: block_causal, block_size: 8}}
  ar: {{_component_: load, path: "{models}/ar"}}
configurations:
  vanilla: {{model: teacher, decoder: vanilla, cache: none}}
  semi_ar: {{model: teacher, decoder: {{_component_: semi_ar, block_length: 8}}}}
  fast_dllm: {{model: teacher, decoder: {{_component_: fast_dllm, block_length: 8, threshold: 0.01}}, cache: dual}}
  confidence_adaptive: {{model: teacher, decoder: {{_component_: confidence_adaptive, block_length: 8, threshold: 0.01}}, cache: prefix}}
  autoregressive: {{model: ar, decoder: autoregressive, cache: block_causal}}
  d2f: {{model: student, decoder: {{_component_: d2f, block_length: 8, threshold: 0.01}}, cache: block_causal}}
baselines: {{autoregressive: autoregressive, vanilla: vanilla}}
run: {{max_new_tokens: 24, batch_size: 1, device: cpu, dtype: float64, threads: 1, warm_up: 1}}
output: {output}
report: {{tensorboard: false, html: false}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained models on the disk. Larger weights than a fresh model's, so that answers depend on their questions."""
    directory = tmp_path_factory.mktemp("models")
    sizes = {"width": 32, "layers": 2, "heads": 2, "max_positions": 128}
    for name, model in (
        ("teacher", fresh(**sizes, seed=1)),
        ("ar", fresh(**sizes, attention="causal", shift=1, seed=2)),
    ):
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(8.0)
        model.save_pretrained(directory / name)
    return directory


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(models=models, output=tmp_path / "run"))
    return path


def run(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, str(recipe), *overrides], capture_output=True, text=True, timeout=300, env=environment)


def test_end_to_end(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(recipe, "report.tensorboard=true", "report.html=true", "run.warm_up=0")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "run"

    # the last line of stdout is one JSON object with a row a configuration; above it stands the table
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert [row["name"] for row in result["rows"]] == list(ROWS)
    for row in result["rows"]:
        assert row["problems"] == 4 and 0 <= row["accuracy"] <= 1 and row["tokens_per_second"] > 0 and row["nfe"] >= 1
        assert row["tokens_per_forward"] > 0 and row["speedup_vs_ar"] > 0 and row["speedup_vs_vanilla"] > 0
    assert all(any(line.startswith(name) for line in lines[:-1]) for name in ROWS)
    assert "d2f: starting" in done.stderr

    # every number comes from the ledger
    header, records = ledger.read(output / "ledger.jsonl")
    assert len(records) == 24 and len({record.problem for record in records}) == 4
    summaries = report.summaries_of(header, records)
    assert [round(summary.tokens_per_second, 6) for summary in summaries] == [row["tokens_per_second"] for row in result["rows"]]
    by_name = {summary.name: summary for summary in summaries}
    assert by_name["autoregressive"].speedup_vs_ar == by_name["vanilla"].speedup_vs_vanilla == 1.0
    assert by_name["vanilla"].nfe == 24  # one token a forward, no early stop
    assert by_name["d2f"].tokens_per_forward > 1.0
    for record in records:
        assert len(record.output) == record.canvas_tokens == len(record.born) == 24
        assert 1 <= record.tokens <= 24 and len(record.pieces) == record.tokens
        assert "".join(record.pieces).replace("<bos>", "").startswith(record.text[:5])  # the text leaves special tokens out
        assert record.nfe >= 1 and record.lanes >= record.nfe and record.seconds == record.batch_seconds > 0
        if record.configuration == "autoregressive":
            assert record.nfe == record.tokens and list(record.born[: record.tokens]) == list(range(record.tokens))

    # the header says what was run, on what, and how it was counted
    assert header.recipe["task"]["seed"] == 7 and "torch" in header.versions and header.made_on["threads"] == 1
    assert header.batch_size == 1 and header.counting == ledger.COUNTING and set(header.made_of) >= {"code", "weights.ar"}

    # files for people
    assert json.loads((output / "summary.json").read_text())["rows"][0]["name"] == "vanilla"
    page = (output / "report.html").read_text()
    assert all(name in page for name in ROWS) and "<svg" in page and "prefers-color-scheme:dark" in page
    assert not re.search(r"https?://|<script|@import|url\(|src=|<link", page)  # nothing from the network
    runs = {folder.name for folder in (output / "tensorboard").iterdir()}
    assert runs == {*ROWS, "comparison"}

    # given again: nothing is measured, the same result is shown; the resolved recipe that was written is the same recipe
    before = (output / "ledger.jsonl").read_bytes()
    assert cli.main(["compare", str(output / "recipe.yaml"), "report.tensorboard=false"]) == 0
    again = capsys.readouterr()
    assert (output / "ledger.jsonl").read_bytes() == before
    assert json.loads(again.out.splitlines()[-1]) == result and "already holds 24 of 24" in again.err


def test_answers_do_not_depend_on_the_batch(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("one", 1), ("three", 3)):
        assert (
            cli.main(
                [
                    "compare",
                    str(recipe),
                    f"run.batch_size={size}",
                    f"output={tmp_path / name}",
                    "run.max_new_tokens=16",
                ]
            )
            == 0
        )
    one, three = (ledger.read(tmp_path / name / "ledger.jsonl")[1] for name in ("one", "three"))
    assert [r.batch_rows for r in three[:4]] == [3, 3, 3, 1]
    answers = [{(r.configuration, r.problem): (r.output, r.nfe, r.lanes, r.born) for r in records} for records in (one, three)]
    assert answers[0] == answers[1]
    for records in (one, three):  # seconds of the records add up to the wall time of the batches
        batches = {(r.configuration, r.batch): r.batch_seconds for r in records}
        assert sum(r.seconds for r in records) == pytest.approx(sum(batches.values()))
    capsys.readouterr()


BAD = {
    "unknown key": (["run.batchsize=2"], r"batch_size"),
    "wrong type": (["run.max_new_tokens=many"], r"max_new_tokens"),
    "bad value": (["run.batch_size=0"], r"batch_size must be at least 1"),
    "unknown decoder": (["configurations.d2f.decoder._component_=d2"], r"d2f"),
    "a function of the standard library": (["configurations.d2f.decoder._component_=os.system"], r"refused"),
    "unknown model name": (["configurations.d2f.model=pupil"], r"names no model, got 'pupil'"),
    "unknown baseline": (["baselines.vanilla=plain"], r"names no configuration, got 'plain'"),
    "a cache that the model refuses": (
        ["configurations.vanilla.cache=block_causal"],
        r"configurations.vanilla.cache: the cache block_causal",
    ),
    "a decoder that the model refuses": (
        ["configurations.vanilla.decoder=autoregressive"],
        r"configurations.vanilla.decoder: the decoder",
    ),
    "too long": (["run.max_new_tokens=120"], r"128 positions.*Write run.max_new_tokens="),
    "no such device": (["run.device=cuda:63"], r"not on this machine|CUDA"),
    "no device at all": (["run.device=gpu"], r"run.device is no device"),
    "no checkpoint": (["models.ar.path=nowhere/at-all-there"], r"nowhere"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_message_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert cli.main(["compare", str(recipe), *overrides]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err, re.DOTALL), shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_ledger_of_another_recipe_is_left_alone(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["run.max_new_tokens=4", "run.warm_up=0"]
    assert cli.main(["compare", str(recipe), *small]) == 0
    before = {item: item.read_bytes() for item in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert cli.main(["compare", str(recipe), *small, "run.seed=3"]) == 2
    shown = capsys.readouterr()
    assert "belongs to another recipe: run.seed" in shown.err and "output=" in shown.err and shown.out == ""
    assert {item: item.read_bytes() for item in (tmp_path / "run").iterdir()} == before


def test_retrained_weights_are_noticed(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fresh(width=32, layers=1, heads=2, max_positions=128, attention="causal", shift=1, seed=5)
    model.save_pretrained(tmp_path / "own")
    only = ["run.max_new_tokens=4", "run.warm_up=0", f"models.ar.path={tmp_path / 'own'}"]
    assert cli.main(["compare", str(recipe), *only]) == 0
    model.lm_head.weight.data.mul_(1.01)
    model.save_pretrained(tmp_path / "own")
    capsys.readouterr()
    assert cli.main(["compare", str(recipe), *only]) == 2
    assert "other code or weights: weights.ar" in capsys.readouterr().err


def test_reports_can_be_made_again_from_the_ledger(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(recipe), "run.max_new_tokens=8", "run.warm_up=0"]) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    output = tmp_path / "run"
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "dllm_toolkit.evaluation.report",
            output / "ledger.jsonl",
            tmp_path / "picture.png",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == json.loads(first)["rows"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG") and (output / "report.html").is_file()
