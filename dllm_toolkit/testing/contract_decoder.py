"""The decoder contract: D0 .. D14, each a function that raises `Violation` with a sentence a researcher can act on.

    D0  a step changes no state that it was given          D7  decided positions stay, closed ones for good
    D1  everything is decided, only fill behind the end    D8  the reported account is the true one
    D2  prompt, pinned tokens and padding never change     D9  chosen <= eligible <= read <= compute <= visible
    D3  same seed, same decode; no other randomness        D10 stopping at end-of-text changes no token before it
    D4  forced groups progress, rows end in time           D13 the state is enough to go on from
    D5  a row does not depend on its neighbours            D14 infilling: pinned tokens inside the answer
    D6  nor on its place in the batch

D11 (one compiled graph) is in tests/compile, D12 (a faster loop gives the same text) in `check_same_text`. Logits are compared, to 1e-10
in float64: equal tokens hide errors that only a sharper model would show.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import decode, engine_of
from dllm_toolkit.decoders.base import Decoder, Part, extra_steps
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.models.base import Model
from dllm_toolkit.state import State
from dllm_toolkit.testing.models import Counting
from dllm_toolkit.testing.record import Batch, Moment, Recording, difference, fold, infill, record, unequal
from dllm_toolkit.types import Canvas, Result


class Violation(AssertionError):
    """A promise that does not hold; the message says which row, step and position."""


@dataclass(frozen=True)
class Bench:
    """A decoder, a cache and a toy that fit each other, with recordings that several checks share.

    shallow: the same toy with one layer, None where one-layer exactness is not promised. idle: steps beyond one a token that the
    decoder declares (LLaDA's idle steps). alone: rows that are also decoded alone; None: all.
    """

    decoder: Decoder
    cache: Cache
    model: Model
    shallow: Model | None = None
    batch: Batch = unequal()
    infill: Batch = infill()
    idle: int = 0
    alone: tuple[int, ...] | None = None

    @cached_property
    def recording(self) -> Recording:
        return record(self.model, self.decoder, self.cache, self.batch)

    @cached_property
    def infilled(self) -> Recording:
        return record(self.model, self.decoder, self.cache, self.infill)

    @cached_property
    def changed(self) -> Recording:
        """The decode again with everything changed that must not matter: order of rows, global generator, seeds where `unseeded`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234567)
            return record(self.model, self.decoder, self.cache, (_reseeded(self.batch) if self.unseeded else self.batch).take(ORDER))

    @property
    def unseeded(self) -> bool:
        """Are seeds to be changed too? A cache never sees them, so without one."""
        return self.greedy and isinstance(self.cache, NoCache)

    @property
    def monotone(self) -> bool:
        """Does the decoder promise never to change a decided position? Only the template can say so."""
        return isinstance(self.decoder, BlockDecoder) and self.decoder.revise.monotone

    @property
    def greedy(self) -> bool:
        """Does nothing random enter? Known for the template with the shipped proposal."""
        if not isinstance(self.decoder, BlockDecoder) or not isinstance(self.decoder.propose, Sample):
            return False
        if any(isinstance(one, Part) and one.noisy for one in self.decoder.members()):
            return False
        propose = self.decoder.propose
        return propose.temperature == 0 and propose.score != "random" and propose.order_temperature == 0


ORDER = (2, 0, 3, 1)


def _reseeded(batch: Batch) -> Batch:
    return replace(batch, seeds=tuple(seed + 1000 for seed in batch.seeds))


def places(canvas: Canvas) -> str:
    """`row 1, positions [3, 4]` for the first row of a canvas that is not empty."""
    row = int(canvas.any(1).nonzero()[0])
    return f"row {row}, positions {canvas[row].nonzero().flatten().tolist()}"


def fail_where(wrong: Canvas, step: int, what: str) -> None:
    """Raise a Violation that names the first offending row if anything is wrong."""
    if bool(wrong.any()):
        raise Violation(f"step {step}, {places(wrong)}: {what}")


