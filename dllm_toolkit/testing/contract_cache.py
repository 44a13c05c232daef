"""The cache contract: C1 .. C5. A cache is right if keys that it reuses are the keys that would be computed anew.

    C1  one layer: K/V depends on (token, position) only, so every correct cache gives the logits of NoCache, with every decoder.
        This separates wrong bookkeeping from honest approximation.
    C2  a cache that says `exact` gives them on two layers too.
    C3  a forward that computes everything visible gives them, whatever happened before.
    C4  poison: what is neither visible nor written cannot matter; what is reused does matter.
    C5  everything read is computed; something is saved.

Comparison is forward by forward: the state and region that the engine saw are asked again in a new engine without cache. Poison is a
huge finite number, since NaN times a weight of exactly 0 is still NaN in any dense softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.engine import Engine
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.testing.contract_decoder import Bench, Violation, fail_where
from dllm_toolkit.testing.record import Ask, Recording, difference, gaps, record

TOLERANCE = 1e-10
POISON = 1e4


def fresh_logits(model: Model, ask: Ask) -> Tensor:
    """Logits on the canvas [B, L, V] for the same state and region, computed anew without any cache."""
    engine = Engine(model, NoCache(), ask.state)
    with torch.inference_mode():
        answer = engine.ask(ask.state, ask.region)
    rows, length = ask.state.tokens.shape
    canvas = torch.zeros(rows, length + 1, answer.logits.shape[-1], dtype=answer.logits.dtype)
    where = answer.positions.unsqueeze(-1).expand_as(answer.logits)
    return canvas.scatter(1, where, answer.logits)[:, :length]


def _compare(recording: Recording, model: Model, promised: Callable[[Ask], Tensor], why: str) -> None:
    for number, moment in enumerate(recording.moments):
        for ask in moment.asks:
            rows = promised(ask) & ~ask.state.done
            if not bool(rows.any()):
                continue
            apart = gaps(ask.logits, fresh_logits(model, ask)) > TOLERANCE
            fail_where(apart & rows.unsqueeze(1) & ask.read, number, why)


def _everyone(ask: Ask) -> Tensor:
    return torch.ones_like(ask.state.done)


def _unfilled(ask: Ask) -> Tensor:
    """Rows in which no stop rule has filled what is behind an end-of-text. What it fills may keep the keys of its masks, as the masks
    behind a block keep theirs in the dual cache."""
    return ~ask.state.filled.any(1)


def _refreshed(ask: Ask) -> Tensor:
    """Rows in which this forward computed everything that the schedule shows."""
    return ~(ask.region.visible & ~ask.computed).any(1)


def c1_one_layer(bench: Bench) -> None:
    """On one layer the logits are those of NoCache: every key in use belongs to the token that stands there now."""
    if bench.shallow is None or isinstance(bench.cache, NoCache):
        return
    for batch in (bench.batch, bench.infill):
        _compare(
            record(bench.shallow, bench.decoder, bench.cache, batch),
            bench.shallow,
            _unfilled,
            "a reused key belongs to another token than the canvas holds: recompute where `dirty`, or keep only what is `closed`.",
        )


def c2_exact(bench: Bench) -> None:
    """A cache that says it is exact gives the logits of NoCache on two layers, on an infill canvas too."""
    if not bench.cache.exact or isinstance(bench.cache, NoCache):
        return
    for recording in (bench.recording, bench.infilled):
        _compare(
            recording,
            bench.model,
            _everyone,
            "the cache says exact = True but logits differ from no cache: a stored key saw a token that has changed since.",
        )


def c3_refresh(bench: Bench) -> None:
    """A forward that computes everything visible gives the logits of NoCache."""
    if bench.cache.exact:
        return
    _compare(bench.recording, bench.model, _refreshed, "everything visible was computed, and still logits differ from no cache.")


def _seen(query: Query, kv: KVBuffer) -> tuple[Tensor, Tensor]:
    """Slots that some live lane looks at or that are read, and slots written now; both [B, S]."""
    assert query.allow is not None and query.slots is not None and query.read is not None
    live = query.slots < kv.slots - 1
    seen = (query.allow & live.unsqueeze(2)).any(1)
    written = torch.zeros_like(seen).scatter(1, query.slots, True)
    return seen, written


def _poison(kv: KVBuffer, where: Tensor, hidden: Tensor) -> Callable[[], None]:
    """Put huge numbers into some slots; the returned function puts back what was there."""
    copies = kv.rows // where.shape[0]  # guidance keeps each row twice
    where, hidden = where.repeat(copies, 1), hidden.repeat(copies, 1)
    saved = (kv.keys.clone(), kv.values.clone(), None if kv.hidden is None else kv.hidden.clone())
    kv.keys[:, where] = POISON
    kv.values[:, where] = POISON
    if kv.hidden is not None:
        kv.hidden[hidden] = POISON

    def undo() -> None:
        kv.keys[:, where] = saved[0][:, where]
        kv.values[:, where] = saved[1][:, where]
        if kv.hidden is not None and saved[2] is not None:
            kv.hidden[hidden] = saved[2][hidden]

    return undo


def _poison_unseen(query: Query, kv: KVBuffer) -> Callable[[], None]:
    seen, written = _seen(query, kv)
    assert query.read is not None
    read = torch.zeros_like(seen).scatter(1, query.read, True)
    return _poison(kv, ~seen & ~written, ~read & ~written)


def _poison_reused(query: Query, kv: KVBuffer) -> Callable[[], None]:
    seen, written = _seen(query, kv)
    # With a shift a row may read nothing but the remembered hidden state of a reused slot.
    return _poison(kv, seen & ~written, seen & ~written)


def c4_poison(bench: Bench) -> None:
    """What nobody may see does not matter; what is reused does."""
    clean = bench.recording
    unseen = record(bench.model, bench.decoder, bench.cache, bench.batch, tamper=_poison_unseen)
    for row in range(len(bench.batch)):
        found = difference(clean, row, unseen, row)
        if found is not None:
            raise Violation(f"{found}, after poisoning slots that no lane may see.")
    rows = len(bench.batch)
    first = {row: _first_reuse(bench, row) for row in range(rows)}
    last = max((moment for moment, _ in filter(None, first.values())), default=None)
    if last is None:  # nothing is reused
        return
    reused = record(bench.model, bench.decoder, bench.cache, bench.batch, tamper=_poison_reused, max_steps=last + 1)
    for row, place in first.items():
        if place is None:
            continue
        a, b = clean.asks_of(row)[place[1]], reused.asks_of(row)[place[1]]
        at = a.first(row, rows)
        if float(gaps(a.logits[at], b.logits[at]).max()) <= TOLERANCE:
            raise Violation(f"row {row}, forward {place[1]}: keys that should be reused are poisoned, and nothing happened.")


def _first_reuse(bench: Bench, row: int) -> tuple[int, int] | None:
    """The step, and the row's forward, in which a row first reads something that depends on keys computed before."""
    rows, number = len(bench.batch), 0
    for step, moment in enumerate(bench.recording.moments):
        for ask in moment.asks:
            at = ask.first(row, rows)
            if bool(ask.state.done[at]):
                continue
            visible = ask.plan.visible[at] & ~ask.computed[at] & _reaches(bench, ask, at)
            if bool(visible.any()) and bool(ask.read[at].any()):
                return step, number
            number += 1
    return None


