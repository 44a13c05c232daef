"""Errors in a recipe: where it is (file, line, YAML path), what is wrong, and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm_toolkit.errors import ToolkitError

OVERRIDE = "<override>"


@dataclass(frozen=True)
class Mark:
    """Where a key or a value was written: a file and its 1-based line, or the text of an override."""

    file: str = ""
    line: int | None = None
    text: str = ""

    @property
    def overridden(self) -> bool:
        return self.file == OVERRIDE

    def __str__(self) -> str:
        if self.overridden:
            return f"{self.file} {self.text}"
        return self.file if self.line is None else f"{self.file}:{self.line}"


class RecipeError(ToolkitError):
    """One thing wrong with a recipe. `write` is the line to write instead, where there is one to give."""

    def __init__(self, mark: Mark, path: str, message: str, write: str | None = None) -> None:
        self.mark, self.path, self.message, self.write = mark, path, message, write
        places = [place for place in (str(mark), path) if place]
        text = ": ".join([*places, message])
        super().__init__(text if write is None else f"{text}  write: `{write}`")

    @property
    def file(self) -> str:
        return self.mark.file

    @property
    def line(self) -> int | None:
        return self.mark.line


class RecipeErrors(RecipeError):
    """Everything wrong with a recipe, one error a line; its own place is that of the first."""

    def __init__(self, errors: Sequence[RecipeError]) -> None:
        first = errors[0]
        super().__init__(first.mark, first.path, first.message, first.write)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


def file_error(path: Path, message: str) -> RecipeError:
    """An error of a whole file."""
    return RecipeError(Mark(str(path)), "", message)
