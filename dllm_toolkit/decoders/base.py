"""The plug-in contract: a Decoder is one step; its parts are pure rules on canvases.

Subclass `Decoder` for a new step, or `Schedule`, `Propose`, `Commit`, `Revise`, `Stop` for a new rule of the template step
(`BlockDecoder`). Rules are frozen dataclasses: what must be remembered between steps is a PyTree that the rule returns and gets back
through `state.parts`. They never mutate, never read the host, and use no randomness but the state's stateless noise.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.registry import declare, name_of
from dllm_toolkit.state import Answer, Edit, Proposal, Region, State, Verdict
from dllm_toolkit.types import Canvas, ModelSpec, Need, PyTree, Rows

if TYPE_CHECKING:
    from dllm_toolkit.cache.base import Cache
    from dllm_toolkit.engine import Engine


class DecodeError(ToolkitError):
    """A decode that cannot start: bad prompt, or decoder, cache and model that do not fit each other."""


class Part(abc.ABC):
    """A rule of one slot. `cite` holds the arXiv numbers of the papers it comes from.

    `looks_back`: it wants to know what the model says of positions that are decided. Without such a part the template reads masked
    positions only, which makes the head narrower and lets a cache leave decided positions alone. `random`: it draws from the state's noise
    whatever its arguments, so another seed gives another decode.
    """

    cite: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset()
    looks_back: ClassVar[bool] = False
    random: ClassVar[bool] = False

    def check_model(self, spec: ModelSpec) -> None:  # noqa: B027 - most parts take every model that meets their needs
        """Raise DecodeError if the part's settings make no sense for this model (an id outside its vocabulary)."""

    def init(self, state: State) -> PyTree:
        """The part's own state before the first step; () if it remembers nothing."""
        return ()


class Schedule(Part):
    """Where may we decode now, and where must we make progress?"""

    @abc.abstractmethod
    def max_reads(self, answer_length: int) -> int:
        """The most positions that one step may read in a row; a static bound for compiled decoding."""

    @abc.abstractmethod
    def region(self, state: State) -> Region:
        """The region of the coming step."""

    def refine(self, region: Region, proposal: Proposal, state: State) -> Region:
        """Change the region after seeing the logits (AdaBlock, SlowFast). Default: keep it."""
        return region

    @abc.abstractmethod
    def advance(self, state: State) -> tuple[PyTree, Rows]:
        """After the commits of a step: the schedule's new state, and the rows in which nothing is left to decode."""


class Propose(Part):
    """Which token would each position take, and with what evidence?"""

    @abc.abstractmethod
    def __call__(self, answer: Answer, state: State) -> Proposal: ...

    def carry(self, proposal: Proposal, region: Region, state: State) -> PyTree:
        return state.parts.propose


class Commit(Part):
    """Which masked positions become tokens?"""

    @abc.abstractmethod
    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        """Positions to commit; what is not `region.eligible` is dropped by the loop."""

    def carry(self, proposal: Proposal, region: Region, state: State) -> PyTree:
        """The part's state after this step; called with the same arguments as `select`."""
        return state.parts.commit


class Revise(Part):
    """Which decided positions change their token, or are taken back?"""

    monotone: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True

    @abc.abstractmethod
    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit: ...


class Stop(Part):
    """Is a row finished, and where does its text end?"""

    @abc.abstractmethod
    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict: ...


class Decoder(abc.ABC):
    """One step of a decoding method: ask the model, decide, return the next state."""

    cite: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset()

    def init(self, state: State) -> State:
        """Give the state whatever the method remembers. Called once, before the first step."""
        return state

    @abc.abstractmethod
    def step(self, engine: Engine, state: State) -> State: ...

    def members(self) -> list[Part | Decoder]:
        """This decoder, its parts, and theirs: rules may hold rules."""
        found: list[Part | Decoder] = [self]
        for one in found:
            found += [value for value in vars(one).values() if isinstance(value, Part | Decoder)]
        return found

    def requirements(self) -> frozenset[Need]:
        """Everything this decoder, with its parts, asks of a model."""
        return frozenset().union(*(one.needs for one in self.members()))


for _kind, _base in (
    ("decoder", Decoder),
    ("schedule", Schedule),
    ("propose", Propose),
    ("commit", Commit),
    ("revise", Revise),
    ("stop", Stop),
):
    declare(_kind, _base)


def check(spec: ModelSpec, decoder: Decoder, cache: Cache) -> None:
    """Do the three fit? Raises DecodeError before any weight is used.

    A block-causal cache on a model with full attention, or a mask-filling decoder on an autoregressive model, would run and give
    numbers that mean nothing.
    """
    for member in (*decoder.members(), cache):
        for need in sorted(member.needs, key=lambda item: item.name):
            if not need.met_by(spec):
                what = "cache" if member is cache else "decoder"
                name = name_of(member) or type(member).__name__
                if isinstance(member, Part):
                    name = f"with its part {name}"
                advice = {
                    Need.BLOCK_CAUSAL: "Write cache: none, prefix or dual, or load the model with attention: block_causal.",
                    Need.BIDIRECTIONAL: "Write decoder: autoregressive, or choose a masked diffusion model.",
                    Need.CAUSAL: "Write decoder: vanilla, semi_ar or d2f, or choose an autoregressive model.",
                }[need]
                raise DecodeError(
                    f"the {what} {name} does not fit the model, got attention={spec.attention} shift={spec.shift}. "
                    f"It needs {need.value}. {advice}"
                )
    for member in decoder.members():
        if isinstance(member, Part):
            member.check_model(spec)


def check_ids(spec: ModelSpec, name: str, ids: Iterable[int | str]) -> None:
    """Are these special ids rows of the vocabulary? "eos" stands for the model's own and always is."""
    for one in ids:
        if one != "eos" and not 0 <= int(one) < spec.vocab_size:
            raise DecodeError(
                f"{name} names an id outside the vocabulary, got {one} with {spec.vocab_size} rows. It is compared with token ids. "
                f'Write "eos", or an id below {spec.vocab_size}.'
            )
