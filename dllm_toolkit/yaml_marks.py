"""YAML text -> nodes that remember where every key and value was written, and plain data -> YAML text.

The reader accepts the data subset of YAML 1.2: no tags that name a type of a programming language, no dates,
no sexagesimal numbers; `yes`, `no`, `on` and `off` are text; `1e-4` is a number (YAML 1.1, which PyYAML
follows by default, reads it as text). Duplicate keys are errors. Aliases and `<<` work; what they expand to
is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dllm_toolkit.recipe_errors import Mark, RecipeError, file_error

MAX_DEPTH = 40  # deeper nesting is an attack or an accident
MAX_NODES = 100_000  # aliases of aliases grow exponentially ("billion laughs")

_TAG = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Node:
    """A value of a recipe: a scalar, a `dict[str, Node]` or a `list[Node]`, and where it was written."""

    value: Any
    mark: Mark = Mark()
    key_mark: Mark | None = None  # where its key stands, for a value of a mapping
    raw: str | None = None  # a scalar as it was typed

    def plain(self) -> Any:
        """The data without the marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes the line breaks of Unicode bare, and reads them back as "\n".
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _text)


def _whole(pattern: str) -> re.Pattern[str]:
    return re.compile(f"(?:{pattern})$")


for _kind, _pattern, _first in (
    ("null", "|".join(map(re.escape, _NULLS)), ["", "~", "n", "N"]),
    ("bool", "|".join(_BOOLS), list("tTfF")),
    ("int", _INT.pattern, list("-+0123456789")),
    ("float", _FLOAT.pattern, list("-+.0123456789")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _whole(_pattern), _first)
    # The dumper keeps PyYAML's own patterns too, and so quotes whatever either reader would take for no text.
    _Dumper.add_implicit_resolver(_TAG + _kind, _whole(_pattern), _first)


def read(path: Path) -> Node:
    """Parse a recipe file into a mapping node. Raises `RecipeError` for anything that is not one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise file_error(path, "there is no such file. Check the path; recipes end in .yaml.") from None
    except IsADirectoryError:
        raise file_error(path, "this is a directory, not a recipe. Name one of the .yaml files in it.") from None
    except UnicodeDecodeError as problem:
        message = f"not a text file in UTF-8: {problem.reason} at byte {problem.start}. Save it as UTF-8."
        raise file_error(path, message) from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise file_error(path, f"cannot be read: {problem}.") from None
    root = parse(text, Mark(str(path), 1))
    if root.value is None:
        raise file_error(path, "the recipe is empty. Write `key: value` lines; `dllm-toolkit list` shows the names.")
    if not isinstance(root.value, dict):
        raise RecipeError(root.mark, "", f"a recipe is `key: value` lines, got {kind_of(root.value)}.")
    return root


def parse(text: str, mark: Mark) -> Node:
    """Parse YAML text. `mark` gives the file, or the override that the text belongs to."""
    try:
        tree = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as problem:
        where = mark if mark.overridden else replace(mark, line=text.count("\n", 0, problem.position) + 1)
        raise RecipeError(where, "", f"the character {chr(problem.character)!r} is not allowed in YAML. Remove it.") from None
    except yaml.MarkedYAMLError as problem:
        at = problem.problem_mark or problem.context_mark
        where = replace(mark, line=at.line + 1) if at and not mark.overridden else mark
        column = f" (column {at.column + 1})" if at else ""
        parts = " ".join(part for part in (problem.context, problem.problem) if part)
        raise RecipeError(where, "", f"not valid YAML: {parts}{column}.") from None
    except RecursionError:
        raise RecipeError(mark, "", f"nested more than {MAX_DEPTH} levels deep. Flatten it.") from None
    except (ValueError, OverflowError) as problem:  # an escape outside of Unicode
        raise RecipeError(mark, "", f"not valid YAML: {problem}.") from None
    return Node(None, mark, raw="") if tree is None else _Converter(mark).convert(tree, "", 0)


def scalar(text: str, mark: Mark) -> Node:
    """The value of an override: lists, mappings and quoted text as YAML, anything else as one plain scalar.

    So `prompt=Tom: how many?` is text, though YAML would read a mapping.
    """
    stripped = text.strip()
    if stripped[:1] in tuple("[{") or (len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""):
        return parse(stripped, mark)
    tag = _Loader("").resolve(yaml.ScalarNode, stripped, (True, False))
    return _Converter(mark).convert(yaml.ScalarNode(tag, stripped), "", 0, raw=text)


def node_of(data: Any, mark: Mark = Mark()) -> Node:  # noqa: B008 - Mark is frozen
    """Plain data as a node; nodes stay what they are."""
    if isinstance(data, Node):
        return data
    if isinstance(data, dict):
        return Node({str(key): node_of(value, mark) for key, value in data.items()}, mark)
    if isinstance(data, list | tuple):
        return Node([node_of(value, mark) for value in data], mark)
    return Node(data, mark)


def dump(data: Any, *, flow: bool = False) -> str:
    """Plain data as YAML that `parse` reads back as the same data; `flow` puts it on one line."""
    width = 1_000_000 if flow else 100
    style = True if flow else None
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=style)
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def kind_of(value: Any) -> str:
    """What a value is, in a reader's words."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = f"the number {value}" if isinstance(value, int | float) else f"the text {value!r}"
    return text if len(text) < 100 else f"{text[:100]}..."


class _Converter:
    """PyYAML's nodes -> ours, with the checks that PyYAML leaves out."""

    def __init__(self, mark: Mark) -> None:
        self.mark, self.count = mark, 0

    def at(self, node: yaml.Node) -> Mark:
        if self.mark.overridden or node.start_mark is None:
            return self.mark
        return replace(self.mark, line=node.start_mark.line + 1)

    def convert(self, node: yaml.Node, path: str, depth: int, raw: str | None = None) -> Node:
        mark = self.at(node)
        self.count += 1
        if depth > MAX_DEPTH:
            raise RecipeError(mark, "", f"nested more than {MAX_DEPTH} levels deep. Flatten it.")
        if self.count > MAX_NODES:
            raise RecipeError(mark, "", f"more than {MAX_NODES} values, counting what aliases stand for. Shorten it.")
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return Node(self.mapping(node, path, depth), mark)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            children = enumerate(node.value)
            return Node([self.convert(child, join(path, i), depth + 1) for i, child in children], mark)
        if isinstance(node, yaml.ScalarNode) and tag in ("str", "merge", "null", "bool", "int", "float"):
            return Node(self.scalar(tag, node.value, mark, path), mark, raw=node.value if raw is None else raw)
        raise RecipeError(mark, path, f"the tag {node.tag!r} is not allowed: a recipe is data. Remove it.")

    def scalar(self, tag: str, text: str, mark: Mark, path: str) -> Any:
        if tag in ("str", "merge"):
            if not text.isprintable() and not _encodes(text):
                raise RecipeError(mark, path, "the text holds half a surrogate pair, which is no character.")
            return text
        if tag == "null" and text in _NULLS:
            return None
        if tag == "bool" and text in _BOOLS:
            return _BOOLS[text]
        if tag == "int" and _INT.fullmatch(text):
            if len(text) > 1_000:
                raise RecipeError(mark, path, "the number has more than 1000 digits.")
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if tag == "float" and (_FLOAT.fullmatch(text) or _INT.fullmatch(text)):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        raise RecipeError(mark, path, f"the tag '!!{tag}' does not suit {text!r}. Remove the tag, or quote the text.")

    def mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            mark = self.at(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.removeprefix(_TAG) not in (
                "str",
                "merge",
            ):
                typed = key_node.value if isinstance(key_node, yaml.ScalarNode) else "..."
                raise RecipeError(mark, path, f"a key is text, got {typed!r}.", f'"{typed}":')
            if key_node.tag == _TAG + "merge":
                for name, child in self.merge(value_node, path, depth):
                    merged.setdefault(name, child)
                continue
            key = self.scalar("str", key_node.value, mark, path)
            if key in own:
                first = own[key].key_mark
                raise RecipeError(mark, join(path, key), f"this key was already given ({first}). Keep one of them.")
            own[key] = replace(self.convert(value_node, join(path, key), depth + 1), key_mark=mark)
        return {**merged, **own}

    def merge(self, node: yaml.Node, path: str, depth: int) -> Iterable[tuple[str, Node]]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise RecipeError(self.at(source), path, "`<<` takes a mapping or a list of mappings.")
            yield from self.convert(source, path, depth + 1).value.items()


def join(path: str, key: str | int) -> str:
    """The YAML path of a child."""
    return f"{path}.{key}" if path else str(key)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
