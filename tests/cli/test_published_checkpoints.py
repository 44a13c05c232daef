"""`dllm-toolkit generate` on checkpoints of others: ids instead of text, and what is said when a hub id is out of reach."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_toolkit import cli

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "golden" / "vectors"
RECIPE = str(ROOT / "recipes" / "decode" / "d2f_llada.yaml")
END = 258  # end-of-text of the tiny checkpoint
TINY = (
    f"model.path={VECTORS / 'llada-tiny'}",
    f"model.adapter={VECTORS / 'lora-llada-tiny'}",
    "model.device=cpu",
    "model.dtype=float32",
)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["generate", RECIPE, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    return err


def test_the_recipe_repeats_an_official_decode(capsys: pytest.CaptureFixture[str]) -> None:
    """A case recorded from the official code, by overriding the published recipe on the command line."""
    cases = json.loads((VECTORS / "cases" / "d2f_llada.json").read_text())["cases"]
    case = next(one for one in cases if one["name"] == "d2f_llada_bs8_default")
    code, out, err = run(
        capsys,
        *TINY,
        f"prompt_ids={case['prompt_ids']}",
        f"run.max_new_tokens={len(case['generated_ids'])}",
        f"decoder.block_length={case['args']['block_size']}",
        f"decoder.threshold={case['args']['skip_threshold']}",
        f"decoder.add_at={case['args']['block_add_threshold']}",
        f"decoder.activate_at={case['args']['decoded_token_threshold']}",
        "decoder.official_loop=true",
    )
    assert code == 0, err
    answer = case["generated_ids"]
    assert ast.literal_eval(out) == answer[: answer.index(END)]  # what is behind the end of the text is not printed
    assert f"in {case['nfe']} forwards" in err


def test_ids_of_several_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *TINY, "prompt_ids=[[60,132,117],[5,6]]", "run.max_new_tokens=8", "run.batch_size=2", "--trace")
    assert code == 0 and len(out.splitlines()) == 2
    assert all(isinstance(ast.literal_eval(line), list) for line in out.splitlines())
    assert "step   1 row 1: " in err and "_ _" in err
    alone = run(capsys, *TINY, "prompt_ids=[5,6]", "run.max_new_tokens=8")[1]
    assert alone.splitlines() == out.splitlines()[1:]


def test_ids_for_a_model_with_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    model = "model={_component_: fresh, width: 16, layers: 1, heads: 2, attention: block_causal, block_size: 32}"
    code, out, err = run(capsys, model, "prompt_ids=[3,4]", "run.max_new_tokens=8")
    assert code == 0, err
    assert not out.startswith("[")  # text, as for a prompt of text


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["prompt=Hi"], "the model has no tokenizer, got a prompt of text. "),
        (["prompt_ids=[]"], "the prompt is missing"),
        (["prompt_ids=[[]]"], "the prompt is empty"),
        (
            ["prompt_ids=[1,260]"],
            "prompt_ids: these must be ids of the model's vocabulary, got 260. It has 260 tokens. Write ids from 0 to 259.",
        ),
        (["prompt_ids=[-1]"], "got -1."),
        (["prompt_ids=[a]"], "prompt_ids"),
        (["prompt_ids=[1]", "prompt=Hi"], "takes prompt or prompt_ids, got both"),
    ],
)
def test_prompts_that_are_refused(capsys: pytest.CaptureFixture[str], overrides: list[str], why: str) -> None:
    assert why in fails(capsys, *TINY, *overrides)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "no answer"])
def test_a_hub_id_out_of_reach(environment: dict[str, str], tmp_path: Path) -> None:
    """The message comes soon, and says what to download and where to put it."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dllm_toolkit", "generate", RECIPE, "prompt=Hi"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), **environment},
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir checkpoints/LLaDA-8B-Instruct" in done.stderr
    assert "path: checkpoints/LLaDA-8B-Instruct" in done.stderr
    assert time.monotonic() - began < 60