def _alive(state: State) -> Canvas:
    return ~state.done.unsqueeze(1)


def _behind(state: State) -> Canvas:
    """What lies behind the end of a finished row, or behind an end-of-text that a stop rule has filled up: not the method's business."""
    return state.filled | (state.done.unsqueeze(1) & (state.positions >= state.end.unsqueeze(1)))


def d0_pure(bench: Bench) -> None:
    """A step changes no state that it was given: new tensors, never in-place writes."""
    for number, moment in enumerate(bench.recording.moments):
        for name in ("tokens", "masked", "born"):
            now, kept = getattr(moment.after, name), getattr(moment.kept, name)
            fail_where(now != kept, number, f"`{name}` of an earlier state was written in place. Use torch.where or masked_fill.")


def _filled(recording: Recording, batch: Batch) -> None:
    state, steps = recording.last, len(recording.moments)
    if not bool(state.done.all()):
        rows = (~state.done).nonzero().flatten().tolist()
        left = state.masked.sum(1)[rows].tolist()
        raise Violation(
            f"rows {rows} did not finish in {steps} steps, {left} positions are still masked. Does the schedule force progress, and does "
            "`advance` say when nothing is left?"
        )
    fail_where(state.masked, steps, "still masked in a finished row.")
    spec = state.spec
    text = state.inside & ~state.fixed
    fail_where(text & (state.tokens == spec.mask_id), steps, "the mask token was committed as text.")
    fail_where(text & (state.born < 0), steps, "inside the text but never committed.")
    for row, template in enumerate(batch.templates):
        begin, end = int(state.begin[row]), int(state.end[row])
        budget = begin + len(template)
        if not begin <= end <= budget:
            raise Violation(f"row {row}: its end is {end}, outside its answer {begin} .. {budget}.")
        behind = torch.zeros_like(state.masked)
        behind[row, end:budget] = True
        filler = spec.eos_ids[0]
        fail_where(behind & ~state.fixed & (state.tokens != filler), steps, "behind the row's end but not end-of-text.")


def d1_filled(bench: Bench) -> None:
    """No mask is left, every text position was committed, and behind the end stands end-of-text."""
    _filled(bench.recording, bench.batch)


def _fixed_kept(recording: Recording) -> None:
    first = recording.first
    for number, moment in enumerate(recording.moments):
        changed = first.fixed & ((moment.after.tokens != first.tokens) | moment.after.masked)
        fail_where(changed, number, "prompt, pinned or padding tokens were changed.")


def d2_fixed(bench: Bench) -> None:
    """Prompt, pinned positions and padding never change."""
    _fixed_kept(bench.recording)


def d3_deterministic(bench: Bench) -> None:
    """Same seed, same decode, whatever the global generator; a greedy decoder ignores the seed too (a cache never sees it)."""
    if _reordered(bench.recording.fingerprint()) == bench.changed.fingerprint() and _moved(bench.recording, bench.changed) is None:
        return  # all at once changed nothing; otherwise see what it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234567)
        again = record(bench.model, bench.decoder, bench.cache, bench.batch)
    _same(again, bench.recording, "the same seeds gave another decode. Use the state's stateless noise (ops.noise), no generator.")
    if bench.unseeded:
        other = record(bench.model, bench.decoder, bench.cache, _reseeded(bench.batch))
        _same(other, bench.recording, "temperature 0 but another seed gave another decode.")


def _reordered(fingerprint: list[Any]) -> list[Any]:
    """A fingerprint as it is if rows come in another order; its last entry is of all rows together."""
    *by_row, together = fingerprint
    return [*([one[row] for row in ORDER] for one in by_row), together]


def _moved(one: Recording, other: Recording) -> str | None:
    """How a decode differs from one whose rows came in another order, in words."""
    found = (difference(one, row, other, place) for place, row in enumerate(ORDER))
    return next((text for text in found if text is not None), None)


