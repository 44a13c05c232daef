"""The registry finds what it should, and nothing else that a dotted path from a stranger might name."""

from __future__ import annotations

import abc
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Protocol

import pytest

from dllm_toolkit import registry
from dllm_toolkit.errors import ToolkitError


class Gadget(abc.ABC):
    """The base class of a kind that only this file knows."""

    @abc.abstractmethod
    def turn(self) -> int: ...


class Other:
    """The base class of another kind."""


class Shape(Protocol):
    """A kind whose base is a Protocol: members must be registered."""

    def area(self) -> float: ...


registry.declare("test_gadget", Gadget)
registry.declare("test_other", Other)
registry.declare("test_shape", Shape)


@registry.register("test_gadget", "wheel")
@dataclass(frozen=True)
class Wheel(Gadget):
    """Turns."""

    size: int = 1

    def turn(self) -> int:
        return self.size


@registry.register("test_gadget", "big_wheel")
def big_wheel() -> Gadget:
    """A preset."""
    return Wheel(10)


@registry.register("test_other", "another")
class Another(Other):
    pass


def unregistered() -> Gadget:
    raise AssertionError("must not be called")


def test_names_and_lookup():
    assert registry.names("test_gadget") == ["big_wheel", "wheel"]
    assert registry.lookup("test_gadget", "wheel") is Wheel
    assert registry.lookup("test_gadget", "big_wheel") is big_wheel
    assert registry.kind_of(Gadget) == "test_gadget" and registry.kind_of(Wheel) is None
    assert registry.base_of("test_gadget") is Gadget
    assert registry.name_of(Wheel) == registry.name_of(Wheel(3)) == "wheel"
    assert registry.name_of(big_wheel) == "big_wheel"
    assert registry.name_of(unregistered) is None and registry.name_of(3) is None
    assert "test_gadget" in registry.kinds() and "decoder" in registry.kinds()


def test_unknown_name_suggests():
    with pytest.raises(registry.UnknownName, match="did you mean 'wheel'") as caught:
        registry.lookup("test_gadget", "Wheeel")
    assert caught.value.suggestions == ("wheel",)
    with pytest.raises(registry.UnknownName, match="unknown kind 'nonsense'"):
        registry.lookup("nonsense", "wheel")


def test_registering_twice():
    registry.register("test_gadget", "wheel")(Wheel)  # the same object again: a module imported twice
    with pytest.raises(ToolkitError, match="registered twice"):
        registry.register("test_gadget", "wheel")(big_wheel)
    with pytest.raises(ToolkitError, match="no subclass of Gadget"):
        registry.register("test_gadget", "odd")(Another)
    with pytest.raises(ToolkitError, match="unknown kind"):
        registry.register("test_nothing", "x")(Wheel)
    with pytest.raises(ToolkitError, match="without dots"):
        registry.register("test_gadget", "a.b")
    with pytest.raises(ToolkitError, match="declared twice"):
        registry.declare("test_gadget", Other)
    with pytest.raises(ToolkitError, match="already the base class"):
        registry.declare("test_gadget_two", Gadget)
    registry.declare("test_gadget", Gadget)


def write_module(directory, name, text):
    (directory / f"{name}.py").write_text(text)


LOCAL = """
from tests_gadget_base import Gadget, register

class Mine(Gadget):
    def turn(self): return 7

class StillAbstract(Gadget):
    pass

class Stranger:
    def __init__(self): raise AssertionError("must not be constructed")

def function(): raise AssertionError("must not be called")

@register("test_gadget", "local_preset")
def preset(): return Mine()

_Hidden = Mine
"""


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A researcher's directory with `local_gadget.py` in it."""
    bridge = type(sys)("tests_gadget_base")
    bridge.Gadget, bridge.register = Gadget, registry.register
    monkeypatch.setitem(sys.modules, "tests_gadget_base", bridge)
    write_module(tmp_path, "local_gadget", LOCAL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("local_gadget", None)
    registry._table["test_gadget"].pop("local_preset", None)


def test_dotted_path_in_the_current_directory(local):
    path_before = list(sys.path)
    assert registry.lookup("test_gadget", "local_gadget.Mine")().turn() == 7
    assert registry.lookup("test_gadget", "local_gadget.preset").__name__ == "preset"
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("local_gadget.Stranger", "is not a test_gadget"),
        ("local_gadget.function", "is not a test_gadget"),
        ("local_gadget.Gadget", "abstract"),
        ("local_gadget.StillAbstract", "abstract: it does not define turn"),
        ("local_gadget._Hidden", "refused"),
        ("local_gadget.Mien", "did you mean 'local_gadget.Mine'"),
        ("local_gadget.Mine.turn", "cannot"),
        ("no_such_module_here.Thing", "cannot find the module"),
        ("local_gadget.deeper.Thing", "cannot find the module"),
        ("yaml.load", "is not a test_gadget"),
        ("dllm_toolkit.errors.ToolkitError", "is not a test_gadget"),
    ],
)
def test_refused_after_a_look(local, name, why):
    with pytest.raises(registry.UnknownName, match=why):
        registry.lookup("test_gadget", name)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "builtins.exec",
        "antigravity.fly",
        "__main__.Thing",
        "dllm_toolkit.__builtins__.eval",
        "os..system",
        ".system",
        "os.",
        "a b.c",
        "...",
        "importlib.import_module",
    ],
)
def test_refused_before_any_import(name, monkeypatch):
    def forbidden(*arguments, **keywords):
        raise AssertionError("must not be called")

    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(subprocess, "run", forbidden)
    monkeypatch.setattr(registry, "_import", forbidden)
    with pytest.raises(registry.UnknownName, match="refused"):
        registry.lookup("test_gadget", name)
    assert "antigravity" not in sys.modules


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(registry.UnknownName, match="is not a test_gadget"):
        registry.lookup("test_gadget", f"{__name__}.Another")


def test_a_claim_of_membership_is_not_inheritance():
    """`ABC.register` would let any class pass `issubclass`."""

    class Pretender:
        pass

    Gadget.register(Pretender)
    assert issubclass(Pretender, Gadget)
    with pytest.raises(ToolkitError, match="no subclass"):
        registry.register("test_gadget", "pretender")(Pretender)


@pytest.mark.parametrize("body", ["raise RuntimeError('broken file')", "import no_such_dependency", "def (", "raise SystemExit(3)"])
def test_a_module_that_does_not_import(tmp_path, monkeypatch, body):
    write_module(tmp_path, "broken_gadget", body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(registry.UnknownName, match="cannot import 'broken_gadget'"):
        registry.lookup("test_gadget", "broken_gadget.Thing")
    sys.modules.pop("broken_gadget", None)


def test_protocol_kinds_take_registered_members():
    @registry.register("test_shape", "square")
    class Square:
        def area(self) -> float:
            return 1.0

    assert registry.lookup("test_shape", "square") is Square
    with pytest.raises(registry.UnknownName, match="is not a test_shape"):
        registry.lookup("test_shape", f"{__name__}.Wheel")


def test_what_a_module_prints_while_it_is_imported_is_no_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "talks.py").write_text("print('hello')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(registry.UnknownName, match="has no 'Thing'"):
        registry.lookup("test_gadget", "talks.Thing")
    out, err = capsys.readouterr()
    assert out == "" and err == "hello\n"
