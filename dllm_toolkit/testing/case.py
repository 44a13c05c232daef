"""The form of a catalogue entry: `Case` and `Knob`. The entries are in `cases` and its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from dllm_toolkit.decoders.base import Decoder

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Knob:
    """A value of an argument that must change the decode on some toy. given: other arguments that both sides use.

    place: how a part becomes a decoder, where the standard template would hide the argument.
    """

    value: Any
    given: Arguments = field(default_factory=dict)
    place: Callable[[Any], Decoder] | None = None


@dataclass(frozen=True)
class Case:
    """One component as the tests use it.

    maker: the registered class or function. arguments: what it is made with. knobs: for each argument a value that must matter. idle:
    steps beyond one a token that the decoder declares. slow: a decoder that gives the same text with as many forwards or more.
    """

    name: str
    kind: str
    maker: Callable[..., Any]
    arguments: Arguments = field(default_factory=dict)
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    idle: int = 0
    slow: Callable[[], Decoder] | None = None

    def build(self, **changes: Any) -> Any:
        return self.maker(**{**self.arguments, **changes})

    def __str__(self) -> str:
        return self.name


def structure(part: Any) -> Any:
    """What decides which code a component runs through: types, flags and words, not numbers."""
    if is_dataclass(part):
        return (type(part), *((one.name, structure(getattr(part, one.name))) for one in fields(part)))
    return part if isinstance(part, bool | str | None) else bool(part) if isinstance(part, tuple) else type(part)
