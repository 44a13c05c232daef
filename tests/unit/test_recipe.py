"""Recipes: what is read, how errors are told, and that nothing else than recipe errors ever comes out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm_toolkit import recipe, registry
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.recipe import Lazy, Recipe, RecipeError, RecipeErrors
from dllm_toolkit.recipe_schema import _located


class Widget:
    """The base class of a kind that only this file knows."""


class Engine:
    """The base class of a second kind."""


registry.declare("test_widget", Widget)
registry.declare("test_engine", Engine)

BUILT: list[str] = []


@registry.register("test_engine", "steam")
@dataclass(frozen=True)
class Steam(Engine):
    """Boils water."""

    cite = ("Watt 1776",)
    pressure: float = 1.0

    def __post_init__(self) -> None:
        BUILT.append("steam")
        if self.pressure < 0:
            raise ToolkitError(f"pressure must be >= 0, got {self.pressure}. Write a positive number.")


@registry.register("test_widget", "cart")
@dataclass(frozen=True)
class Cart(Widget):
    """Rolls along.

    And has more to say.
    """

    threshold: float
    block_length: int = 8
    engine: Engine = Steam()
    spares: tuple[Engine, ...] = ()
    mode: Literal["slow", "fast"] = "slow"
    score: str = "probability"
    note: str | None = None


@registry.register("test_widget", "train")
def make_train(engine: Engine, cars: int = 3, *, extra=None) -> Widget:
    """A preset function."""
    return Cart(threshold=float(cars), engine=engine, note=extra)


@registry.register("test_widget", "liar")
def liar() -> Widget:
    return 3  # type: ignore[return-value]


@registry.register("test_widget", "slip")
def slip(value: int = 1) -> Widget:
    return len(value)  # type: ignore


@registry.register("test_widget", "sized")
class Sized(Widget):
    def __init__(self, block_size: int = 1, **others: Any) -> None:
        self.block_size, self.others = block_size, others


@dataclass(frozen=True)
class Run:
    max_new_tokens: int = 16
    seed: int = 0
    out: Path = Path("runs")
    compile: bool = False


@dataclass(frozen=True)
class Root:
    widget: Widget
    lazy: Lazy[Widget] | None = None
    fleet: dict[str, Lazy[Widget]] = field(default_factory=dict)
    run: Run = Run()
    sizes: list[int] = field(default_factory=list)
    pair: tuple[int, str] | None = None
    names: Sequence[str] = ()
    limit: int | float | None = None
    raw: Any = None
    table: Mapping[str, float] = field(default_factory=dict)
    title: str = ""


def write(directory: Path, text: str, name: str = "x.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def errors_of(directory: Path, text: str, *overrides: str) -> list[str]:
    """The errors of a recipe as lines, with the file's directory removed."""
    path = write(directory, text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides).build(Root)
    return str(caught.value).replace(f"{directory}/", "").splitlines()


def build(directory: Path, text: str, *overrides: str) -> Root:
    return recipe.load(write(directory, text), overrides).build(Root)


# ---------------------------------------------------------------- what is read


def test_build(tmp_path):
    root = build(
        tmp_path,
        """
        widget:
          _component_: cart
          threshold: 1
          engine: {_component_: steam, pressure: 2}
          spares: [steam, {_component_: steam, pressure: 3}]
        fleet:
          a: {_component_: train, engine: steam}
        run: {out: here, compile: true}
        sizes: [1, 2]
        pair: [1, a]
        limit: 1e3
        raw: {anything: [1, {deep: null}]}
        table: {x: 1}
        """,
    )
    assert root.widget == Cart(1.0, engine=Steam(2.0), spares=(Steam(), Steam(3.0)))
    assert isinstance(root.widget.threshold, float) and isinstance(root.table["x"], float)
    assert root.run == Run(out=Path("here"), compile=True)
    assert root.pair == (1, "a") and root.limit == 1000.0 and root.raw == {"anything": [1, {"deep": None}]}
    assert root.fleet["a"].build() == Cart(3.0)


