"""What the documentation shows runs: every Python block of docs/new_decoder.md in order, every YAML block, every file of examples/."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from dllm_toolkit import cli, recipe
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.record import difference, record, unequal

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "new_decoder.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples folder as a user's working folder."""
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return ROOT / "examples"


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The guide's Python blocks, run one after the other as one module called my_rule; its check on one kind of model out of five."""
    one = contract.toys()[:1]
    monkeypatch.setattr(contract, "toys", lambda: one)
    module = ModuleType("my_rule")
    module.__spec__ = ModuleSpec("my_rule", None)
    monkeypatch.setitem(sys.modules, "my_rule", module)
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"{GUIDE.name}, block {number}", "exec"), module.__dict__)
    return module


@dataclass(frozen=True)
class Snippet:
    """The root of the guide's YAML."""

    decoder: Decoder
    cache: Cache


def test_the_guide_runs(guide: ModuleType) -> None:
    """Python blocks run as written (one of them runs the contract); the YAML builds with the rule of the first block."""
    for name in ("Steady", "MyDecoder"):
        place = contract.bench(
            BlockDecoder(SemiAutoregressive(4), guide.Steady()) if name == "Steady" else guide.MyDecoder(), NoCache(), contract.toys()[0]
        )
        assert [result for result in contract.run_checks(place, contract.DECODER_CHECKS) if not result.passed] == []
    (text,) = blocks("yaml")
    import yaml

    built = recipe.build(yaml.safe_load(text), Snippet)
    assert built.decoder.commit.at_least == 0.6


def test_the_guide_names_real_checks() -> None:
    known = {contract.title(check)[:3] for check in (*contract.DECODER_CHECKS, *contract.CACHE_CHECKS, contract.d11_one_graph)}
    named = set(re.findall(r"\b([DC]\d\d)\b", GUIDE.read_text(encoding="utf-8")))
    assert named and named <= known


def test_an_example_keeps_the_contract(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user checks it, but for the process."""
    assert cli.main(["check", "look_twice.LookTwice"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and re.search(r"(\d+) of \1 checks passed", out)


def test_an_example_keeps_the_contract_by_the_command(examples: Path) -> None:
    """As a user checks it: by the command, in the folder of the file."""
    done = subprocess.run(
        [sys.executable, "-m", "dllm_toolkit", "check", "my_rule.EntropySpend"],
        cwd=examples,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and re.search(r"(\d+) of \1 checks passed", done.stdout)


@pytest.mark.parametrize("name", ["my_rule", "look_twice"])
def test_examples_are_short(name: str) -> None:
    """A method of one's own is less than thirty lines of code."""
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    code = re.sub(r'"""(.*?)"""', "", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("from", "import"))]) < 30


def test_spending_nothing_is_one_token_a_step(examples: Path) -> None:
    import my_rule  # type: ignore[import-not-found]

    decoders = [BlockDecoder(SemiAutoregressive(4), rule) for rule in (my_rule.EntropySpend(0.0), Quota())]
    for toy in contract.toys()[:2]:
        one, other = (record(toy.model, decoder, NoCache(), unequal()) for decoder in decoders)
        assert all(difference(one, row, other, row) is None for row in range(4)) and one.fingerprint() == other.fingerprint()


def test_the_example_recipe_is_valid(examples: Path) -> None:
    from dllm_toolkit.evaluation.compare import CompareRecipe

    checked = recipe.load(examples / "my_rule.yaml").checked(CompareRecipe)
    assert set(checked.tree["configurations"]) == {"one_at_a_time", "threshold", "entropy_spend", "look_twice"}
    built = checked.build(CompareRecipe)
    assert type(built.configurations["entropy_spend"].decoder.commit).__name__ == "EntropySpend"


def test_an_objective_of_ones_own_trains(examples: Path, tmp_path: Path) -> None:
    """The recipe as a user would run it, on a tiny model: it trains, exports, and the student decodes as its layout says."""
    from dllm_toolkit import cli
    from dllm_toolkit.models.load import load

    text = (ROOT / "examples" / "my_objective.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    tiny = "{_component_: fresh, width: 16, layers: 1, heads: 2}"
    small = [f"model={tiny}", f"data.model={tiny}", "data.decoder={_component_: fast_dllm, threshold: 0.0}", "data.right_only=false"]
    small += [f"data.prompts.{name}={value}" for name, value in {"size": 8, "heldout": 2, "batch_size": 4}.items()]
    small += ["trainer.max_steps=2", "trainer.precision=32-true", f"data.store={tmp_path / 'answers'}", f"output={tmp_path / 'run'}"]
    assert cli.main(["train", str(examples / "my_objective.yaml"), *small, f"export={tmp_path / 'model'}"]) == 0
    assert (load(str(tmp_path / "model")).spec.attention, load(str(tmp_path / "model")).spec.block_size) == ("block_causal", 16)
