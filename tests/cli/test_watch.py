"""`dllm-toolkit watch` on untrained tiny models: what it decodes is what compare and generate decode, what it writes, what it refuses."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from dllm_toolkit import cli
from dllm_toolkit.evaluation import ledger, trace
from dllm_toolkit.models.fresh import fresh

RECIPE = """
task: {{_component_: stories, size: 3, seed: 7}}
models: {{teacher: {{_component_: load, path: "{model}"}}}}
configurations:
  vanilla: {{model: teacher, decoder: vanilla, cache: none}}
  fast_dllm: {{model: teacher, decoder: {{_component_: fast_dllm, block_length: 8, threshold: 0.01}}, cache: dual}}
  staged: {{model: teacher, decoder: semi_ar, driver: {{_component_: staged, stages: [{{}}]}}}}
run: {{max_new_tokens: 16, device: cpu, threads: 1, warm_up: 0, seed: 3}}
output: {output}
report: {{tensorboard: false, html: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    model = fresh(width=32, layers=2, heads=2, max_positions=128, seed=1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8.0)
    model.save_pretrained(folder / "model")
    (folder / "compare.yaml").write_text(RECIPE.format(model=folder / "model", output=folder / "run"))
    (folder / "generate.yaml").write_text(
        f'model: {{_component_: load, path: "{folder / "model"}"}}\ndecoder: {{_component_: fast_dllm, block_length: 4, threshold: 0.01}}\n'
        'prompt: [Noah brings 32 magnets, Nora has 3]\nprompt_format: "Question: {prompt} Answer:"\nrun: {max_new_tokens: 8}\n'
    )
    return folder


def watch(*words: object) -> int:
    return cli.main(["watch", *map(str, words)])


def test_watch_shows_what_compare_decodes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exports = ["--html", folder / "new" / "t.html", "--gif", folder / "t.gif", "--json", folder / "t.json"]
    assert watch(folder / "compare.yaml", "--problem", "1", *exports) == 0
    shown = capsys.readouterr()
    assert "configurations.staged.driver is left out" in shown.err and "Written:" in shown.err
    assert "\x1b" not in shown.out and "vanilla  step 16  16 forwards  16 of 16 decided  1.00 tokens/forward" in shown.out
    assert cli.main(["compare", str(folder / "compare.yaml")]) == 0
    capsys.readouterr()

    _, records = ledger.read(folder / "run" / "ledger.jsonl")
    found = trace.load(folder / "t.json")
    assert [one.name for one in found] == ["vanilla", "fast_dllm"]
    for one in found:
        record = next(r for r in records if r.configuration == one.name and r.problem == one.problem)
        cells = one.canvas(len(one.frames))
        assert tuple(cell.token for cell in cells) == record.output and one.text == record.text and one.correct == record.correct
        assert one.frames[-1].forwards == record.nfe and trace.counted(cells, one.eos_ids) == record.tokens
        assert "".join(one.piece(cell) for cell in cells[: record.tokens]) == "".join(record.pieces)
    assert found[1].about == "fast_dllm(block_length=8, threshold=0.01), cache dual" and found[1].model == "teacher"
    assert (folder / "t.gif").read_bytes()[:6] == b"GIF89a" and "fast_dllm" in (folder / "new" / "t.html").read_text()

    # what was written is shown again, without the model
    assert watch(folder / "t.json", "--decoder", "fast_dllm") == 0
    again = capsys.readouterr().out
    assert again.splitlines()[-3:] == shown.out.splitlines()[-3:] and "vanilla" not in again


def test_watch_a_generation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(folder / "generate.yaml", "--problem", "1", "run.seed=4", "--json", folder / "g.json") == 0
    assert "Nora has 3" in capsys.readouterr().out
    (one,) = trace.load(folder / "g.json")
    assert (one.name, one.prompt, one.length, one.correct) == ("fast_dllm", "Nora has 3", 8, None)


BAD = {
    "no such problem": (["compare.yaml", "--problem", "3"], r"no problem '3' among 3 problems.*0 \.\. 2, or an id such as "),
    "no such decoder": (["compare.yaml", "--decoder", "d2f"], r"no configuration 'd2f'.*vanilla, fast_dllm"),
    "a driver that was asked for": (["compare.yaml", "--decoder", "staged"], r"compare.yaml:\d+.*got the driver Staged"),
    "a decoder of a generation": (["generate.yaml", "--decoder", "d2f"], r"Write decoder=d2f instead"),
    "speed": (["compare.yaml", "--speed", "-1"], r"speed must be 0 or more"),
    "a directory": (["compare.yaml", "--gif", "."], r"is a directory.*--gif trace.gif"),
    "a recipe that decodes nothing": (["{repository}/recipes/eval/harness.yaml"], r"says neither what to decode"),
    "a recipe that is no trace": (["model/config.json"], r"no trace of a decode"),
    "overrides of a trace": (["model/config.json", "a=b"], r"got a=b to change it"),
    "no file": (["missing.json"], r"missing.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = BAD[case]
    repository = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(folder)
    assert watch(*(word.format(repository=repository) for word in words)) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err) and shown.out == "" and "Traceback" not in shown.err


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_interrupt_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C in the middle of the live picture: the cursor comes back, one line says so, exit code 130."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    terminal = Terminal()
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "60"), ("LINES", "20")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dllm_toolkit.evaluation.trace_terminal.time.sleep", pause)
    monkeypatch.setattr("sys.stdout", terminal)
    assert watch(folder / "compare.yaml", "--decoder", "vanilla", "--speed", "4") == 130
    shown = terminal.getvalue()
    assert capsys.readouterr().err.strip().endswith("Interrupted.")
    assert "step 3" in shown and "step 4" not in shown and min(pauses) > 0
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