def _same(one: Recording, other: Recording, what: str) -> None:
    for row in range(one.first.tokens.shape[0]):
        found = difference(one, row, other, row)
        if found is not None:
            raise Violation(f"{found}: {what}")
    if one.fingerprint() != other.fingerprint():
        raise Violation(f"logits agree but tokens or steps differ: {what}")


def d4_progress(bench: Bench) -> None:
    """Forced groups commit in every step, rules of net progress leave fewer masks, and no row takes more steps than are declared."""
    if not isinstance(bench.decoder, BlockDecoder):
        return
    for number, moment in enumerate(bench.recording.moments):
        if not moment.asks:
            raise Violation(f"step {number}: the decoder did not ask the model. A step is at least one engine.ask.")
        before, after, ask = moment.before, moment.after, moment.asks[-1]
        count = before.tokens.shape[0]
        region = replace(ask.region, **{name: ask.of_first(getattr(ask.region, name), count) for name in ("force", "eligible", "group")})
        open_now = region.force & region.eligible & _alive(before)
        if bench.monotone:
            landed = before.masked & ~after.masked
            rows, length = landed.shape
            moved = torch.zeros(rows, length + 1).scatter_add(1, region.group, landed.float()).gather(1, region.group) > 0
            fail_where(open_now & ~moved, number, "a group that must progress committed nothing.")
        elif bench.decoder.revise.net_progress:
            fewer = after.masked.sum(1) < before.masked.sum(1)
            what = "a row that must progress holds as many masks as before, though the revise rule promises net progress."
            fail_where(open_now & ~fewer.unsqueeze(1), number, what)
    for row, template in enumerate(bench.batch.templates):
        tokens = len(template)
        taken, bound = int(bench.recording.last.step[row]), tokens + bench.idle + extra_steps(bench.decoder, tokens)
        if taken > bound:
            raise Violation(
                f"row {row}: {taken} steps for {tokens} tokens, {bound} at most are declared. Some steps committed nothing, or what they "
                "committed was taken back. A part that needs more steps says how many in `extra_steps`."
            )


def d5_rows_alone(bench: Bench) -> None:
    """The logits and the text of a row are the same alone and in the batch."""
    _rows_alone(bench, bench.recording, bench.batch)


def _rows_alone(bench: Bench, together: Recording, batch: Batch) -> None:
    for row in range(len(batch)) if bench.alone is None else bench.alone:
        alone = record(bench.model, bench.decoder, bench.cache, batch.take([row]))
        found = difference(together, row, alone, 0)
        if found is not None:
            raise Violation(f"{found}, alone versus in a batch of {len(batch)}. Reduce along positions, never along rows.")
        if together.text(row) != alone.text(0):
            raise Violation(f"row {row}: text {together.text(row)} in the batch, {alone.text(0)} alone.")


def d6_permutation(bench: Bench) -> None:
    """The order of rows does not matter."""
    if _moved(bench.recording, bench.changed) is None:
        return
    found = _moved(bench.recording, record(bench.model, bench.decoder, bench.cache, bench.batch.take(ORDER)))
    if found is not None:
        raise Violation(f"{found}, after the rows changed places.")


def _decided_kept(recording: Recording, monotone: bool) -> None:
    closed = torch.zeros_like(recording.first.masked)
    for number, moment in enumerate(recording.moments):
        before, after = moment.before, moment.after
        decided = ~before.masked & ~before.fixed & ~_behind(after)
        changed = decided & ((after.tokens != before.tokens) | after.masked)
        refilled = before.filled & ((after.tokens != before.tokens) | after.masked)
        fail_where(refilled, number, "end-of-text that a stop rule had filled in was changed.")
        if monotone:
            fail_where(changed, number, "a decided token was changed, though the revise rule says it is monotone.")
        may = torch.zeros_like(changed)
        for ask in moment.asks:
            # A branch reads on behalf of its row; what any of them calls closed is closed for good only if that branch went on.
            may = may | fold(ask.region.read & ~ask.region.closed & _alive(ask.state), may.shape[0])
            closed = closed | ask.of_first(ask.region.closed & _alive(ask.state), may.shape[0])
        fail_where(changed & ~may, number, "a decided token was changed where the region does not read, or has closed.")
        written = (before.tokens != after.tokens) & ~_behind(after)
        fail_where(written & closed, number, "the schedule had closed this position, and it was written again.")


