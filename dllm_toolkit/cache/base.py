"""The cache contract: two masks a step.

A cache never touches keys or values. It says which positions to run through the model now (`compute`) and which keys they may attend to
(`visible`); keys that are visible but not computed are still in their slots from an earlier forward. `dirty` marks slots whose K/V came
from another token than the canvas holds now: exact first-order staleness.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from dllm_toolkit.registry import declare
from dllm_toolkit.state import Region, State
from dllm_toolkit.types import Canvas, Need, PyTree


@dataclass(frozen=True)
class Plan:
    """compute: positions run through the model now. visible: keys they may attend to (the model's own rule applies on top)."""

    compute: Canvas
    visible: Canvas


class Cache(abc.ABC):
    """Which K/V may be reused?

    `exact`: the logits equal those of NoCache on every model the cache accepts. `needs`: what it asks of the model.
    `state` is always the one that the forward sees. K/V may be kept for good only where `region.closed`: anywhere else a token may still
    change, or an earlier one may that this K/V depends on.
    """

    cite: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = False
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


declare("cache", Cache)