def test_lazy_is_checked_now_and_built_later(tmp_path):
    BUILT.clear()
    text = "widget: {_component_: cart, threshold: 1, engine: steam}\n"
    text += "lazy: {_component_: train, engine: steam, cars: 5}"
    root = build(tmp_path, text)
    assert BUILT == ["steam"]
    assert root.lazy.build() == Cart(5.0) and BUILT == ["steam"] * 2
    assert root.lazy.tree == {"_component_": "train", "engine": "steam", "cars": 5}
    again = build(tmp_path, text)
    assert root.lazy == again.lazy and hash(root.lazy) == hash(again.lazy) and len(root.lazy.key) == 16
    assert Lazy.of(3).build() == 3
    lines = errors_of(tmp_path, "widget: {_component_: cart, threshold: 1}\nlazy: {_component_: train, carz: 5}")
    assert len(lines) == 2 and "did you mean 'cars'" in lines[0] and "missing key 'engine'" in lines[1]


def test_scalars_follow_yaml_1_2(tmp_path):
    loaded = recipe.load(write(tmp_path, "a: 1e-4\nb: yes\nc: 1:30\nd: 2024-01-01\ne: 1_000\nf: 0x10\ng: ~\nh: none"))
    expected = {
        "a": 1e-4,
        "b": "yes",
        "c": "1:30",
        "d": "2024-01-01",
        "e": 1000,
        "f": 16,
        "g": None,
        "h": "none",
    }
    assert loaded.tree == expected


def test_round_trip_and_hash(tmp_path):
    text = "b: '1e-4'\na: {_component_: cart, x: [1, 1.5, null, 'yes', 'null', '3', \"t\\n\"]}\nc: 1e-7"
    first = recipe.load(write(tmp_path, text))
    second = recipe.load(write(tmp_path, first.to_yaml(), "y.yaml"))
    assert second.tree == first.tree and second.hash() == first.hash() and len(first.hash()) == 16
    assert Recipe.from_tree(dict(reversed(first.tree.items()))).hash() == first.hash()
    assert Recipe.from_tree({**first.tree, "c": 2}).hash() != first.hash()


def test_marks(tmp_path):
    loaded = recipe.load(write(tmp_path, "a:\n  b: 1\n  c:\n    - 5\n"), ["a.d=2"])
    assert loaded.marks["a.b"].line == 2 and loaded.marks["a.c.0"].line == 4
    assert loaded.marks["a.d"].overridden and loaded.marks["a.d"].text == "a.d=2"


def test_yaml_anchors_and_merge_keys(tmp_path):
    loaded = recipe.load(write(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a"))
    assert loaded.tree == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


# ---------------------------------------------------------------- base and overrides


def test_base(tmp_path):
    write(
        tmp_path,
        "widget: {_component_: cart, threshold: 1, mode: fast}\nrun:\n  seed: 3\n  wrong: 1\n",
        "base.yaml",
    )
    child = write(tmp_path, "base: base.yaml\nwidget: {threshold: 2}\nrun: {max_new_tokens: 4}\n")
    loaded = recipe.load(child)
    assert loaded.tree["widget"] == {"_component_": "cart", "threshold": 2, "mode": "fast"}
    assert loaded.tree["run"] == {"seed": 3, "wrong": 1, "max_new_tokens": 4}
    with pytest.raises(RecipeError) as caught:
        loaded.build(Root)
    assert caught.value.file.endswith("base.yaml") and caught.value.line == 4 and caught.value.path == "run.wrong"


def test_base_with_another_component_replaces_it(tmp_path):
    write(tmp_path, "widget: {_component_: cart, threshold: 1}\nlazy: train\nraw: cart", "base.yaml")
    text = "base: base.yaml\nwidget: {_component_: train, engine: steam}\nlazy: {engine: steam}\nraw: steam"
    tree = recipe.load(write(tmp_path, text)).tree
    assert tree["widget"] == {"_component_": "train", "engine": "steam"}
    assert tree["lazy"] == {"_component_": "train", "engine": "steam"}
    assert tree["raw"] == "steam"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("base: x.yaml\n", "x.yaml -> x.yaml"),
        ("base: nowhere.yaml\n", "there is no recipe"),
        ("base: [a]\n", "expected the path of a recipe, got a list"),
        ("base: .\n", "there is no recipe"),
    ],
)
def test_bad_base(tmp_path, text, why):
    (line,) = errors_of(tmp_path, text)
    assert line.startswith("x.yaml:1: base: ") and why in line


def test_longer_circle(tmp_path):
    write(tmp_path, "base: x.yaml", "a.yaml")
    (line,) = errors_of(tmp_path, "base: a.yaml")
    assert "x.yaml -> a.yaml -> x.yaml" in line