def d7_decided(bench: Bench) -> None:
    """Decided positions stay (monotone), or change only where the region reads; what the schedule has closed never changes."""
    _decided_kept(bench.recording, bench.monotone)


def d8_account(bench: Bench) -> None:
    """Reported forwards, lanes, steps and commits are the true ones; `decode` and `trace` agree."""
    batch = bench.batch
    counting = Counting(bench.model, len(batch))
    output = decode(counting, bench.decoder, batch.prompts, templates=batch.templates, cache=bench.cache, seed=batch.seeds, throw=False)
    last, stats = bench.recording.last, output.stats
    if not torch.equal(output.canvas, last.tokens):
        raise Violation("decode() and trace() give different tokens.")
    lived = [sum(not bool(moment.before.done[row]) for moment in bench.recording.moments) for row in range(len(batch))]
    pinned = [sum(token is not None for token in template) for template in batch.templates]
    text = (output.end - output.begin).tolist()
    for what, reported, true in (
        ("nfe", stats.nfe, torch.as_tensor(counting.nfe).tolist()),
        ("lanes", stats.lanes, torch.as_tensor(counting.lanes).tolist()),
        ("steps", stats.steps, last.step.tolist() if bench.decoder.leaps else lived),
        ("commits + pinned", [a + b for a, b in zip(stats.commits, pinned, strict=True)], text),
    ):
        if reported != true:
            raise Violation(f"{what}: {reported} reported for the rows, {true} counted.")


