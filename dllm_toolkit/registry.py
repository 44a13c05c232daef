"""One table of names for everything that a recipe can plug in.

A *kind* is a slot (`decoder`, `commit`, `cache`, ...) with a base class. Modules name their classes and
preset functions with `@register("decoder", "d2f")`; a researcher's own file needs no name, its dotted path
(`my_rule.LookTwice`) works wherever a short name does.

A dotted path comes out of a recipe, which may come from a stranger. `lookup` therefore returns only a
concrete subclass of the kind's base class, or a function that was registered under that kind. The standard
library, private names and anything that cannot be found are refused before anything is imported, and nothing
is ever called here.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dllm_toolkit.errors import ToolkitError

Entry = TypeVar("Entry", bound=Callable[..., Any])

_DECODING = ("dllm_toolkit.decoders",)
_TRAINING = ("dllm_toolkit.training",)
# Where the classes of each kind live. The kinds of `training` need lightning, which is optional.
_HOMES: dict[str, tuple[str, ...]] = {
    "model": ("dllm_toolkit.models",),
    "decoder": _DECODING,
    "schedule": _DECODING,
    "propose": _DECODING,
    "commit": _DECODING,
    "revise": _DECODING,
    "stop": _DECODING,
    "filter": _DECODING,
    "cache": ("dllm_toolkit.cache",),
    "driver": ("dllm_toolkit.drivers",),
    "task": ("dllm_toolkit.evaluation.tasks",),
    "objective": _TRAINING,
    "corruptor": _TRAINING,
    "data": ("dllm_toolkit.data", *_TRAINING),
    "callback": _TRAINING,
    "optimizer": _TRAINING,
    "lr_schedule": _TRAINING,
    "estimator": _TRAINING,
    "policy": _TRAINING,
}

_bases: dict[str, Any] = {}
_table: dict[str, dict[str, Any]] = {}
_loaded: set[str] = set()


class UnknownName(ToolkitError):
    """A name that the registry does not know, or does not allow in this slot; see `suggestions`."""

    def __init__(self, message: str, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.suggestions = suggestions


def declare(kind: str, base: Any) -> None:
    """Open a kind: `base` is the class (or Protocol) that annotates its slots. A kind has one base."""
    present = _bases.get(kind)
    if present is not None and _identity(present) != _identity(base):
        raise ToolkitError(
            f"kind {kind!r} is declared twice, with {present.__name__} and {base.__name__}. "
            "A kind has one base class. Choose another name for the kind."
        )
    other = kind_of(base)
    if other not in (None, kind):
        raise ToolkitError(f"{base.__name__} is already the base class of kind {other!r}; kind {kind!r} needs its own.")
    _bases[kind] = base
    _table.setdefault(kind, {})


def register(kind: str, name: str) -> Callable[[Entry], Entry]:
    """Give a class or a preset function a short name; the decorated object is returned unchanged."""
    if not name or "." in name:
        raise ToolkitError(f"a short name is one word without dots, got {name!r}. Dots mark an import path.")

    def add(entry: Entry) -> Entry:
        if kind not in _bases:
            raise ToolkitError(
                f"unknown kind {kind!r} for {name!r}; known: {', '.join(_bases)}. "
                f"Write registry.declare({kind!r}, Base) before the first register."
            )
        as_class: Any = entry  # narrowing `entry` itself would lose its type for the return
        if inspect.isclass(as_class) and not _is_protocol(kind) and not _fits(as_class, kind):
            raise ToolkitError(
                f"{as_class.__name__} cannot be registered as a {kind}: "
                f"it is no subclass of {_bases[kind].__name__}. Derive it from {_bases[kind].__name__}."
            )
        present = _table[kind].get(name)
        if present is not None and _identity(present) != _identity(entry):
            raise ToolkitError(
                f"{kind} {name!r} is registered twice, by {'.'.join(_identity(present))} and "
                f"{'.'.join(_identity(entry))}. Choose another name."
            )
        _table[kind][name] = entry
        return entry

    return add


def lookup(kind: str, name: str) -> Any:
    """The class or function called `name` in `kind`: a registered short name or a dotted path.

    Raises `UnknownName` for a name that does not exist and for one that may not be used here.
    """
    _load(kind)
    if kind not in _bases:
        if kind in _HOMES:
            raise UnknownName(f"cannot find {name!r}: a {kind} needs lightning. Write: pip install lightning.")
        raise UnknownName(f"unknown kind {kind!r}; known: {', '.join(kinds())}.", _close(kind, kinds()))
    if "." in name:
        return _resolve(kind, name)
    if name in _table[kind]:
        return _table[kind][name]
    close = _close(name, names(kind))
    question = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    known = ", ".join(names(kind)) or "none"
    raise UnknownName(f"cannot find {name!r}{question} Known ({kind}): {known}; or a dotted path.", close)


def base_of(kind: str) -> Any:
    """The base class of a kind."""
    _load(kind)
    return _bases[kind]


def kind_of(base: Any) -> str | None:
    """The kind whose slots are annotated with `base`; None when `base` is the base class of no kind."""
    return next((kind for kind, known in _bases.items() if known is base), None)


def name_of(thing: Any) -> str | None:
    """The short name of a registered class or function, or of an instance of a registered class."""
    for candidate in (thing, type(thing)):
        for entries in _table.values():
            for name, entry in entries.items():
                if entry is candidate:
                    return name
    return None


def names(kind: str) -> list[str]:
    """All short names of a kind, sorted."""
    _load(kind)
    return sorted(_table.get(kind, {}))


def kinds() -> list[str]:
    """All kinds: the ones the package has a place for, then those declared by others."""
    return [*_HOMES, *(kind for kind in _bases if kind not in _HOMES)]


def load_all() -> None:
    """Import every module of the package that registers something (training only if lightning is there)."""
    for kind in _HOMES:
        _load(kind)


@contextlib.contextmanager
def local_files() -> Iterator[None]:
    """Let imports in the block see the current directory: a researcher's file needs no installation."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # an imported module may have rebuilt sys.path
            sys.path.remove(here)


