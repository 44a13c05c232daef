"""What may import what: heavy libraries only when they are needed, and arrows in one direction."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dllm_toolkit"
COMPILER = "torch._dynamo"  # as long to import as torch itself; `check` compiles, other commands need not
HEAVY = ("lightning", "pytorch_lightning", "peft", "tensorboard", "matplotlib", "rich", "transformers", "datasets", "torchmetrics")

# A module may import its own layer and the layers it names:
# types <- ops <- state <- {decoders, cache, models} <- rounds <- engine <- decode <- drivers <- rest.
BASE = {"types", "errors", "ops"}
CORE = {*BASE, "registry", "state"}
PARTS = {*CORE, "cache", "decoders", "models"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "ops": {"types", "errors"},
    "registry": {"errors"},
    "state": BASE,
    "cache": CORE,
    "decoders": CORE,
    "sheets": PARTS,
    "graphs": set(),
    "workspace": {"cache", "graphs"},
    "rounds": {*PARTS, "sheets"},
    "engine": {*PARTS, "sheets", "rounds", "graphs", "workspace"},
    "decode": {*PARTS, "engine"},
    "drivers": {*PARTS, "engine", "decode", "recipe_hints"},
}
# Nothing below these may import them.
TOP = ("evaluation", "training", "cli", "testing", "generate")


def imports_of(path: Path, *, annotations: bool = False) -> set[str]:
    """Modules of the package that a file imports, anywhere in it (imports for type checking only if `annotations`)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not annotations:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name.removeprefix("dllm_toolkit.") for name in found if name.startswith("dllm_toolkit.")}


def layer(module: str) -> str:
    return module.split(".")[0]


def modules(layer_name: str) -> list[Path]:
    folder = PACKAGE / layer_name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{layer_name}.py"]


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_point_down(name: str) -> None:
    for path in modules(name):
        wrong = {module for module in imports_of(path) if layer(module) not in {*ALLOWED[name], name}}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_models_know_nothing_of_decoding() -> None:
    """A model may use the K/V buffer, nothing else of the caches, and no decoder."""
    for path in modules("models"):
        wrong = {
            module
            for module in imports_of(path)
            if layer(module) in {"decoders", "engine", "decode", "drivers", *TOP}
            or (layer(module) == "cache" and not module.startswith("cache.buffer"))
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_decoders_and_caches_do_not_know_each_other_even_in_types() -> None:
    """The one exception: decoders/base.py names Cache and Engine in the signature of `check` and `step`."""
    for path in [*modules("decoders"), *modules("cache")]:
        mine = path.relative_to(PACKAGE).parts[0]
        other = {"decoders": {"cache", "models"}, "cache": {"decoders", "models", "engine"}}[mine]
        wrong = {module for module in imports_of(path, annotations=True) if layer(module) in other}
        assert not wrong or path.name == "base.py" and mine == "decoders", f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_nothing_imports_the_top() -> None:
    below = [path for name in (*ALLOWED, "models", "data") for path in modules(name)]
    for path in below:
        wrong = {module for module in imports_of(path) if layer(module) in TOP}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_light_imports_stay_light() -> None:
    """Heavy modules that one fresh interpreter holds after each statement: what none of them loads, no statement alone would load."""
    statements = {
        "decode": "import dllm_toolkit; import dllm_toolkit.decode",
        "load": "import dllm_toolkit.models.load, dllm_toolkit.generate, dllm_toolkit.evaluation.compare",
        "names": "import dllm_toolkit.cli; from dllm_toolkit.registry import names; names('decoder'); names('cache'); names('model')",
        "testing": "import dllm_toolkit.testing.contract, dllm_toolkit.testing.cases, dllm_toolkit.models.transformer",
    }
    held = f"held = lambda: [name for name in {(*HEAVY, COMPILER)!r} if name in sys.modules]"
    code = ["import json, sys", held, "found = {}", *(f"{text}\nfound[{name!r}] = held()" for name, text in statements.items())]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*code, "print(json.dumps(found))"])], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == dict.fromkeys(statements, [])


def test_a_fresh_interpreter_does_not_need_torch_for_help() -> None:
    code = "import sys, dllm_toolkit\nassert 'torch' not in sys.modules, 'import dllm_toolkit imports torch'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
