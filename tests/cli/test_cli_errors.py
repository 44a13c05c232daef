"""The command line: help for newcomers, one message and exit code 2 for bad input, nothing on stdout then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dllm_toolkit import cli, registry
from dllm_toolkit.errors import ToolkitError

COMMANDS = ["compare", "report", "generate", "train", "list", "show", "check", "golden", "doctor"]
TINY = """
model: {_component_: fresh, width: 16, layers: 1, heads: 2, max_positions: 64}
decoder: {_component_: semi_ar, block_length: 4}
run: {max_new_tokens: 6}
"""
COMPARE = """
task: {_component_: stories, size: 2}
models: {tiny: {_component_: fresh, width: 16, layers: 1, heads: 2}}
configurations: {only: {model: tiny, decoder: vanilla}}
output: %s
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TINY)
    return path


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *arguments: str | Path) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert code == 0 and err == ""
    assert "examples:\n  dllm-toolkit " in out and len(out.splitlines()) > 10


def test_general_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    assert run(capsys, "--version")[1].startswith("dllm-toolkit ")


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["list", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom dllm_toolkit.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        "print(sorted({'torch', 'yaml', 'lightning', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "required: COMMAND"),
        (["compar"], "invalid choice: 'compar'"),
        (["compare"], "required: RECIPE"),
        (["compare", "x.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["list", "decoder", "cache"], "unrecognized arguments: cache"),
        (["list", "decoders"], "there is no kind 'decoders'. Write one of: model, decoder"),
        (["check", "no_such_thing"], "cannot find 'no_such_thing'"),
        (["check", "os.system"], "'os.system' is refused"),
        (["check", "no_such_module.Rule"], "cannot find the module 'no_such_module'"),
    ],
)
def test_wrong_commands(capsys, arguments, why):
    assert why in fails(capsys, *arguments)


@pytest.mark.parametrize("command", ["compare", "generate", "show"])
def test_unusable_files(capsys, command, tmp_path):
    assert "no such file" in fails(capsys, command, tmp_path / "nowhere.yaml")
    assert "a directory" in fails(capsys, command, tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("decoder: [d2f\ncache: none\n")
    err = fails(capsys, command, bad)
    assert err.startswith(f"{bad}:2: not valid YAML: ") and len(err.splitlines()) == 1
    bad.write_text("")
    assert "the recipe is empty" in fails(capsys, command, bad)


@pytest.mark.parametrize("command", ["generate", "show"])
def test_all_errors_of_a_recipe(capsys, command, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: laod\ndecoder:\n  _component_: d2f\n  treshold: 0.8\nrun: {max_new_tokens: many}\nseed: 1\n")
    lines = fails(capsys, command, bad).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{bad}:1: model: cannot find 'laod'; did you mean 'load'?")
    assert lines[1].startswith(f"{bad}:4: decoder.treshold: ") and lines[1].endswith("write: `threshold: 0.8`")
    assert lines[2].startswith(f"{bad}:5: run.max_new_tokens: expected a whole number, got the text 'many'.")
    assert lines[3].startswith(f"{bad}:6: seed: unknown key 'seed'.")


def test_a_strangers_recipe_calls_nothing(capsys, recipe, monkeypatch):
    import os

    called = []
    monkeypatch.setattr(os, "system", lambda command: called.append(command))
    for slot in ("model", "decoder", "cache", "decoder.schedule"):
        err = fails(capsys, "generate", recipe, f"{slot}={{_component_: os.system, command: ls}}", "prompt=Hi")
        assert called == [] and ("is refused" in err or "unknown key 'schedule'" in err)


def test_a_wrong_argument_names_its_line(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(COMPARE.replace("size: 2", "size: 0") % (tmp_path / "out"))
    err = fails(capsys, "compare", bad)
    assert err.startswith(f"{bad}:2: task.size: size must be at least 1, got 0.")
    assert not (tmp_path / "out").exists()


def test_generate(capsys, recipe):
    code, out, err = run(capsys, "generate", recipe, "--trace", "prompt=Question: How many apples: 3 or 4?")
    assert code == 0 and len(out.splitlines()) == 1
    assert "step   1 row 0: " in err and "_ _" in err and "6 tokens in" in err
    code, out, _ = run(
        capsys,
        "generate",
        recipe,
        "prompt=[How many, Tom]",
        "prompt_format=Question: {prompt}",
        "run.batch_size=1",
    )
    assert code == 0 and len(out.splitlines()) == 2
    again = run(capsys, "generate", recipe, "prompt=[How many, Tom]", "prompt_format=Question: {prompt}")[1]
    assert again == out  # the size of the batch changes nothing


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], "the prompt is missing"),
        (["prompt="], "the prompt is missing"),
        (["prompt=' '"], "the prompt is empty"),
        (["prompt=Hi", "run.device=cuda:99"], "run.device: this device is not on this machine"),
        (["prompt=Hi", "run.device=toaster"], "run.device: this is no device"),
        (
            ["prompt=Hi", "run.max_new_tokens=0"],
            "run.max_new_tokens: max_new_tokens must be at least 1, got 0",
        ),
        (["prompt=Hi", "run.max_new_tokens=200"], "too long"),
        (["prompt=Hi", "prompt_format=Question:"], "prompt_format must contain {prompt}"),
        (["prompt=Hi", "decoder={_component_: autoregressive}"], "autoregressive"),
        (
            ["prompt=Hi", "model={_component_: load, path: ./nowhere}"],
            "no checkpoint directory at './nowhere'",
        ),
        (["Hi"], "an override is `key=value`"),
    ],
)
def test_generate_refuses(capsys, recipe, overrides, why):
    assert why in fails(capsys, "generate", recipe, *overrides)