def _load(kind: str) -> None:
    for home in _HOMES.get(kind, ()):
        if home in _loaded:
            continue
        if home in _TRAINING and importlib.util.find_spec("lightning") is None:
            continue
        package = importlib.import_module(home)
        for module in pkgutil.walk_packages(getattr(package, "__path__", ()), home + "."):
            importlib.import_module(module.name)
        _loaded.add(home)


def _resolve(kind: str, dotted: str) -> Any:
    parts = dotted.split(".")
    if any(part.startswith("_") or not part.isidentifier() for part in parts):
        raise UnknownName(f"{dotted!r} is refused: a dotted path is public names, `package.module.Name`.")
    top, module_name, attribute = parts[0], ".".join(parts[:-1]), parts[-1]
    if top in sys.stdlib_module_names:
        raise UnknownName(f"{dotted!r} is refused: the standard library holds no {kind}. {_usable(kind)}")
    # What a module prints while it is imported is no result of ours: stdout ends in one line of JSON.
    with local_files(), contextlib.redirect_stdout(sys.stderr):
        try:
            module = _import(top, module_name)
        except (Exception, SystemExit) as problem:  # a user's module may raise anything while it is imported
            raise UnknownName(f"cannot import {module_name!r} for {dotted!r}: {type(problem).__name__}: {problem}.") from problem
        found = getattr(module, attribute, None) if module is not None else None
    if module is None:
        raise UnknownName(
            f"cannot find the module {module_name!r} of {dotted!r}. Modules are looked for in the current "
            f"directory ({os.getcwd()}) and among the installed packages. {_usable(kind)}"
        )
    if found is None:
        classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
        fitting = [name for name, value in classes.items() if _fits(value, kind)]
        close = tuple(f"{module_name}.{name}" for name in _close(attribute, fitting))
        question = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise UnknownName(f"cannot find {dotted!r}: {module_name} has no {attribute!r}{question}", close)
    if any(found is entry for entry in _table[kind].values()):
        return found
    if not inspect.isclass(found) or not _fits(found, kind):
        raise UnknownName(f"{dotted!r} is refused: it is not a {kind}. {_usable(kind)}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise UnknownName(f"{dotted!r} is abstract: it does not define {missing}. Name a subclass that does.")
    return found


def _import(top: str, name: str) -> Any:
    """Import module `name`, or None when it does not exist (its parents are imported to find out)."""
    if importlib.util.find_spec(top) is None:
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is not None and (name == problem.name or name.startswith(problem.name + ".")):
            return None
        raise


def _usable(kind: str) -> str:
    return (
        f"A {kind} is a subclass of {_bases[kind].__name__}, a function registered as a {kind}, "
        f"or one of: {', '.join(names(kind)) or 'none yet'}."
    )


def _fits(entry: type, kind: str) -> bool:
    # By inheritance alone: ABC.register and __subclasshook__ would let a class claim what it is not.
    return _bases[kind] in entry.__mro__


def _is_protocol(kind: str) -> bool:
    return bool(getattr(_bases[kind], "_is_protocol", False))


def _identity(entry: Any) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))


def _close(name: str, known: list[str]) -> tuple[str, ...]:
    folded = {candidate.lower(): candidate for candidate in known}
    return tuple(folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6))
