"""Every recipe loads, validates, builds and runs: on tiny checkpoints where it names a published one, and for a few tokens or steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from dllm_toolkit import cli, recipe
from dllm_toolkit.decoders.learn2pd import save_filter
from dllm_toolkit.evaluation.compare import CompareRecipe
from dllm_toolkit.evaluation.harness import HarnessRecipe
from dllm_toolkit.generate import GenerateRecipe
from dllm_toolkit.testing.cases_stops import toy_filter
from dllm_toolkit.testing.items import write_items
from dllm_toolkit.training.reinforce import PolicyRecipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DECODE = sorted((ROOT / "recipes" / "decode").glob("*.yaml"))
VECTORS = ROOT / "tests" / "golden" / "vectors"
CAUSAL = "model={_component_: fresh, width: 16, layers: 1, heads: 2, attention: causal, shift: 1}"

FRESH = "{_component_: fresh, width: 16, layers: 1, heads: 2}"
BLOCKWISE = CAUSAL.replace("causal, shift: 1", "block_causal, block_size: 4")

COMPARE = ("run.max_new_tokens=6", "run.warm_up=0", "run.device=cpu", "report.tensorboard=false")
TRAIN = (
    "trainer.max_steps=2",
    "trainer.max_minutes=null",
    "trainer.precision=32-true",
    "export=null",
)
SMALL = {"size": 64, "heldout": 8, "batch_size": 2}
TRAIN_FILTER = ("trainer.max_steps=2", "data.size=2", "data.heldout=2", "data.batch_size=2", "export=null")
TINY = ("model.width=16", "model.layers=1", "model.heads=2", "model.mlp_width=32")
TRAIN_POLICY = (
    "model={_component_: fresh, width: 16, layers: 1, heads: 2, mlp_width: 32}",
    "rollouts={problems: 2, group: 2, max_new_tokens: 6}",
    "task.size=2",
    "evaluation.task.size=2",
    "trainer={iterations: 1, accelerator: cpu}",
    "export=null",
)


def small(data: dict, at: str = "data") -> list[str]:
    """Overrides that make training data small, part by part where it has parts."""
    if data["_component_"] == "pairs":
        return []
    if "prompts" in data:
        return small(data["prompts"], f"{at}.prompts")
    if "parts" in data:
        return [one for number, part in enumerate(data["parts"]) for one in small(part, f"{at}.parts.{number}")]
    return [f"{at}.{name}={value}" for name, value in SMALL.items()]


def one_cell(path: Path) -> list[str]:
    """Overrides that leave one value of each sweep, for a comparison of very many students."""
    if path.name != "distillation.yaml":
        return []
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["configurations"]
    return [f"configurations.{name}.decoder.threshold=0.9" for name, one in written.items() if "_sweep_" in str(one)]


def self_distilled(tree: dict, output: Path) -> list[str]:
    """Overrides of a recipe whose data a model writes: tiny models, and answers of a few steps."""
    causal = "autoregressive" in tree["model"]["path"]
    model = CAUSAL if causal else f"model={FRESH}"
    teacher = [f"teacher={FRESH}"] if "teacher" in tree else []
    quick = ["data.decoder={_component_: fast_dllm, threshold: 0.0}", "data.cache=none"]
    return [model, f"data.model={FRESH}", *teacher, *quick, "data.right_only=false", f"data.store={output / 'answers'}"]


def own_pairs(directory: Path, at: str = "data") -> list[str]:
    """Overrides of a recipe for rows of one's own: some in the words of the shipped teacher, which stands for the published model."""
    directory.mkdir()
    rows = [{"prompt": f"Question: Max has {number} eggs. Explain:", "answer": f" Max has {number} eggs."} for number in range(12)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [f"{at}.{one}" for one in ("heldout=2", "answer_length=16", "prompt_length_max=32", "end=null", "checkpoint=asset:teacher")]
    model = ["model.path=asset:teacher", "model.dtype=float32", "lora.frozen=float32", "trainer.accumulate=2"]
    return [*model, *sizes, f"{at}.path={directory / 'rows.jsonl'}"]


def stand_in(model: dict, at: str = "model") -> list[str]:
    """Overrides that replace a published checkpoint, the node `at`, by a tiny one of its layout."""
    if "model" in model:  # a wrapper around it
        return stand_in(model["model"], f"{at}.model")
    path, adapter = model["path"], model.get("adapter")
    if path.startswith("asset:"):
        return ['prompt="How many apples?"']
    for family in ("dream", "llada"):
        if family in path.lower():
            tiny = [f"{at}.path={VECTORS / f'{family}-tiny'}", f"{at}.device=cpu", f"{at}.dtype=float32", "prompt_ids=[60,132,117]"]
            return tiny + ([f"{at}.adapter={VECTORS / f'lora-{family}-tiny'}"] if adapter else [])
    return [BLOCKWISE if model.get("attention") == "block_causal" else CAUSAL, "prompt_ids=[3,4,5]"]


def task_stand_in(task: dict, models: dict, directory: Path) -> list[str]:
    """Overrides of a comparison of published models on published data: own problems, and a tiny model without a chat template."""
    directory.mkdir()
    files = write_items(directory)
    name = {"gsm8k": "gsm8k_test"}.get(task["_component_"], task["_component_"])
    changed = [f"task.path={files[name]}"] if "path" in task else []
    changed += [f"task.examples={files['gsm8k_train']}"] if "examples" in task else []
    changed += ["task.execute=true"] if "execute" in task else []
    changed += ["task.chat=false"] if "chat" in task else []
    if any(not model.get("path", "asset:").startswith("asset:") for model in models.values()):
        rules = {
            key: "".join(f", {name}: {model[name]}" for name in ("attention", "block_size") if name in model)
            for key, model in models.items()
            if not model.get("path", "").startswith("asset:") or "adapter" in model
        }
        changed += [
            f"models.{key}={{_component_: fresh, width: 16, layers: 1, heads: 2, max_positions: 1024{rule}}}" for key, rule in rules.items()
        ]
        changed += ["run.dtype=float32"]
    return changed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a recipe that writes elsewhere than its output directory would leave something here
    tree = recipe.load(path).tree
    root = cli._root_of(tree)
    output = tmp_path / "out"
    if root is GenerateRecipe:
        command = ["generate", str(path), *stand_in(tree["model"]), "run.max_new_tokens=70", "run.compile=false"]
        if isinstance(tree["decoder"], dict) and "filter" in tree["decoder"]:
            save_filter(toy_filter(32), output / "filter")
            command.append(f"decoder.filter={output / 'filter'}")
    elif root is CompareRecipe:
        stand_ins = task_stand_in(tree["task"], tree["models"], tmp_path / "data")
        size = "task.task.size=1" if "task" in tree["task"] else "task.size=1"
        command = ["compare", str(path), size, *COMPARE, *stand_ins, *one_cell(path), f"output={output}"]
        tree = recipe.load(path, command[2:]).tree
        if tree["task"]["_component_"] == "math500":
            pytest.importorskip("math_verify", reason="math-verify is not installed (pip install 'dllm-toolkit[eval]')")
    elif root is HarnessRecipe:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'dllm-toolkit[harness]')")
        (tmp_path / "data").mkdir()
        files = write_items(tmp_path / "data")
        tiny = "model={_component_: fresh, width: 16, layers: 1, heads: 2, max_positions: 1024}"
        local = f"data={{gsm8k: {{train: {files['gsm8k_train']}, test: {files['gsm8k_test']}}}}}"
        command = ["harness", str(path), *COMPARE, tiny, local, "size=1", "run.dtype=float32", f"output={output}"]
    elif root is PolicyRecipe:  # an untrained model solves nothing: what comes before and after learning runs, and says so
        command = ["train", str(path), *TRAIN_POLICY, f"output={output}"]
    else:
        tiny = TINY if tree["model"]["_component_"] == "fresh" else (f"model={FRESH}",) if tree["model"]["path"].startswith("runs/") else ()
        tiny = self_distilled(tree, output) if tree["data"]["_component_"] == "recorded" else tiny
        if tree["data"]["_component_"] == "pairs":
            tiny = own_pairs(tmp_path / "data")
        elif tree["data"].get("prompts", {}).get("_component_") == "pairs":
            own = [one for one in own_pairs(tmp_path / "data", "data.prompts") if not one.startswith("model.")]
            tiny = [*tiny, *own, *(["objective.block_length=4"] if "block_length" in tree["objective"] else [])]
        command = ["train", str(path), *(TRAIN_FILTER if "filter" in tree else (*TRAIN, *small(tree["data"]))), *tiny, f"output={output}"]
    assert cli.main(["show", *command[1:]]) == 0
    capsys.readouterr()
    code = cli.main(command)
    out, err = capsys.readouterr()
    if root is PolicyRecipe:
        assert code == 2 and "nothing was learned, got 2 groups of rollouts" in err, err
        return
    assert code == 0, err
    if root is CompareRecipe:
        assert [row["name"] for row in json.loads(out.splitlines()[-1])["rows"]] == list(tree["configurations"])
    elif root is HarnessRecipe:
        assert list(json.loads(out.splitlines()[-1])["results"]) == list(tree["tasks"])
    elif root is GenerateRecipe:
        assert len(out.splitlines()) == 1 and " forwards; " in err
    assert {item.name for item in tmp_path.iterdir()} <= {"out", "data"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_header_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    header = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    text = "\n".join(line.lstrip("# ") for line in header).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("dllm-toolkit ")]
    name = str(path.relative_to(ROOT))
    assert header and any(shlex.split(command)[2] == name for command in commands if len(shlex.split(command)) > 2)
    for command in commands:
        for mentioned in re.findall(r"recipes/\S+\.yaml", command):
            assert (ROOT / mentioned).is_file()
    if path in DECODE and path.name != "d2f_stories.yaml" and path.name != "autoregressive.yaml":
        assert any("Numbers: " in line for line in header)


