"""The plug-in contract: a Decoder is one step; its parts are pure rules on canvases.

Subclass `Decoder` for a new step, or `Schedule`, `Propose`, `Commit`, `Revise`, `Stop` for a new rule of the template step
(`BlockDecoder`). Rules are frozen dataclasses: what must be remembered between steps is a PyTree that the rule returns and gets back
through `state.parts`. They never mutate, never read the host, and use no randomness but the state's stateless noise.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

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
    positions only, which makes the head narrower and lets a cache leave decided positions alone.
    """

    cite: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset()
    looks_back: ClassVar[bool] = False

    @property
    def noisy(self) -> bool:
        """Does it draw from the state's noise at these settings, so that another seed is another decode? Proposals say so themselves."""
        return False

    def check_model(self, spec: ModelSpec) -> None:  # noqa: B027 - most parts take every model that meets their needs
        """Raise DecodeError if the part's settings make no sense for this model (an id outside its vocabulary)."""

    def check_decoder(self, decoder: Decoder, spec: ModelSpec) -> None:  # noqa: B027 - most parts go with every other
        """Raise DecodeError if the part does not go with the others of `decoder` on this model (a filter for other blocks)."""

    def init(self, state: State) -> PyTree:
        """The part's own state before the first step; () if it remembers nothing."""
        return ()

    def extra_steps(self, answer_length: int) -> int:
        """The most steps beyond one a token that this part may cost a row; a static bound for the default step limit."""
        return 0


class Schedule(Part):
    """Where may we decode now, and where must we make progress?"""

    @abc.abstractmethod
    def max_reads(self, answer_length: int) -> int:
        """The most positions that one step may read in a row; a static bound for compiled decoding."""

    @abc.abstractmethod
    def region(self, state: State) -> Region:
        """The region of the coming step."""

    def refine(self, region: Region, proposal: Proposal, state: State) -> Region:
        """Narrow the region after seeing the logits (AdaBlock). Default: keep it."""
        return region

    def carry(self, proposal: Proposal, region: Region, state: State) -> PyTree:
        """What the schedule has learnt from the logits, given the refined region; `advance` finds it in the state after the commits."""
        return state.parts.schedule

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
    """Which decided positions change their token, or are taken back?

    `monotone`: decided positions stay. What a rule names outside of `region.changeable` is dropped by the loop.
    """

    monotone: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True

    @property
    def net_progress(self) -> bool:
        """Does every step that must commit leave fewer masks than it found?"""
        return self.monotone

    def extra_steps(self, answer_length: int) -> int:
        return 0 if self.monotone else 3 * answer_length + 17

    def reopen(self, proposal: Proposal, region: Region, state: State) -> Canvas | None:
        """Decided positions that count as masked when this step selects; None (the default) if the rule has no such phase.

        They are taken back before `Commit.select` and are eligible for it, with this forward's proposals. The loop honours them only in
        rows where a mask is eligible too, and then commits at least one position more than it took back.
        """
        return None

    def shadows(self, region: Region, state: State) -> Canvas | None:
        """Positions to be asked anew in the coming forward, the token that stands there hidden; None (the default) asks for nothing.

        What the model says is `Proposal.shadow`. A rule that wants this needs `Need.UNSHIFTED`; each position costs one more lane.
        """
        return None

    @abc.abstractmethod
    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        """Changes to what is decided after this step's commits: `before` is what the model saw, `after` holds the commits."""


class Stop(Part):
    """Is a row finished, and where does its text end?

    wants_answer: the rule looks at every masked position of the answer that attention may see, not only at what the schedule reads. A
    step then reads them all, so a cache computes them all.
    """

    wants_answer: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict: ...


class Decoder(abc.ABC):
    """One step of a decoding method: ask the model, decide, return the next state.

    `leaps`: one step may stand for several steps of the process that it reproduces, without their forwards. Such a decoder takes only
    caches that do not mind (`Cache.exact` or `Cache.path_free`).
    """

    cite: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset()
    leaps: ClassVar[bool] = False

    @property
    def branches(self) -> int:
        """How many canvases of a row one forward looks at (see engine.py)."""
        return 1

    @property
    def branch_form(self) -> Literal["rows", "lanes"]:
        """Where the keys and values of branches stand: a row of the buffer each, or scratch slots of one row."""
        return "rows"

    def init(self, state: State) -> State:
        """Give the state whatever the method remembers. Called once, before the first step."""
        return state

    @abc.abstractmethod
    def step(self, engine: Engine, state: State) -> State: ...

    def max_reads(self, answer_length: int) -> int | None:
        """The most positions that one step may read in a row, a static bound for compiled decoding; None: the whole canvas."""
        return None

    def members(self) -> list[Part | Decoder]:
        """This decoder, its parts, and theirs: rules may hold rules, alone or in a tuple."""
        found: list[Part | Decoder] = [self]
        for one in found:
            for value in vars(one).values():
                held = value if isinstance(value, tuple) else (value,)
                found += [item for item in held if isinstance(item, Part | Decoder)]
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
                    Need.UNSHIFTED: "Choose a decoder that does not ask what stands at a decided position, or a model with shift 0.",
                }[need]
                raise DecodeError(
                    f"the {what} {name} does not fit the model, got attention={spec.attention} shift={spec.shift}. "
                    f"It needs {need.value}. {advice}"
                )
    if any(member.leaps for member in decoder.members() if isinstance(member, Decoder)) and not (cache.exact or cache.path_free):
        raise DecodeError(
            f"the cache {name_of(cache) or type(cache).__name__} does not fit a decoder that skips forwards, got "
            f"{name_of(decoder) or type(decoder).__name__}. What the cache keeps depends on every forward, so the text would be another "
            "one. Write cache: none, prefix, dual, or block_causal."
        )
    for member in decoder.members():
        if isinstance(member, Part):
            member.check_model(spec)
            member.check_decoder(decoder, spec)


def extra_steps(decoder: Decoder, answer_length: int) -> int:
    """The most steps beyond one a token that a decoder's parts declare for an answer of this length."""
    return sum(one.extra_steps(answer_length) for one in decoder.members() if isinstance(one, Part))


def check_ids(spec: ModelSpec, name: str, ids: Iterable[int | str]) -> None:
    """Are these special ids rows of the vocabulary? "eos" stands for the model's own and always is."""
    for one in ids:
        if one != "eos" and not 0 <= int(one) < spec.vocab_size:
            raise DecodeError(
                f"{name} names an id outside the vocabulary, got {one} with {spec.vocab_size} rows. It is compared with token ids. "
                f'Write "eos", or an id below {spec.vocab_size}.'
            )
