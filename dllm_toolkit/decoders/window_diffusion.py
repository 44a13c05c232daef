"""Window-Diffusion: far masks are left out of the input, and only the masks near the frontier are computed in every step.

    u_1 < u_2 < ...                                  the masked positions
    at the start of a phase:
        window <- u_1 .. u_W                         masks behind the window are not in the input at all
        full forward over everything decided and the window
    in the steps of a phase, at most R with that one:
        active <- u_1 .. u_A                         the only positions that may be committed
        compute active and what this phase has committed; everything else is read from its keys at the start of the phase
        commit a share of the answer, best-ranked first
    a new phase begins after R steps, when the active masks are used up, and when an end-of-text is committed:
        what lies behind that token is cut off

What is computed and what is reused is the business of a cache. This schedule tells it by its epoch, the number of the phase, and by its
open span; the dual cache does the rest as published.

Reference: Accelerating diffusion language models with windowed token pruning and caching (repository Window-Diffusion), 2026.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.fast_dllm import FirstOfBlock
from dllm_toolkit.decoders.rules.propose import Sample, Score
from dllm_toolkit.decoders.rules.schedule import blocks_of
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import select
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, Need, Rows, Tokens


@dataclass(frozen=True)
class Phase:
    """State of Window: the block of every position (constant), the number of the phase, and what it began with.

    since: row step of its full forward. start: first masked position. reach: masks from here on are out of the window. limit: masks from
    here on are not active (only where the active ones do not move on). ended: an end-of-text had been committed.
    """

    block: Tokens
    number: Int[Tensor, "B"]
    since: Int[Tensor, "B"]
    start: Int[Tensor, "B"]
    reach: Int[Tensor, "B"]
    limit: Int[Tensor, "B"]
    ended: Rows


def _behind(masked: Canvas, positions: Int[Tensor, "1 L"], count: int | None) -> Int[Tensor, "B"]:
    """One past the `count`-th masked position of each row; where there are no more than that, past the whole canvas."""
    length = masked.shape[1]
    if count is None:
        return torch.full_like(masked[:, 0], length, dtype=torch.long)
    rank = masked.cumsum(1)
    last = torch.where(masked & (rank <= count), positions + 1, 0).amax(1)
    return torch.where(rank[:, -1] > count, last, length)


@register("schedule", "window")
@dataclass(frozen=True)
class Window(Schedule):
    """The first `active` masks may be committed, the first `window` masks are seen, in phases of at most `refresh_every` steps.

    slide: the next mask becomes active as soon as one is committed; otherwise those of the phase's start stay the active ones. truncate:
    what lies behind a committed end-of-text is neither seen nor decoded; a new phase begins when that token comes up. window None: see all.

    Four flags repeat released code. contiguous: all from the phase's first mask to the last active one is computed, decided or not (Dream).
    whole_refresh: a full forward sees and commits anywhere on the canvas, and the window is taken after it (LLaDA). refresh_at_end: every
    step after an end-of-text is a phase of its own (Dream). hold: a step may commit nothing before the last of this many.

    Reference: Window-Diffusion (repository Window-Diffusion).
    """

    needs = frozenset({Need.BIDIRECTIONAL})

    window: int | None = 128
    active: int = 16
    refresh_every: int = 32
    slide: bool = True
    truncate: bool = True
    contiguous: bool = False
    whole_refresh: bool = False
    refresh_at_end: bool = False
    hold: int | None = None

    def __post_init__(self) -> None:
        for name, unit, example in (
            ("window", "masks that are seen", 128),
            ("active", "masks that may be committed", 16),
            ("refresh_every", "steps of a phase", 32),
            ("hold", "steps of an answer", 256),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DecodeError(f"{name} must be 1 or more, got {value}. It counts {unit}. Write {name}: {example}.")
        if self.window is not None and self.window < self.active:
            raise DecodeError(
                f"window must hold the active masks, got window={self.window} and active={self.active}. What may be committed must be "
                f"seen. Write window: {self.active} or more."
            )
        if self.refresh_at_end and not self.truncate:
            raise DecodeError("refresh_at_end goes with truncate, got truncate=False. No text ends early then. Write truncate: true.")

    def max_reads(self, answer_length: int) -> int:
        return answer_length if self.whole_refresh else min(self.active, answer_length)

    def init(self, state: State) -> Phase:
        nothing = torch.zeros_like(state.begin)
        return Phase(blocks_of(state, None), nothing, nothing.clone(), *self._opened(state, state.masked), torch.zeros_like(state.done))

    def _opened(self, state: State, masked: Canvas) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"], Int[Tensor, "B"]]:
        """Start, reach and limit of a phase that begins with these masks."""
        start = torch.where(masked, state.positions, state.masked.shape[1]).amin(1)
        return start, _behind(masked, state.positions, self.window), _behind(masked, state.positions, self.active)

    def _text(self, state: State) -> Canvas:
        """Answer positions up to the first end-of-text, if that ends the text."""
        if not self.truncate:
            return state.inside
        ends = torch.where(state.is_eos(), state.positions, state.masked.shape[1]).amin(1, keepdim=True)
        return state.inside & (state.positions <= ends)

    def region(self, state: State) -> Region:
        own: Phase = state.parts.schedule
        text, step, since = self._text(state), state.step.unsqueeze(1), own.since.unsqueeze(1)
        masked = state.masked & text
        window = state.positions < own.reach.unsqueeze(1)
        near = (masked.cumsum(1) <= self.active) if self.slide else (state.positions < own.limit.unsqueeze(1))
        active = masked & window & near
        if self.whole_refresh:
            active, window = torch.where(step == since, masked, active), window | (step == since)
        force = active if self.hold is None else active & (step + 1 >= self.hold)
        # What the full forward decided is computed once as itself, what came later in every step of the phase.
        recent = (state.born > since) | ((state.born == since) & (step == since + 1))
        span = active | (text & recent & ~state.masked & ~state.fixed)
        if self.contiguous:
            last = torch.where(active, state.positions, -1).amax(1, keepdim=True)
            span = span | (text & (state.positions >= own.start.unsqueeze(1)) & (state.positions <= last) & ~state.fixed)
        seen = (state.positions < state.begin.unsqueeze(1)) | (text & (window | ~state.masked))
        return Region(
            read=active,
            eligible=active,
            group=torch.zeros_like(own.block),
            force=force,
            visible=seen,
            closed=state.positions < state.begin.unsqueeze(1),
            block=own.block,
            epoch=own.number,
            open=span,
        )

    def advance(self, state: State) -> tuple[Phase, Rows]:
        own: Phase = state.parts.schedule
        masked = state.masked & self._text(state)
        taken = state.step + 1 - own.since
        ended = state.is_eos().any(1) if self.truncate else own.ended.clone()
        bound = own.reach if self.slide else torch.minimum(own.reach, own.limit)
        used_up = ~(masked & (state.positions < bound.unsqueeze(1))).any(1)
        if self.whole_refresh:  # this forward saw everything; the window of the phase is taken after it
            used_up = used_up & (taken > 1)
        fresh = (taken >= self.refresh_every) | used_up | (ended if self.refresh_at_end else ended & ~own.ended)
        moved = fresh | (taken == 1) if self.whole_refresh else fresh
        start, reach, limit = self._opened(state, masked)
        after = Phase(
            own.block,
            own.number + fresh.long(),
            torch.where(fresh, state.step + 1, own.since),
            torch.where(moved, start, own.start),
            torch.where(moved, reach, own.reach),
            torch.where(moved, limit, own.limit),
            ended,
        )
        return after, ~masked.any(1)


@register("commit", "paced")
@dataclass(frozen=True)
class Paced(Commit):
    """Commit a share of the whole answer in each step, by the row's own clock: the share does not depend on what is open.

    eps None spreads the m masks of the answer evenly: step t of n commits floor(m / n) + [t < m mod n] (LLaDA). A number is the end of
    Dream's times: of the masks left in the answer the share 1 - s / t of the time step, rounded down, everything at the last. Either takes
    no more than is eligible. steps None is one token a step.

    Reference: Window-Diffusion (repository Window-Diffusion); LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487.
    """

    cite = ("2502.09992", "2508.15487")

    steps: int | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise DecodeError(f"steps must be 1 or more, got {self.steps}. It counts forwards of a whole answer. Write steps: 64.")
        if self.eps is not None and not 0 <= self.eps < 1:
            raise DecodeError(f"eps must be in [0, 1), got {self.eps}. It is the time at which the process ends. Write eps: 0.001.")
        if self.eps is not None and self.steps is None:
            raise DecodeError("eps goes with a number of steps, got steps=None. One token a step needs no times. Write steps: 64.")

    def init(self, state: State) -> Int[Tensor, "B"]:
        return state.masked.sum(1)  # masks of the whole answer at the start

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        answer: Int[Tensor, "B"] = state.parts.commit
        if self.steps is None:
            return select.best(proposal.score, region.eligible)
        if self.eps is None:
            count = answer.div(self.steps, rounding_mode="floor") + (state.step < answer % self.steps).long()
        else:
            width = torch.full_like(answer, self.steps, dtype=torch.float32).reciprocal() * (1 - self.eps)
            now = 1 - width * state.step
            kept = ((now - width) / now).masked_fill(state.step >= self.steps - 1, 0.0)  # s / t
            count = (state.masked.sum(1).float() * (1 - kept)).long()
        return select.top_k(proposal.score, region.eligible, count)


@register("decoder", "window_diffusion")
def window_diffusion(
    window: int | None = 128,
    active: int = 16,
    refresh_every: int = 32,
    steps: int | None = None,
    eps: float | None = None,
    score: Score = "negative_entropy",
    temperature: float = 0.0,
    slide: bool = True,
    stop_at_eos: bool = True,
    first_at_refresh: bool = False,
    contiguous: bool = False,
    whole_refresh: bool = False,
    refresh_at_end: bool = False,
    idle_steps: bool = False,
) -> BlockDecoder:
    """Window-Diffusion (repository Window-Diffusion): see, compute and commit near the frontier only. Its cache is `dual`.

    window, active, refresh_every: masks that are seen, masks that may be committed, steps of a phase; see `Window`. The defaults are those
    for Dream; for LLaDA they are 64, 16, 32 with score "probability". steps, eps: None is one token a step; see `Paced`. stop_at_eos: an
    end-of-text cuts off what is behind it.

    Five flags repeat released code. Dream's: first_at_refresh (a full forward commits the first mask, however sure, and no other),
    contiguous, refresh_at_end. LLaDA's: whole_refresh. See `Window`. idle_steps: a step may commit nothing before the last of `steps`.
    """
    if idle_steps and steps is None:
        raise DecodeError("idle_steps needs a number of steps, got steps=None. Without one there is nothing to hold. Write steps: 64.")
    paced = Paced(steps, eps)
    return BlockDecoder(
        schedule=Window(
            window,
            active,
            refresh_every,
            slide,
            truncate=stop_at_eos,
            contiguous=contiguous,
            whole_refresh=whole_refresh,
            refresh_at_end=refresh_at_end,
            hold=steps if idle_steps else None,
        ),
        commit=FirstOfBlock(paced) if first_at_refresh else paced,
        propose=Sample(temperature=temperature, score=score),
        stop=AtEos() if stop_at_eos else WhenFull(),
    )
