"""Recipes: YAML files that say which objects to make, with which arguments.

    base: other.yaml                                   # optional: start from another recipe
    decoder: {_component_: d2f, threshold: 0.9}        # a registered name or a dotted path, and its arguments
    cache: block_causal                                # a bare name is a component without arguments

A recipe is data, perhaps from a stranger. It is validated as a whole against the type hints of what it names
before anything is constructed; a dotted path reaches nothing but subclasses of its slot's base class (see
`registry`); nothing in it is evaluated. Errors name the file, the line, the YAML path and what to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dllm_toolkit import registry
from dllm_toolkit.recipe_errors import OVERRIDE, Mark, RecipeError, RecipeErrors
from dllm_toolkit.recipe_hints import ALIASES, COMPONENT, Lazy, digest
from dllm_toolkit.recipe_schema import Checked, check
from dllm_toolkit.sweep import SWEEP, expand
from dllm_toolkit.yaml_marks import Node, dump, join, kind_of, node_of, read, scalar

__all__ = [
    "Lazy",
    "Mark",
    "Recipe",
    "RecipeError",
    "RecipeErrors",
    "build",
    "describe",
    "load",
    "override",
    "validate",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """A recipe with its base merged in and its overrides applied; `node` is the data with its marks."""

    path: Path
    node: Node = dataclasses.field(repr=False)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], path: Path | str = "<data>") -> Recipe:
        """A recipe from plain data instead of a file."""
        return cls(Path(path), node_of(dict(tree), Mark(str(path))))

    @property
    def tree(self) -> dict[str, Any]:
        """The resolved data: dicts, lists and scalars."""
        return self.node.plain()

    @property
    def marks(self) -> dict[str, Mark]:
        """YAML path -> where its value was written."""
        return dict(_marks(self.node, ""))

    def hash(self) -> str:
        """16 hex digits that identify the resolved data, whatever the order of its keys."""
        return digest(self.tree)

    def to_yaml(self) -> str:
        """The resolved data as YAML text; reading it back gives the same data and the same hash."""
        return dump(self.tree)

    def checked(self, annotation: Any) -> Recipe:
        """The recipe under canonical names. Raises `RecipeErrors` with everything that is wrong."""
        return dataclasses.replace(self, node=_check(self.node, annotation).node)

    def build(self, annotation: type[T]) -> T:
        """Construct the object that the recipe describes: `annotation`, usually a command's dataclass."""
        return build(self.node, annotation)

    def at(self, keys: Sequence[str], message: object) -> str:
        """`message` with the place of the value under `keys`: for what turns out wrong after the recipe itself was checked.

        A value that was left to its default has no line; the nearest mapping around it that was written has one.
        """
        node, mark = self.node, Mark(str(self.path))
        for key in keys:
            if isinstance(node.value, list) and key.isdecimal() and int(key) < len(node.value):
                child = node.value[int(key)]
            else:
                child = node.value.get(key) if isinstance(node.value, dict) else None
            if child is None:
                break
            node, mark = child, child.mark
        return ": ".join([str(mark), ".".join(keys), str(message)])


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, merge it over its `base`, apply overrides such as `decoder.threshold=0.8`.

    An override's value is a YAML scalar, list or mapping. `decoder=d2f` on a component changes its name and
    keeps its arguments; `rows.0.cache=dual` reaches into a list. Sweeps are expanded after that, see `sweep`. Raises `RecipeError`.
    """
    path = Path(path)
    return Recipe(path, expand(override(_with_base(path, ()), overrides)))


def override(node: Any, overrides: Sequence[str]) -> Node:
    """`node` (a node, or plain data) with `key=value` texts applied, from left to right."""
    changed = node_of(node)
    for text in overrides:
        changed = _override(changed, text)
    return changed


def validate(node: Any, annotation: Any, path: str = "") -> list[RecipeError]:
    """Everything wrong with `node` (a node, or plain data) as an `annotation`; constructs nothing."""
    errors: list[RecipeError] = []
    check(node_of(node), annotation, path, errors)
    return errors


def build(node: Any, annotation: Any, path: str = "") -> Any:
    """Validate `node` (a node, or plain data) and construct it. Raises `RecipeError`."""
    return _check(node_of(node), annotation, path).make()


def describe(thing: Any) -> str:
    """A built object as text, one line a part: its name, arguments, first line of documentation and paper."""
    return "\n".join(_describe(thing, "", 0))


def _check(node: Node, annotation: Any, path: str = "") -> Checked:
    errors: list[RecipeError] = []
    checked = check(node, annotation, path, errors)
    if errors:
        raise RecipeErrors(errors)
    return checked


def _with_base(path: Path, children: tuple[Path, ...]) -> Node:
    root = read(path)
    own = path.resolve()
    base = root.value.get("base")
    if base is None:
        return root
    if not isinstance(base.value, str):
        raise RecipeError(base.mark, "base", f"expected the path of a recipe, got {kind_of(base.value)}.")
    parent_path = path.parent / base.value
    if parent_path.resolve() in (own, *children):
        chain = " -> ".join(file.name for file in (*children, own, parent_path.resolve()))
        raise RecipeError(base.mark, "base", f"the recipes start from each other: {chain}. Break the circle.")
    if not parent_path.is_file():
        raise RecipeError(base.mark, "base", f"there is no recipe {str(parent_path)!r}. The path starts at this file.")
    parent = _with_base(parent_path, (*children, own))
    rest = {key: child for key, child in root.value.items() if key != "base"}
    return _merge(parent, dataclasses.replace(root, value=rest))


def _merge(parent: Node, child: Node) -> Node:
    """The child's values over the parent's; mappings are merged, unless the child names another component or one of them is a sweep."""
    if any(isinstance(node.value, dict) and SWEEP in node.value for node in (parent, child)):
        return child
    if isinstance(parent.value, str) and isinstance(child.value, dict) and COMPONENT not in child.value:
        parent = dataclasses.replace(parent, value={COMPONENT: parent})
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    names = [node.value[COMPONENT].value for node in (parent, child) if COMPONENT in node.value]
    if COMPONENT in child.value and len({str(name) for name in names}) == 2:
        return child
    merged = dict(parent.value)
    for key, value in child.value.items():
        present = _present(merged, key)
        merged[present] = _merge(merged[present], value) if present in merged else value
    return dataclasses.replace(child, value=merged)


def _present(mapping: Mapping[str, Node], key: str) -> str:
    """`key`, or the other name under which the mapping holds it (`gen_length` for `max_new_tokens`)."""
    if key in mapping:
        return key
    others = [ALIASES[key].name] if key in ALIASES else [alias for alias in ALIASES if ALIASES[alias].name == key]
    return next((other for other in others if other in mapping), key)


def _override(root: Node, text: str) -> Node:
    mark = Mark(OVERRIDE, None, text)
    key, equals, typed = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        message = "an override is `key=value`, with dots for nested keys."
        raise RecipeError(mark, "", message, "decoder.threshold=0.9")
    if parts == ["base"]:
        raise RecipeError(mark, "base", "`base` is read before the overrides. Set it in the file.")
    return _put(root, parts, scalar(typed, mark), "")


def _put(node: Node | None, parts: Sequence[str], value: Node, path: str) -> Node:
    if not parts:
        if node is None or not isinstance(node.value, dict) or COMPONENT not in node.value:
            return value
        if not isinstance(value.value, str):
            return value
        return dataclasses.replace(node, value={**node.value, COMPONENT: value})
    head, rest = parts[0], parts[1:]
    if node is None or node.value is None:
        node = Node({}, value.mark)
    elif isinstance(node.value, str):  # `decoder: d2f` and `decoder.threshold=0.9`
        node = dataclasses.replace(node, value={COMPONENT: node}, raw=None)
    if isinstance(node.value, list):
        if not head.isdecimal() or int(head) >= len(node.value):
            message = f"the list has {len(node.value)} items, numbered from 0, got {head!r}."
            raise RecipeError(value.mark, path, message)
        items = list(node.value)
        items[int(head)] = _put(items[int(head)], rest, value, join(path, head))
        return dataclasses.replace(node, value=items)
    if not isinstance(node.value, dict):
        raise RecipeError(value.mark, path, f"there is nothing under it to set: it is {kind_of(node.value)}.")
    key = _present(node.value, head)
    child = node.value.get(key)
    put = _put(child, rest, value, join(path, head))
    key_mark = value.mark if child is None or not rest else child.key_mark
    return dataclasses.replace(node, value={**node.value, key: dataclasses.replace(put, key_mark=key_mark)})


def _marks(node: Node, path: str) -> Iterator[tuple[str, Mark]]:
    yield path, node.mark
    children: Iterable[tuple[Any, Node]] = ()
    if isinstance(node.value, dict):
        children = node.value.items()
    elif isinstance(node.value, list):
        children = enumerate(node.value)
    for key, child in children:
        yield from _marks(child, join(path, key))


def _describe(thing: Any, label: str, depth: int) -> Iterator[str]:
    head = "  " * depth + (f"{label}: " if label else "")
    if isinstance(thing, Lazy):
        yield f"{head}{dump(thing.tree, flow=True)}"
        return
    if isinstance(thing, Mapping) or (isinstance(thing, list | tuple) and any(map(_has_parts, thing))):
        yield head.rstrip()
        pairs = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
        for key, value in pairs:
            yield from _describe(value, str(key), depth + 1)
        return
    if not _has_parts(thing):
        yield f"{head}{_short(thing)}"
        return
    items = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    fields = [(item.name, getattr(thing, item.name)) for item in items if item.repr]
    plain = ", ".join(f"{name}={_short(value)}" for name, value in fields if not _is_nested(value))
    name = registry.name_of(type(thing)) or type(thing).__name__
    documentation = _first_line(type(thing))
    papers = "; ".join(getattr(thing, "cite", ()))
    yield (f"{head}{name}({plain})" + (f"  {documentation}" if documentation else "") + (f"  [{papers}]" if papers else ""))
    for key, value in fields:
        if _is_nested(value):
            yield from _describe(value, key, depth + 1)


def _has_parts(thing: Any) -> bool:
    if isinstance(thing, type):
        return False
    return dataclasses.is_dataclass(thing) or registry.name_of(type(thing)) is not None


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_nested, value.values()))
    return _has_parts(value) or (isinstance(value, list | tuple) and any(map(_has_parts, value)))


def _first_line(cls: type) -> str:
    text = (cls.__dict__.get("__doc__") or "").strip()
    # A dataclass without a docstring gets its signature for one.
    return "" if text.startswith(f"{cls.__name__}(") else text.partition("\n")[0]


def _short(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else repr(value)
