"""Type hints as the schema of a recipe: one walk that validates, renames aliases and prepares construction.

`check(node, annotation, path, errors)` returns the node under canonical names and a function that constructs
the object; it calls no constructor itself, so every error of a recipe is known before anything is built. What
an annotation means:

    base class of a kind          a component: a name, a dotted path, or {_component_: name, argument: ...}
    another dataclass             a mapping of its fields, without `_component_`
    Lazy[X]                       X, checked now, constructed by `.build()`
    X | Y, Literal, list, tuple, Sequence, dict[str, X], int, float, bool, str, Path, Any
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import math
import re
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from dllm_toolkit import registry
from dllm_toolkit.recipe_errors import RecipeError
from dllm_toolkit.recipe_hints import (
    ALIASES,
    COMPONENT,
    MAPPINGS,
    SEQUENCES,
    WORDS,
    Lazy,
    Parameter,
    expects,
    parameters,
    plain_hint,
    slot_of,
    title_of,
)
from dllm_toolkit.yaml_marks import Node, dump, join, kind_of

LARGEST = 2**63 - 1  # what a tensor of whole numbers holds


@dataclass(frozen=True)
class Checked:
    """A node under canonical names, and how to construct what it describes."""

    node: Node
    make: Callable[[], Any]


def check(node: Node, annotation: Any, path: str, errors: list[RecipeError]) -> Checked:
    """Check `node` against `annotation`, adding to `errors` all that is wrong with it."""
    annotation = plain_hint(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return Checked(node, node.plain)
    if origin is Lazy or annotation is Lazy:
        inner = check(node, arguments[0] if arguments else Any, path, errors)
        return Checked(inner.node, lambda: Lazy(inner.node.plain(), inner.make))
    if origin in (Union, types.UnionType):
        return _check_union(node, annotation, path, errors)
    if origin is Literal:
        return _check_literal(node, annotation, path, errors)
    slot = slot_of(annotation)
    if slot is not None:
        return _check_component(node, *slot, path, errors)
    if (origin or annotation) in MAPPINGS:
        return _check_mapping(node, annotation, path, errors)
    if (origin or annotation) in SEQUENCES:
        return _check_sequence(node, annotation, path, errors)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(node.value, dict):
            return _fail(errors, node, path, f"expected {expects(annotation)}, got {kind_of(node.value)}.")
        if COMPONENT in node.value:
            message = f"`{COMPONENT}` has no place here: this is always {title_of(annotation)}. Remove the line."
            return _fail(errors, node.value[COMPONENT], join(path, COMPONENT), message)
        return _check_call(node, annotation, node.value, path, errors)
    return _check_scalar(node, annotation, path, errors)


def _fail(
    errors: list[RecipeError],
    node: Node,
    path: str,
    message: str,
    write: str | None = None,
    *,
    key: bool = False,
    at: str | None = None,
) -> Checked:
    """Add an error. `write` is the line to write; at `at` (default `path`) if it comes from an override."""
    mark = node.key_mark if key and node.key_mark is not None else node.mark
    if write is not None and mark.overridden and (at or path):
        write = f"{at or path}={write.removeprefix('- ') if write.startswith('- ') else write.partition(': ')[2]}"
    errors.append(RecipeError(mark, path, message, write))
    return Checked(node, node.plain)


def _line(path: str, value: Any) -> str:
    """The line that gives the last key of `path` this value."""
    name = path.rpartition(".")[2]
    text = dump(value, flow=True)
    return f"- {text}" if name.isdigit() else f"{name}: {text}" if name else text


def _close(name: str, known: Iterable[str]) -> list[str]:
    folded = {candidate.lower(): candidate for candidate in known}
    return [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)]


def _check_scalar(node: Node, annotation: Any, path: str, errors: list[RecipeError]) -> Checked:
    value = node.value
    if annotation is int and type(value) is int and not -LARGEST <= value <= LARGEST:
        return _fail(errors, node, path, f"{str(value)[:20]}{'...' * (len(str(value)) > 20)} is too large for a whole number of 64 bits.")
    if annotation is float and isinstance(value, float) and math.isnan(value):
        return _fail(errors, node, path, f"expected {expects(annotation)}, got {value}, which compares with nothing.")
    if annotation in (bool, int, str, type(None)) and type(value) is annotation:
        return Checked(node, lambda: value)
    if annotation is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            return _fail(errors, node, path, f"{str(value)[:20]}... is too large for a number.")
        return Checked(node, lambda: number)
    if annotation is Path and type(value) is str:
        return Checked(node, lambda: Path(value))
    if annotation in (str, Path) and node.mark.overridden and node.raw is not None:
        typed = dataclasses.replace(node, value=node.raw)  # `prompt=42`: the shell ate the quotes
        return Checked(typed, lambda: annotation(typed.value))
    if annotation not in WORDS:
        message = f"this argument takes {expects(annotation)}, which a recipe cannot express. Remove the line."
        return _fail(errors, node, path, message, key=True)
    write = None
    if annotation in (str, Path) and node.raw is not None and value is not None:
        write = _line(path, node.raw)
    elif annotation is int and isinstance(value, float) and value.is_integer():
        write = _line(path, int(value))
    elif annotation is bool and str(value).lower() in ("yes", "on", "1", "no", "off", "0"):
        write = _line(path, str(value).lower() in ("yes", "on", "1"))
    elif annotation in (int, float) and isinstance(value, str):
        with_point = value.replace(",", ".").strip()
        number = _number(with_point, annotation)
        write = None if number is None or number != number else _line(path, number)
    return _fail(errors, node, path, f"expected {expects(annotation)}, got {kind_of(value)}.", write)


def _number(text: str, annotation: Any) -> Any:
    try:
        return annotation(text)
    except ValueError:
        return None


def _check_literal(node: Node, annotation: Any, path: str, errors: list[RecipeError]) -> Checked:
    choices = get_args(annotation)
    # The shell takes the quotes off an override: `precision=16` may be the text '16'.
    typed = (node.value, node.raw) if node.mark.overridden else (node.value,)
    for choice in choices:
        if any(type(choice) is type(value) and choice == value for value in typed):
            return Checked(node, lambda choice=choice: choice)
    close = _close(str(node.value), [str(choice) for choice in choices])
    write = next((_line(path, choice) for choice in choices if str(choice) in close), None)
    return _fail(errors, node, path, f"expected {expects(annotation)}, got {kind_of(node.value)}.", write)


def _check_union(node: Node, annotation: Any, path: str, errors: list[RecipeError]) -> Checked:
    choices = [plain_hint(choice) for choice in get_args(annotation)]
    if node.value is None and type(None) in choices:
        return Checked(node, lambda: None)
    choices = [choice for choice in choices if choice is not type(None)]
    choices.sort(key=lambda choice: choice is not type(node.value))  # 3 is an int before it is a float
    attempts: list[list[RecipeError]] = []
    for choice in choices:
        attempt: list[RecipeError] = []
        checked = check(node, choice, path, attempt)
        if not attempt:
            return checked
        attempts.append(attempt)
    # The alternative that was meant is the one whose own shape fits, and whose parts are wrong.
    meant = [attempt for attempt in attempts if all(error.path != path for error in attempt)] or attempts
    if len(choices) == 1 or len(meant) < len(attempts) or _is_component(node):
        errors.extend(min(meant, key=len))
        return Checked(node, node.plain)
    return _fail(errors, node, path, f"expected {expects(annotation)}, got {kind_of(node.value)}.")


def _is_component(node: Node) -> bool:
    return isinstance(node.value, dict) and COMPONENT in node.value


def _check_mapping(node: Node, annotation: Any, path: str, errors: list[RecipeError]) -> Checked:
    if not isinstance(node.value, dict):
        return _fail(errors, node, path, f"expected a mapping, got {kind_of(node.value)}.")
    inside = get_args(annotation)[1] if get_args(annotation) else Any
    parts = {key: check(child, inside, join(path, key), errors) for key, child in node.value.items()}
    renamed = dataclasses.replace(node, value={key: part.node for key, part in parts.items()})
    return Checked(renamed, lambda: {key: part.make() for key, part in parts.items()})


def _check_sequence(node: Node, annotation: Any, path: str, errors: list[RecipeError]) -> Checked:
    if not isinstance(node.value, list):
        write = _line(path, [node.plain()]) if not isinstance(node.value, dict) and node.value is not None else None
        return _fail(errors, node, path, f"expected a list, got {kind_of(node.value)}.", write)
    collect = get_origin(annotation) or annotation
    inside = list(get_args(annotation)) or [Any, ...]
    if collect is tuple and inside[-1] is not ...:
        if len(inside) != len(node.value):
            return _fail(errors, node, path, f"expected {len(inside)} values, got {len(node.value)}.")
    else:
        inside = [inside[0]] * len(node.value)
    pairs = zip(node.value, inside, strict=True)
    parts = [check(child, hint, join(path, i), errors) for i, (child, hint) in enumerate(pairs)]
    renamed = dataclasses.replace(node, value=[part.node for part in parts])
    build = tuple if collect is collections.abc.Sequence else collect
    return Checked(renamed, lambda: build(part.make() for part in parts))


def _check_component(node: Node, kind: str, wanted: Any, path: str, errors: list[RecipeError]) -> Checked:
    bare = isinstance(node.value, str)
    if not bare and not isinstance(node.value, dict):
        known = ", ".join(registry.names(kind)) or "none"
        message = f"expected a {kind}, got {kind_of(node.value)}. Known: {known}; or a dotted path."
        return _fail(errors, node, path, message)
    if not bare and COMPONENT not in node.value:
        known = registry.names(kind)
        message = f"missing `{COMPONENT}`: which {kind}? Known: {', '.join(known) or 'none'}; or a dotted path."
        return _fail(errors, node, path, message, f"{COMPONENT}: {known[0] if len(known) == 1 else '<name>'}")
    name = node if bare else node.value[COMPONENT]
    if not isinstance(name.value, str):
        message = f"`{COMPONENT}` is the name of a {kind} or a dotted path, got {kind_of(name.value)}."
        return _fail(errors, name, path, message)
    try:
        target = registry.lookup(kind, name.value)
    except registry.UnknownName as problem:
        close = problem.suggestions[0] if problem.suggestions else None
        write = None if close is None else _line(path if bare else COMPONENT, close)
        return _fail(errors, name, path, str(problem), write)
    if inspect.isclass(target) and registry.kind_of(wanted) is None and wanted not in target.__mro__:
        message = f"expected a {wanted.__name__}, got {name.value!r}, which is another {kind}."
        return _fail(errors, name, path, message)
    given = {} if bare else {key: child for key, child in node.value.items() if key != COMPONENT}
    checked = _check_call(node, target, given, path, errors)

    def make() -> Any:
        built = checked.make()
        base = registry.base_of(kind)
        if not getattr(base, "_is_protocol", False) and not isinstance(built, wanted):
            message = f"{name.value!r} returned a {type(built).__name__}, which is no {wanted.__name__}."
            raise RecipeError(name.mark, path, message)
        return built

    if bare:
        return Checked(node, make)
    renamed = dataclasses.replace(node, value={COMPONENT: name, **checked.node.value})
    return Checked(renamed, make)


def _check_call(node: Node, target: Any, given: dict[str, Node], path: str, errors: list[RecipeError]) -> Checked:
    """Check the arguments of a class or function, and prepare the call."""
    title = title_of(target)
    try:
        takes, takes_others = parameters(target)
    except ValueError as problem:
        return _fail(errors, node, path, str(problem))
    listed = f"{title} takes: {', '.join(takes)}." if takes else f"{title} takes no arguments."
    parts: dict[str, Checked] = {}
    misspelt: list[str] = []
    for typed, child in given.items():
        key, value = _canonical(typed, child, takes)
        if key in takes or takes_others:
            if key in parts or (key != typed and key in given):
                message = f"{typed!r} is another name of {key!r}, and both are given. Keep one."
                _fail(errors, child, join(path, typed), message, key=True)
                continue
            hint = takes[key].annotation if key in takes else Any
            parts[key] = check(value, hint, join(path, key), errors)
            continue
        close = _close(key, [name for name in takes if name not in given]) or _close(key, takes)
        misspelt += close
        question = f"; did you mean {close[0]!r}?" if close else "."
        write = f"{close[0]}: {dump(child.plain(), flow=True)}" if close else None
        message = f"unknown key {typed!r}{question} {listed}{_leftover(node, path)}"
        at = join(path, close[0]) if close else None
        _fail(errors, child, join(path, typed), message, write, key=True, at=at)
    for key, parameter in takes.items():
        if parameter.required and key not in (*parts, *misspelt):
            write = f"{key}: <{expects(parameter.annotation)}>"
            _fail(errors, node, path, f"missing key {key!r}. {listed}", write, at=join(path, key))
    renamed = dataclasses.replace(node, value={key: part.node for key, part in parts.items()})

    def make() -> Any:
        arguments = {key: part.make() for key, part in parts.items()}
        try:
            return target(**arguments)
        except RecipeError:
            raise
        except (TypeError, ValueError) as problem:
            raise _located(problem, node, path, renamed.value) from problem

    return Checked(renamed, make)


def _leftover(node: Node, path: str) -> str:
    """What to write when an override has changed the component and left the arguments of the old one."""
    name = node.value.get(COMPONENT) if isinstance(node.value, dict) else None
    if name is None or not name.mark.overridden:
        return ""
    return f" To drop the old arguments, write {path}={{{COMPONENT}: {name.value}}}."


def _canonical(key: str, node: Node, takes: Mapping[str, Parameter]) -> tuple[str, Node]:
    alias = ALIASES.get(key)
    if alias is None or key in takes or alias.name not in takes:
        return key, node
    value = alias.values.get(node.value, node.value) if isinstance(node.value, str) else node.value
    return alias.name, dataclasses.replace(node, value=value)


def _located(problem: Exception, node: Node, path: str, given: Mapping[str, Node]) -> RecipeError:
    """A constructor's own error, at the argument that its message names, or else at the component."""
    message = str(problem) or type(problem).__name__
    if type(problem) is TypeError:  # more likely a slip in the component's code than in the recipe
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        message += f" (TypeError at {Path(frame.filename).name}:{frame.lineno})"
    for word in re.findall(r"[\w.+-]+(?:\[[^\]\s]*\][\w.+-]*)?", message):
        place, found = _follow(word, given)
        if found is not None:
            return RecipeError(found.mark, join(path, place), message)
    return RecipeError(node.mark, path, message)


def _follow(dotted: str, given: Mapping[str, Node]) -> tuple[str, Node | None]:
    """The value that a dotted path names, as far down as the recipe goes; names may hold dots themselves."""
    parts = dotted.strip(".").split(".")
    for count in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if name not in given:
            continue
        node = given[name]
        if rest and isinstance(node.value, dict):
            place, found = _follow(rest, node.value)
            if found is not None:
                return join(name, place), found
        return name, node
    return "", None
