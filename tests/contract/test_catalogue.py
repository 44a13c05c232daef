"""Nothing that is registered, and no concrete class, is outside the catalogue; shipped classes are final; methods name their source."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

from dllm_toolkit import registry
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decoders.base import Decoder, Part
from dllm_toolkit.testing import cases

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("decoder", "schedule", "propose", "commit", "revise", "stop", "cache")
# The template, the textbook baseline and the caches and rules that do nothing have no paper to name.
NO_PAPER = {"block", "autoregressive", "none"}


def descendants(base: type) -> list[type]:
    """All subclasses of `base` that the package ships, the toys of `testing` left out."""
    registry.load_all()
    found = []
    for child in base.__subclasses__():
        if child.__module__.startswith("dllm_toolkit.") and not child.__module__.startswith("dllm_toolkit.testing"):
            found.append(child)
        found.extend(descendants(child))
    return found


def concrete() -> list[type]:
    return [child for base in (Part, Decoder, Cache) for child in descendants(base) if not inspect.isabstract(child)]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_registered_is_in_a_case(kind: str) -> None:
    covered = [case.maker for case in cases.ALL if case.kind == kind]
    missing = [name for name in registry.names(kind) if registry.lookup(kind, name) not in covered]
    assert not missing, f"add a Case for {missing} to testing/cases.py"


def test_every_concrete_class_is_in_a_case() -> None:
    makers = {case.maker for case in cases.ALL}
    assert len(concrete()) >= 14
    assert [one for one in concrete() if one not in makers] == []


def test_concrete_classes_are_final_and_frozen() -> None:
    for one in concrete():
        assert one.__subclasses__() == [], f"{one.__name__} is subclassed: compose instead"
        assert one.__dataclass_params__.frozen, f"{one.__name__} must be a frozen dataclass"
        assert one.__mro__[1].__name__ in {"Schedule", "Propose", "Commit", "Revise", "Stop", "Decoder", "Cache"}


def test_case_names_are_unique_and_kinds_are_right() -> None:
    names = [(case.kind, case.name) for case in cases.ALL]
    assert len(set(names)) == len(names)
    for case in cases.ALL:
        assert isinstance(case.build(), registry.base_of(case.kind)), case


@pytest.mark.parametrize("kind", ["decoder", "cache"])
def test_methods_name_their_source(kind: str) -> None:
    for name in registry.names(kind):
        entry = registry.lookup(kind, name)
        assert inspect.getdoc(entry), f"{kind} {name} has no docstring"
        module = sys.modules[entry.__module__]
        text = f"{module.__doc__} {inspect.getdoc(entry)}"
        if name not in NO_PAPER:
            assert re.search(r"arXiv[ :]+\d{4}\.\d{4,5}|\(repository [\w-]+\)", text), f"{kind} {name} names no paper"


def test_every_rule_is_documented() -> None:
    for one in concrete():
        assert one.__doc__ and not one.__doc__.startswith(f"{one.__name__}("), f"{one.__name__} has no docstring of its own"


def test_every_decoder_is_in_a_recipe() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for folder in ("recipes", "examples") for path in (ROOT / folder).rglob("*.yaml"))
    missing = [name for name in registry.names("decoder") if not re.search(rf"(decoder|_component_): {name}\b", text)]
    assert not missing, f"no recipe uses {missing}"