def _chain(recording: Recording) -> None:
    shift = recording.first.spec.shift
    rows = recording.first.tokens.shape[0]
    ever = torch.zeros_like(recording.first.masked)
    for number, moment in enumerate(recording.moments):
        eligible = torch.zeros_like(ever)
        for ask in moment.asks:
            alive, region, computed = _alive(ask.state), ask.region, ask.computed
            branches = ask.state.tokens.shape[0] // rows
            behind = ever.repeat_interleave(branches, 0) | computed
            ever = ever | fold(computed, rows)
            # Masked on the canvas that was asked, or when the step began: a step may ask twice of one region, with tokens tried in it.
            began = moment.before.masked.repeat_interleave(ask.state.masked.shape[0] // rows, 0)
            fail_where(alive & region.eligible & ~ask.state.masked & ~began, number, "eligible but not masked.")
            fail_where(alive & region.eligible & ~region.read, number, "eligible but not read, so it has no proposal.")
            fail_where(alive & region.read & ~ask.read, number, "to be read, but no logits came back.")
            fail_where(computed & ~alive, number, "a finished row was sent through the model.")
            sources = alive & region.read
            if shift:
                sources = torch.cat((sources[:, 1:], torch.zeros_like(sources[:, :1])), dim=1)
                fail_where(sources & ~behind, number, "the source of a read position was never computed.")
            else:
                fail_where(sources & ~computed, number, "read but not computed in this forward. Cache.plan must contain region.read.")
            fail_where(alive & ask.plan.compute & ~ask.plan.visible, number, "the cache computes what it says is not visible.")
            fail_where(alive & ask.plan.visible & ~region.visible, number, "the cache shows what the schedule hides.")
            # A row that a stop rule finishes by committing the rest writes what was read, wherever the schedule is.
            early = (moment.after.result == Result.EARLY_COMMIT) | (moment.after.result == Result.MAX_STEPS)
            eligible = eligible | fold(region.eligible & alive, rows)
            eligible = eligible | (fold(region.read & ask.state.masked & alive, rows) & early.unsqueeze(1))
        chosen = moment.before.masked & ~moment.after.masked & ~_behind(moment.after)
        fail_where(chosen & ~eligible, number, "committed though the region says it is not eligible.")


def d9_chain(bench: Bench) -> None:
    """Chosen positions are eligible, eligible ones are read, read ones are computed, computed ones are visible."""
    _chain(bench.recording)


def d10_end_of_text(bench: Bench) -> None:
    """With AtEos the text up to the first end-of-text is that of the decode without it; a finished row costs nothing."""
    for number, moment in enumerate(bench.recording.moments):
        for ask in moment.asks:
            fail_where(ask.computed & ~_alive(ask.state), number, "a finished row still costs lanes.")
    last = bench.recording.last
    for row in range(len(bench.batch)):
        text = bench.recording.text(row)
        if int(last.result[row]) == Result.END_OF_TEXT and (not text or text[-1] not in last.spec.eos_ids):
            raise Violation(f"row {row}: ended by end-of-text, but {text} does not end with one. Was a mask left before it?")
    decoder = bench.decoder
    if not isinstance(decoder, BlockDecoder) or not isinstance(decoder.stop, AtEos) or not bench.monotone:
        return
    if decoder.stop.fill:  # the model then sees where the text ends, and may say something else before it
        return
    free = record(bench.model, replace(decoder, stop=WhenFull()), bench.cache, bench.batch)
    for row in range(len(bench.batch)):
        text, longer = bench.recording.text(row), free.text(row)
        if longer[: len(text)] != text:
            raise Violation(f"row {row}: {text} with the stop rule, {longer} without it.")
        if int(bench.recording.last.result[row]) != Result.END_OF_TEXT and int(free.last.step[row]) != int(bench.recording.last.step[row]):
            raise Violation(f"row {row}: the stop rule changed the number of steps of a row that it did not stop.")


def d13_resume(bench: Bench) -> None:
    """The state is enough: a copy of it goes on in a new engine, without cache, to the same end. Asked once, of decodes without cache."""
    if not isinstance(bench.cache, NoCache):
        return
    plain = bench.recording
    moment: Moment = plain.moments[len(plain.moments) // 2]
    state = copy.deepcopy(moment.before)
    engine = engine_of(bench.model, bench.decoder, NoCache(), state, state.tokens.shape[1])
    with torch.inference_mode():
        for _ in plain.moments:
            after = bench.decoder.step(engine, state)
            if engine.finished(after):
                break
            state = after
    for name in ("tokens", "born", "step", "end"):
        if not torch.equal(getattr(state, name), getattr(plain.last, name)):
            raise Violation(
                f"`{name}` differs after resuming from step {len(plain.moments) // 2}. Something is remembered outside the state: keep it "
                "in state.parts."
            )


def d14_infill(bench: Bench) -> None:
    """Pinned tokens inside the answer: D1, D2, D5, D7 and D9 hold on an infill canvas."""
    _filled(bench.infilled, bench.infill)
    _fixed_kept(bench.infilled)
    _decided_kept(bench.infilled, bench.monotone)
    _chain(bench.infilled)
    _rows_alone(bench, bench.infilled, bench.infill)


DECODER_CHECKS = (
    d0_pure,
    d1_filled,
    d2_fixed,
    d3_deterministic,
    d4_progress,
    d5_rows_alone,
    d6_permutation,
    d7_decided,
    d8_account,
    d9_chain,
    d10_end_of_text,
    d13_resume,
    d14_infill,
)


def check_same_text(fast: Bench, slow: Bench) -> None:
    """D12: the text of `fast`, up to its end, is that of `slow`, and no row needs more forwards."""
    for row in range(len(fast.batch)):
        mine, theirs = fast.recording.text(row), slow.recording.text(row)
        if theirs[: len(mine)] != mine:
            raise Violation(f"row {row}: text {mine}, the slower loop gives {theirs}.")
        used, bound = len(fast.recording.asks_of(row)), len(slow.recording.asks_of(row))
        if used > bound:
            raise Violation(f"row {row}: {used} forwards, the slower loop needs {bound}.")