def test_show(capsys, recipe):
    code, out, _ = run(capsys, "show", recipe, "decoder.block_size=8", "run.gen_length=5")
    assert code == 0
    assert "  decoder: block()" in out and "semi_autoregressive(block_length=8" in out
    assert "decoder: {_component_: semi_ar, block_length: 8}" in out and "run: {max_new_tokens: 5}" in out


def test_list(capsys):
    code, out, _ = run(capsys, "list", "decoder")
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[:2] == ["kind", "name"]
    assert [line.split()[1] for line in lines[1:]] == registry.names("decoder")
    assert "2508.09192" in next(line for line in lines if line.split()[1] == "d2f")


def test_check_sums_up_the_contract(capsys, monkeypatch):
    from dllm_toolkit.testing import contract

    seen = []

    def results(component):
        seen.append(component)
        names = ["d1 [full, none]", "d1 [full, dual]", "d2 [full, none]", "d2 [full, dual]"]
        return [contract.CheckResult(name, name != "d2 [full, dual]", "says why") for name in names]

    monkeypatch.setattr(contract, "check_component", results)
    code, out, err = run(capsys, "check", "d2f", "block_size=4", "threshold=0.5")
    assert code == 1 and seen[0].schedule.block_length == 4 and seen[0].commit.at_least == 0.5
    assert "pass      2/2  d1: says why" in out and "FAIL      1/2  d2\n" in out and "[full, dual] says why" in out
    assert "checking the decoder:" in err
    monkeypatch.setattr(contract, "check_component", lambda component: results(component)[:3])
    assert run(capsys, "check", "dual")[0] == 0
    err = fails(capsys, "check", "block", "commit=quota")
    assert err.startswith("<override> block: missing key 'schedule'") and "write: `schedule=<a schedule>`" in err


def test_interruption_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    from dllm_toolkit.evaluation import compare

    def interrupted(recipe, built, dry_run):
        raise KeyboardInterrupt

    path = tmp_path / "c.yaml"
    path.write_text(COMPARE % (tmp_path / "out"))
    monkeypatch.setattr(compare, "run_comparison", interrupted)
    code, out, err = run(capsys, "compare", path)
    assert code == 130 and out == "" and "same command again" in err

    def left(recipe, built, dry_run):  # what Lightning does with Ctrl-C
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(compare, "run_comparison", left)
    assert run(capsys, "compare", path)[0] == 130


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    from dllm_toolkit.evaluation import compare

    def defective(recipe, built, dry_run):
        raise RuntimeError("a bug")

    path = tmp_path / "c.yaml"
    path.write_text(COMPARE % (tmp_path / "out"))
    monkeypatch.setattr(compare, "run_comparison", defective)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["compare", str(path)])


def test_an_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "out").write_text("a file where the directory should go")
    path = tmp_path / "c.yaml"
    path.write_text(COMPARE % (tmp_path / "out" / "deeper"))
    assert str(tmp_path / "out") in fails(capsys, "compare", path)


def test_all_errors_have_one_base():
    for error in registry.UnknownName("x"), ToolkitError("x"):
        assert isinstance(error, ToolkitError) and isinstance(error, ValueError)