BASE = "widget: {_component_: cart, threshold: 1, spares: [steam, steam]}\nlazy: sized\n"


def test_overrides(tmp_path):
    root = build(
        tmp_path,
        BASE,
        "widget.threshold=0.25",
        "widget.engine={_component_: steam, pressure: 4}",
        "widget.spares.1.pressure=7",
        "widget.note=Tom: how many?",
        "lazy.block_size=4",
        "run.seed=3",
        "run.out=42",
        "title=7",
        "names=[a, b]",
        "limit=",
    )
    assert root.widget == Cart(0.25, engine=Steam(4.0), spares=(Steam(), Steam(7.0)), note="Tom: how many?")
    assert root.lazy.build().block_size == 4
    assert root.run == Run(seed=3, out=Path("42")) and root.title == "7" and root.limit is None
    assert list(root.names) == ["a", "b"]


def test_override_of_a_component_keeps_its_arguments(tmp_path):
    loaded = recipe.load(write(tmp_path, BASE), ["widget=train", "lazy=cart"])
    assert loaded.tree["widget"]["_component_"] == "train" and loaded.tree["widget"]["threshold"] == 1
    assert loaded.tree["lazy"] == "cart"
    line = errors_of(tmp_path, BASE, "widget=train")[0]
    assert "unknown key 'threshold'" in line and "write widget={_component_: train}" in line
    (line,) = errors_of(tmp_path, BASE, "widget.spares.0=stem")
    assert line.endswith("write: `widget.spares.0=steam`")
    (line,) = errors_of(tmp_path, BASE, "widget.treshold=0.3")
    assert line.endswith("write: `widget.threshold=0.3`")
    line = errors_of(tmp_path, BASE, "widget=tran")[0]
    assert line.endswith("write: `widget=train`")
    (line,) = errors_of(tmp_path, BASE, "lazy={_component_: train}")
    assert line.endswith("write: `lazy.engine=<a test_engine>`")
    loaded = recipe.load(write(tmp_path, BASE), ["widget={_component_: train, engine: steam}"])
    assert loaded.tree["widget"] == {"_component_": "train", "engine": "steam"}


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("widget.threshold", "an override is `key=value`"),
        ("=3", "an override is `key=value`"),
        ("a..b=3", "an override is `key=value`"),
        ("widget.treshold=3", "unknown key 'treshold'; did you mean 'threshold'?"),
        ("widget.threshold.x=3", "nothing under it to set: it is the number 1"),
        ("widget.spares.7=steam", "the list has 2 items"),
        ("widget.spares.x=steam", "the list has 2 items"),
        ("widget.mode=fsat", "expected one of 'slow', 'fast', got the text 'fsat'."),
        ("run.seeds=1", "unknown key 'seeds'; did you mean 'seed'?"),
        ("names=[a", "not valid YAML"),
        ("base=y.yaml", "`base` is read before the overrides"),
    ],
)
def test_bad_overrides(tmp_path, override, why):
    lines = errors_of(tmp_path, BASE, override)
    assert any(line.startswith(f"<override> {override}: ") and why in line for line in lines), lines