def _reaches(bench: Bench, ask: Ask, at: int) -> Bool[Tensor, "L"]:
    """Slots that a lane from which logits are read may see: with shift 1 the first of a block is read from the block before."""
    spec, read = bench.model.spec, ask.read[at]
    order = ask.region.block[at] if spec.attention == "block_causal" else torch.arange(read.shape[0])
    if spec.attention == "full" or not bool(read.any()):
        return torch.ones_like(read)
    sources = torch.cat((read[1:], torch.zeros_like(read[:1]))) if spec.shift else read
    return order <= order[sources].max()


def c5_saving(bench: Bench) -> None:
    """Everything read is computed, nothing is computed that is not visible, and something is saved while the open span rests."""
    computed = visible = 0
    rested = False
    epoch: Tensor | None = None
    for number, moment in enumerate(bench.recording.moments):
        for ask in moment.asks:
            alive = ~ask.state.done.unsqueeze(1)
            if bench.model.spec.shift == 0:
                fail_where(alive & ask.region.read & ~ask.plan.compute, number, "read but not in Plan.compute.")
            computed += int(ask.computed.sum())
            visible += int((ask.region.visible & alive).sum())
            if epoch is not None:
                rested = rested or bool(((ask.region.epoch == epoch) & ~ask.state.done).any())
            epoch = ask.region.epoch
    if rested and not isinstance(bench.cache, NoCache) and computed >= visible:
        raise Violation(f"{computed} lanes computed, no fewer than without a cache ({visible}). Nothing is ever reused.")


CACHE_CHECKS = (c1_one_layer, c2_exact, c3_refresh, c4_poison, c5_saving)