# max_new_tokens, block_length, add_at, threshold: the table of arXiv 2508.09192 and its evaluation scripts. 240 is 5 whole blocks of 48.
D2F = {
    "d2f_llada_gsm8k": (512, 64, 0.7, 0.9),
    "d2f_llada_mbpp": (512, 32, 0.9, 0.9),
    "d2f_llada_humaneval": (512, 32, 0.1, 0.9),
    "d2f_llada_math": (512, 32, 0.1, 0.9),
    "d2f_dream_gsm8k": (256, 32, 0.1, 0.9),
    "d2f_dream_mbpp": (240, 48, 0.1, 0.9),
    "d2f_dream_humaneval": (256, 32, 0.9, 0.95),
    "d2f_dream_math": (256, 64, 0.1, 0.9),
}


@pytest.mark.parametrize(("name", "published"), D2F.items())
def test_d2f_has_the_published_settings(name: str, published: tuple[int, int, float, float]) -> None:
    path = ROOT / "recipes" / "decode" / f"{name}.yaml"
    loaded = recipe.load(path)
    built = loaded.checked(GenerateRecipe).build(GenerateRecipe)
    schedule, commit = built.decoder.schedule, built.decoder.commit
    assert (built.run.max_new_tokens, schedule.block_length, schedule.add_at, commit.at_least) == published
    assert schedule.activate_at == 0.95 and commit.strict and built.decoder.propose.temperature == 0
    assert loaded.tree["model"]["block_size"] == schedule.block_length and loaded.tree["model"]["dtype"] == "bfloat16"
    assert type(built.cache).__name__ == "BlockCausalCache"


def test_base_recipes_leave_nothing_behind() -> None:
    """A child that names another decoder starts from that decoder's defaults, not from the base's arguments."""
    built = recipe.load(ROOT / "recipes/decode/llada_semi_ar.yaml").checked(GenerateRecipe).build(GenerateRecipe)
    assert built.decoder.schedule.block_length == 8 and built.decoder.propose.defer == ()
    built = recipe.load(ROOT / "recipes/decode/dparallel_dream.yaml").checked(GenerateRecipe).build(GenerateRecipe)
    assert built.decoder.commit.at_least == -0.45 and built.decoder.commit.strict and built.decoder.propose.temperature == 0