def test_aliases(tmp_path):
    text = "widget: {_component_: cart, threshold: 1, block_size: 4, remasking: low_confidence}\n"
    text += "run: {gen_length: 32}\nlazy: {_component_: sized, block_size: 2}"
    loaded = recipe.load(write(tmp_path, text)).checked(Root)
    assert loaded.tree["widget"] == {
        "_component_": "cart",
        "threshold": 1,
        "block_length": 4,
        "score": "probability",
    }
    assert loaded.tree["run"] == {"max_new_tokens": 32} and loaded.tree["lazy"]["block_size"] == 2
    root = loaded.build(Root)
    assert root.widget.block_length == 4 and root.run.max_new_tokens == 32
    canonical = Recipe.from_tree(loaded.tree)
    assert canonical.checked(Root).hash() == loaded.hash()
    override = recipe.load(write(tmp_path, text), ["widget.block_length=5", "run.max_new_tokens=1"]).build(Root)
    assert override.widget.block_length == 5 and override.run.max_new_tokens == 1
    (line,) = errors_of(tmp_path, "widget: {_component_: cart, threshold: 1, block_size: 4, block_length: 4}")
    assert "'block_size' is another name of 'block_length', and both are given" in line


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "widget: cat",
            "x.yaml:1: widget: cannot find 'cat'; did you mean 'cart'\\? .*write: `widget: cart`",
        ),
        ("widget:\n  _component_: cat", "x.yaml:2: widget: cannot find 'cat'; .*write: `_component_: cart`"),
        ("widget: 3", "x.yaml:1: widget: expected a test_widget, got the number 3. Known: cart, "),
        ("widget: {threshold: 1}", "x.yaml:1: widget: missing `_component_`: which test_widget\\?"),
        ("widget: {_component_: [1]}", "x.yaml:1: widget: `_component_` is the name of .* got a list"),
        (
            "widget: cart",
            "x.yaml:1: widget: missing key 'threshold'. cart takes: .*write: `threshold: <a number>`",
        ),
        (
            "widget:\n  _component_: cart\n  treshold: 0.5",
            ":3: widget.treshold: unknown key 'treshold'; did you mean 'threshold'\\? .*`threshold: 0.5`$",
        ),
        (
            "widget: {_component_: cart, threshold: high}",
            "widget.threshold: expected a number, got the text 'high'.$",
        ),
        ("widget: {_component_: cart, threshold: '0,5'}", "got the text '0,5'. *write: `threshold: 0.5`"),
        ("widget: {_component_: cart, threshold: true}", "expected a number, got true"),
        (
            "widget: {_component_: cart, threshold: 1, block_length: 8.0}",
            "expected a whole number, got the number 8.0. *write: `block_length: 8`",
        ),
        ("widget: {_component_: cart, threshold: 1, mode: Fast}", "write: `mode: fast`"),
        ("widget: {_component_: cart, threshold: 1, engine: cart}", "widget.engine: cannot find 'cart'"),
        (
            "widget: {_component_: cart, threshold: 1, spares: steam}",
            "expected a list.*write: `spares: \\[steam\\]`",
        ),
        (
            "widget: {_component_: cart, threshold: 1, score: 3}",
            "expected text, got the number 3. *write: `score: '3'`",
        ),
        ("widget: {_component_: cart, threshold: 1, spares: [stem]}", "spares.0: .*write: `- steam`"),
        ("widget: slip\nrun: {_component_: cart}", "run._component_: `_component_` has no place here"),
        ("widget: slip\nrun: fast", "run: expected a mapping \\(max_new_tokens, seed, out, compile\\)"),
        (
            "widget: slip\nrun: {compile: yes}",
            "expected true or false, got the text 'yes'. *write: `compile: true`",
        ),
        ("widget: slip\nrun: {seed: null}", "expected a whole number, got nothing"),
        ("widget: slip\npair: [1]", "pair: expected 2 values, got 1"),
        (
            "widget: slip\nlimit: x",
            "limit: expected a whole number or a number or nothing \\(null\\), got the text 'x'",
        ),
        ("widget: slip\ntable: [1]", "table: expected a mapping, got a list"),
        ("widget: slip\nnonsense: 3", "x.yaml:2: nonsense: unknown key 'nonsense'. Root takes: widget, "),
        ("run: {}", "x.yaml:1: missing key 'widget'"),
        ("widget: liar", "x.yaml:1: widget: 'liar' returned a int, which is no Widget"),
        ("widget: {_component_: slip, value: 2}", "widget: .*no len\\(\\).*\\(TypeError at test_recipe.py:"),
        (
            "widget:\n  _component_: cart\n  threshold: 1\n  engine: {_component_: steam,\n    pressure: -1}",
            "x.yaml:5: widget.engine.pressure: pressure must be >= 0, got -1.0",
        ),
        ("widget: {_component_: cart, threshold: .nan}", "threshold: expected a number, got nan, which compares with nothing.$"),
        ("widget: {_component_: cart, threshold: nan}", "expected a number, got the text 'nan'.$"),
        ("widget: slip\nrun: {seed: 9223372036854775808}", "run.seed: 9223372036854775808 is too large for a whole number of 64 bits"),
        ("widget: os.system", "x.yaml:1: widget: 'os.system' is refused"),
        ("widget: {_component_: test_recipe.Steam}", "widget: 'test_recipe.Steam'|cannot find the module"),
    ],
)
def test_messages(tmp_path, text, expected):
    lines = errors_of(tmp_path, text)
    assert len(lines) == 1, lines
    assert re.search(expected, lines[0]), lines[0]


