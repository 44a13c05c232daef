"""The cache contract: two masks a step.

A cache never touches keys or values. It says which positions to run through the model now (`compute`) and which keys they may attend to
(`visible`); keys that are visible but not computed are still in their slots from an earlier forward. `dirty` marks slots whose K/V came
from another token than the canvas holds now: exact first-order staleness.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.registry import declare
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, Need, PyTree


class CacheError(ToolkitError):
    """A cache whose settings make no sense."""


def check_count(name: str, value: int | None, least: int, unit: str, example: str) -> None:
    """Raise CacheError unless `value` is None or at least `least`."""
    if value is not None and value < least:
        raise CacheError(f"{name} must be {least} or more, got {value}. It counts {unit}. Write {name}: {example}.")


@dataclass(frozen=True)
class Plan:
    """compute: positions run through the model now. visible: keys they may attend to (the model's own rule applies on top)."""

    compute: Canvas
    visible: Canvas


class Cache(abc.ABC):
    """Which K/V may be reused?

    `exact`: the logits equal those of NoCache on every model the cache accepts. `path_free`: within an epoch the keys in use follow from
    the canvas of its first forward and the present one, whatever forwards lay between; a decoder that skips some ends with the same keys.
    Not so for a cache that counts forwards, or remembers when a token was written. `needs`: what it asks of the model.
    `state` is always the one that the forward sees. K/V may be kept for good only where `region.closed`: anywhere else a token may still
    change, or an earlier one may that this K/V depends on.
    """

    cite: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
    path_free: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    def init(self, state: State) -> PyTree:
        """The cache's own state before the first step."""
        return ()

    @abc.abstractmethod
    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan: ...

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        """The cache's state after the forward that followed `plan`."""
        return own

    def accept(self, where: Canvas, own: PyTree) -> PyTree:
        """The cache's state when positions of the last forward turned out to be final, and all before them are.

        A driver that verifies drafts knows only after the forward what is closed. Keeping nothing is always right.
        """
        return own


def sources(wanted: Canvas, state: State) -> Canvas:
    """Positions whose hidden rows the wanted ones are read from, and these themselves: with shift 1 also the one before each."""
    if state.spec.shift == 0:
        return wanted
    return wanted | torch.cat((wanted[:, 1:], torch.zeros_like(wanted[:, :1])), dim=1)


declare("cache", Cache)
