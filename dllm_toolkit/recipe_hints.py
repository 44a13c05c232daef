"""What type hints mean to a recipe: the arguments of a class, the words for them, `Lazy`, and aliases."""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from dllm_toolkit import registry

COMPONENT = "_component_"

T = TypeVar("T")


@dataclass(frozen=True)
class Alias:
    """The canonical name of an argument that users know by another name, and of the values it takes."""

    name: str
    values: Mapping[str, str] = field(default_factory=dict)


# Accepted where the component takes the canonical name and not the alias (a model's `block_size` stays).
ALIASES: dict[str, Alias] = {
    "gen_length": Alias("max_new_tokens"),
    "block_size": Alias("block_length"),
    "remasking": Alias("score", {"low_confidence": "probability"}),
    "alg": Alias("score", {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "negative_entropy"}),
}


@dataclass(frozen=True, eq=False)
class Lazy(Generic[T]):
    """A component that is validated with the recipe and constructed when it is needed (a model, say).

    `build()` constructs anew at each call. Two of them are equal when their recipes are.
    """

    tree: Any
    make: Callable[[], T] = field(repr=False)

    @classmethod
    def of(cls, value: T) -> Lazy[T]:
        """Wrap an object that exists already."""
        return cls(
            {COMPONENT: f"{type(value).__module__}.{type(value).__qualname__}", "id": id(value)},
            lambda: value,
        )

    def build(self) -> T:
        """Construct the object. Raises `RecipeError` with the place in the recipe."""
        return self.make()

    @property
    def key(self) -> str:
        """16 hex digits that identify the recipe of this object."""
        return digest(self.tree)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lazy) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Parameter:
    """One argument of a component or field of a dataclass."""

    annotation: Any
    required: bool


def digest(tree: Any) -> str:
    """16 hex digits of the SHA-256 of plain data; the order of keys does not matter."""
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


MAPPINGS = (dict, Mapping, collections.abc.MutableMapping)
SEQUENCES = (list, tuple, collections.abc.Sequence, set, frozenset)
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "nothing (null)",
    Any: "a value",
}


def expects(annotation: Any) -> str:
    """What an annotation accepts, in a reader's words."""
    annotation = plain_hint(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Lazy and arguments:
        return expects(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(expects(part) for part in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    slot = slot_of(annotation)
    if slot is not None:
        return f"a {slot[0]}"
    if (origin or annotation) in MAPPINGS:
        return "a mapping"
    if (origin or annotation) in SEQUENCES:
        return "a list"
    if dataclasses.is_dataclass(annotation):
        return f"a mapping ({', '.join(parameters(annotation)[0])})"
    return WORDS.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def parameters(target: Any) -> tuple[dict[str, Parameter], bool]:
    """The named arguments of a class or function, and whether it takes any others (`**kwargs`).

    Raises `ValueError` when its signature or its type hints cannot be read.
    """
    callee: Callable[..., Any] = target
    try:
        if dataclasses.is_dataclass(target):  # resolves each field in the module that wrote it
            hints = typing.get_type_hints(target, include_extras=True)
        else:
            hints = _argument_hints(target.__init__ if inspect.isclass(target) else target)
        signature = inspect.signature(callee)
    except (NameError, TypeError) as problem:
        raise ValueError(
            f"cannot read the type hints of {title_of(target)}: {problem}. "
            "Import the types when the module runs, not under `if TYPE_CHECKING`."
        ) from problem
    found, rest = {}, False
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            required = parameter.default is parameter.empty
            found[parameter.name] = Parameter(hints.get(parameter.name, Any), required)
        rest = rest or parameter.kind is parameter.VAR_KEYWORD
    return found, rest


def _argument_hints(function: Any) -> dict[str, Any]:
    function = inspect.unwrap(function)
    written = dict(getattr(function, "__annotations__", {}))
    written.pop("return", None)  # often imported for the type checker alone
    bare = types.SimpleNamespace(__annotations__=written)
    return typing.get_type_hints(bare, getattr(function, "__globals__", {}), include_extras=True)


def plain_hint(annotation: Any) -> Any:
    """Strip what does not change the accepted values: Annotated, NewType, InitVar, type variables."""
    while True:
        if get_origin(annotation) is typing.Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, dataclasses.InitVar):
            annotation = annotation.type
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif annotation is None:
            return type(None)
        elif annotation in (object, inspect.Parameter.empty) or isinstance(annotation, TypeVar):
            return Any
        else:
            return annotation


def slot_of(annotation: Any) -> tuple[str, Any] | None:
    """(kind, class that is asked for) when `annotation` is a kind's base class or derives from one."""
    if not inspect.isclass(annotation):
        return None
    for ancestor in annotation.__mro__:
        kind = registry.kind_of(ancestor)
        if kind is not None:
            return kind, annotation
    return None


def title_of(target: Any) -> str:
    """The registered name of a class or function, or else its own."""
    return registry.name_of(target) or getattr(target, "__qualname__", repr(target))