def test_a_message_gets_the_place_of_its_value(tmp_path):
    loaded = recipe.load(write(tmp_path, "widget:\n  _component_: cart\n  threshold: 1\nsizes:\n  - 3\n  - 4"), ["run.seed=3"])
    file = tmp_path / "x.yaml"
    assert loaded.at(("widget", "threshold"), "no") == f"{file}:3: widget.threshold: no"
    assert loaded.at(("widget", "mode"), "no") == f"{file}:2: widget.mode: no"  # left to its default
    assert loaded.at(("sizes", "1"), "no") == f"{file}:6: sizes.1: no"
    assert loaded.at(("run", "seed"), "no") == "<override> run.seed=3: run.seed: no"
    assert loaded.at(("out",), "no") == f"{file}: out: no"


def test_a_message_that_names_a_path_is_placed_there(tmp_path):
    text = "table:\n  a.b: 1\n  c:\n    d: 2\n"
    node = recipe.load(write(tmp_path, text)).node
    for words, place, line in (("table.c.d is bad", "table.c.d", 4), ("in table.a.b.", "table.a.b", 2), ("table.x is not", "table", 2)):
        error = _located(ValueError(words), node, "", node.value)
        assert (error.path, error.line) == (place, line)


def test_all_errors_at_once(tmp_path):
    lines = errors_of(
        tmp_path,
        "widget:\n  _component_: cart\n  mode: x\n  engine: {_component_: steam, presure: 1}\nrun:\n  seed: a\nsizes: [1, b]\nodd: 1",
    )
    assert [line.split(": ")[1] for line in lines] == [
        "widget.mode",
        "widget.engine.presure",
        "widget",
        "run.seed",
        "sizes.1",
        "odd",
    ]


def test_validate_constructs_nothing(tmp_path):
    BUILT.clear()
    tree = {"widget": {"_component_": "cart", "threshold": 1, "engine": "steam"}}
    assert recipe.validate(tree, Root) == [] and BUILT == []
    errors = recipe.validate({"widget": "cart"}, Root)
    assert [error.path for error in errors] == ["widget"] and errors[0].write == "threshold: <a number>"
    with pytest.raises(RecipeErrors) as caught:
        recipe.build({"widget": "cart"}, Root)
    assert len(caught.value.errors) == 1 and isinstance(caught.value, ToolkitError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml: the recipe is empty"),
        ("# only a comment\n", "x.yaml: the recipe is empty"),
        ("- a\n- b", "x.yaml:1: a recipe is `key: value` lines, got a list."),
        ("just words", "x.yaml:1: a recipe is `key: value` lines, got the text 'just words'."),
        ("a: [1, 2\nb: 3", "x.yaml:2: not valid YAML: .*\\(column 2\\)"),
        ("a: 1\n\tb: 2", "x.yaml:2: not valid YAML: "),
        ("a: 1\nb: 2\na: 3", "x.yaml:3: a: this key was already given \\(.*x.yaml:1\\)"),
        ("a: {b: 1, b: 2}", "x.yaml:1: a.b: this key was already given"),
        ("a: !!python/object/apply:os.system [ls]", "x.yaml:1: a: the tag .* is not allowed"),
        ("a: !!python/name:os.system", "x.yaml:1: a: the tag .* is not allowed"),
        ("a: !!int zz", "the tag '!!int' does not suit 'zz'"),
        ("1: a", "x.yaml:1: a key is text, got '1'. *write: `\"1\":`"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: &a [*a]", "nested more than 40 levels deep"),
        ("[" * 5000, "nested more than 40 levels deep"),
        ("a: *b", "undefined alias"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("a: 1\nb: \x07", r"x.yaml:2: the character '\\x07' is not allowed"),
        ("a: " + "9" * 5000, "more than 1000 digits"),
        ("<<: 3", "`<<` takes a mapping"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    lines = errors_of(tmp_path, text)
    assert len(lines) == 1 and re.search(expected, lines[0]), lines


def test_exponential_aliases_are_bounded(tmp_path):
    lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 9)]
    (line,) = errors_of(tmp_path, "\n".join(lines))
    assert "counting what aliases stand for" in line


def test_missing_files(tmp_path):
    for name, why in [("nowhere.yaml", "no such file"), (".", "a directory"), ("a\0b", "cannot be read")]:
        with pytest.raises(RecipeError, match=why):
            recipe.load(tmp_path / name)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    with pytest.raises(RecipeError, match="UTF-8"):
        recipe.load(tmp_path / "latin.yaml")


def test_os_system_is_not_called(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "system", lambda command: calls.append(command))
    for place in ("widget", "lazy", "widget.engine", "fleet.a"):
        text = "widget: {_component_: cart, threshold: 1}"
        with pytest.raises(RecipeError, match="is refused"):
            recipe.load(write(tmp_path, text), [f"{place}={{_component_: os.system, command: ls}}"]).build(Root)
    assert calls == []


def test_a_researchers_file(tmp_path, monkeypatch):
    (tmp_path / "my_engine_file.py").write_text(
        "from dllm_toolkit.registry import base_of\n"
        "class Warp(base_of('test_engine')):\n"
        "    def __init__(self, factor, name: str = 'w'):\n"
        "        if factor > 9: raise ValueError('factor must be <= 9')\n"
        "        self.factor = factor\n"
    )
    monkeypatch.chdir(tmp_path)
    text = "widget:\n  _component_: cart\n  threshold: 1\n"
    text += "  engine: {_component_: my_engine_file.Warp, factor: %s}\n"
    assert build(tmp_path, text % 3).widget.engine.factor == 3
    (line,) = errors_of(tmp_path, text % 10)
    assert line == "x.yaml:4: widget.engine.factor: factor must be <= 9"


# ---------------------------------------------------------------- describe


def test_describe():
    text = recipe.describe(Cart(0.5, spares=(Steam(2.0),)))
    assert text.splitlines() == [
        "cart(threshold=0.5, block_length=8, mode='slow', score='probability', note=None)  Rolls along.",
        "  engine: steam(pressure=1.0)  Boils water.  [Watt 1776]",
        "  spares:",
        "    0: steam(pressure=2.0)  Boils water.  [Watt 1776]",
    ]
    root = Root(Cart(1.0), lazy=Lazy.of(3), fleet={"a": Lazy({"_component_": "cart"}, lambda: None)})
    text = recipe.describe(root)
    assert "a: {_component_: cart}" in text and "out='runs'" in text


# ---------------------------------------------------------------- anything at all

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["cart", "train", "steam", "sized", "fast", "os.system", "a.b", "", "1e-4", "yes"]),
)
keys = st.one_of(
    st.sampled_from(
        ["_component_", "widget", "lazy", "fleet", "run", "sizes", "pair", "names", "limit", "raw", "table"]
        + ["threshold", "engine", "spares", "mode", "block_size", "block_length", "gen_length", "seed", "out"]
        + ["compile", "base", "cars"]
    ),
    st.text(max_size=6),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)
relaxed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@relaxed
@given(tree=st.dictionaries(keys, trees, max_size=5))
def test_any_tree_builds_or_gives_recipe_errors(tree):
    errors = recipe.validate(tree, Root)
    assert all(isinstance(error, RecipeError) and str(error) for error in errors)
    try:
        root = recipe.build(tree, Root)
    except RecipeError as problem:
        assert str(problem)
    else:
        assert not errors and isinstance(root, Root)


@relaxed
@given(tree=st.dictionaries(keys, trees, max_size=5))
def test_any_tree_survives_its_own_yaml(tree, tmp_path):
    tree.pop("base", None)
    made = Recipe.from_tree(tree)
    try:
        loaded = recipe.load(write(tmp_path, made.to_yaml()))
    except RecipeError as problem:
        assert not tree or "surrogate" in str(problem) or "not allowed" in str(problem)
    else:
        assert loaded.hash() == made.hash()


@relaxed
@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}&*!<>|%#'\"\\ \n\t0.,?@`~=\u00e9\ud7ff"), max_size=40))
def test_any_text_is_read_or_gives_a_recipe_error(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        recipe.load(path).build(Root)
    except RecipeError as problem:
        assert str(problem)


@relaxed
@given(key=st.one_of(keys, st.text(max_size=10)), value=st.text(max_size=10), tree=trees)
def test_any_override_is_applied_or_gives_a_recipe_error(key, value, tree, tmp_path):
    path = write(tmp_path, Recipe.from_tree({"widget": "cart", "raw": str(tree)[:20].isascii()}).to_yaml())
    try:
        recipe.load(path, [f"{key}={value}", f"raw.{key}={value}"]).build(Root)
    except RecipeError as problem:
        assert str(problem)
