"""The wrapper contract: W1 .. W5, for models around models. The decoder contract runs on a wrapped model besides (all but D13, see below).

    W1  with neutral arguments it is the model itself: every logit of every forward
    W2  the first forward of a decode is the model's own: nothing is remembered yet
    W3  what it remembers of other slots than a row has used cannot matter; what it remembers of used ones does
    W4  the reported number of computed query tokens is the true one, and something is saved
    W5  a decode leaves nothing behind: the next one is the same

An inexact wrapper answers from memory, so D13 (a decode goes on from its state alone) does not hold for it: the state has no memory of
features, as it has none of the keys of an approximate cache. W2 and the second half of W3 are asked of inexact wrappers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.decode import decode
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.wrapper import Wrapper, core
from dllm_toolkit.testing.cases_features import Wrapping
from dllm_toolkit.testing.contract_cache import POISON, TOLERANCE
from dllm_toolkit.testing.contract_decoder import DECODER_CHECKS, Bench, Violation, d13_resume
from dllm_toolkit.testing.record import Recording, difference, gaps, record


def decoder_checks(case: Wrapping) -> tuple[Callable[[Bench], None], ...]:
    """The checks of the decoder contract that a wrapped model keeps."""
    return tuple(check for check in DECODER_CHECKS if check is not d13_resume) if case.inexact else DECODER_CHECKS


def _again(bench: Bench, model: Model) -> Recording:
    return record(model, bench.decoder, bench.cache, bench.batch)


def _same(bench: Bench, one: Recording, other: Recording, why: str) -> None:
    for row in range(len(bench.batch)):
        found = difference(one, row, other, row)
        if found is not None:
            raise Violation(f"{found}. {why}")


def w1_neutral(case: Wrapping, model: Model, bench: Bench) -> None:
    """With neutral arguments the wrapped model is the model itself."""
    for batch in (bench.batch, bench.infill):
        plain = record(model, bench.decoder, bench.cache, batch)
        neutral = record(case.around(model, **case.neutral), bench.decoder, bench.cache, batch)
        for row in range(len(batch)):
            found = difference(neutral, row, plain, row)
            if found is not None:
                raise Violation(f"{found}, though {dict(case.neutral)} should leave the model as it is.")


def w2_first_forward(case: Wrapping, model: Model, bench: Bench) -> None:
    """The first forward of a decode is the model's own, later ones are not: otherwise the toy shows nothing."""
    if not case.inexact:
        return
    plain, mine = _again(bench, model), bench.recording
    if float(gaps(mine.asks[0].logits, plain.asks[0].logits).max()) > TOLERANCE:
        raise Violation("the first forward already differs from the model's. What did it remember?")
    if all(difference(mine, row, plain, row) is None for row in range(len(bench.batch))):
        raise Violation("every forward is the model's own: this decode does not test the wrapper.")


def _remembered(kv: KVBuffer) -> Iterator[Tensor]:
    """Everything of floating point that a wrapper remembers slot by slot, as [B, S, ...] views."""
    for notes in kv.notes.values():
        for value in notes.buffers():
            if value.is_floating_point():
                rows = value.shape[0] if value.shape[1] == kv.slots else value.shape[1]
                yield value if value.shape[:2] == (rows, kv.slots) else value.transpose(0, 1).transpose(1, 2)
    if kv.hidden is not None:
        yield kv.hidden


class _Poisoner:
    """Before each forward, huge numbers into what is remembered of slots that earlier ones used, or of slots not used up to this one."""

    def __init__(self, used: bool) -> None:
        self.used = used
        self.seen: Tensor | None = None

    def __call__(self, query: Query, kv: KVBuffer) -> Callable[[], None]:
        assert query.slots is not None
        before = torch.zeros(query.slots.shape[0], kv.slots, dtype=torch.bool) if self.seen is None else self.seen
        seen = before.scatter(1, query.slots, True)
        seen[:, -1] = False  # dead lanes
        self.seen = seen
        where = before if self.used else ~seen
        places = [(value, where.repeat(value.shape[0] // where.shape[0], 1)) for value in _remembered(kv)]
        kept = [value[there].clone() for value, there in places]
        for value, there in places:
            value[there] = POISON

        def undo() -> None:  # what is empty now may be used later, and empty is a memory too
            for (value, there), old in zip(places, kept, strict=True):
                if not self.used:
                    value[there] = old

        return undo


def w3_poison(case: Wrapping, model: Model, bench: Bench) -> None:
    """Memory of slots that a row never used does not matter; memory of used ones does."""
    unused = record(bench.model, bench.decoder, bench.cache, bench.batch, tamper=_Poisoner(used=False))
    _same(bench, bench.recording, unused, "Memory of slots was poisoned that the row had never used.")
    if not case.inexact:
        return
    used = record(bench.model, bench.decoder, bench.cache, bench.batch, tamper=_Poisoner(used=True))
    if all(difference(bench.recording, row, used, row) is None for row in range(len(bench.batch))):
        raise Violation("everything that is remembered was poisoned, and nothing happened: nothing is reused.")


def w4_account(case: Wrapping, model: Model, bench: Bench) -> None:
    """Row by row alone, so that there are no dead lanes: query tokens counted at the layers are those reported, and fewer than asked."""
    transformer = core(bench.model)
    saved = False
    for row in range(len(bench.batch)):
        batch, counted = bench.batch.take([row]), [0]

        def count(module: object, given: tuple[Tensor, ...], answer: Tensor, counted: list[int] = counted) -> None:
            counted[0] += answer.shape[0] * answer.shape[1]

        hooks = [layer.q_proj.register_forward_hook(count) for layer in transformer.layers]  # type: ignore[union-attr,operator]
        try:
            stats = decode(bench.model, bench.decoder, batch.prompts, templates=batch.templates, cache=bench.cache, seed=batch.seeds).stats
        finally:
            for hook in hooks:
                hook.remove()
        copies = bench.model.buffer(1, 2).rows  # guidance runs every row twice and counts it once
        true = counted[0] / len(transformer.layers) / copies
        if abs(stats.computed[0] - true) > 1e-4 * max(true, 1):
            raise Violation(f"row {row}: {stats.computed[0]} query tokens reported as computed, {true} counted at the layers.")
        if stats.computed[0] > stats.lanes[0] + 1e-4:
            raise Violation(f"row {row}: {stats.computed[0]} query tokens computed, only {stats.lanes[0]} asked for.")
        saved = saved or stats.computed[0] < stats.lanes[0] - 0.5
    if saved != case.saves:
        raise Violation(f"query tokens saved: {saved}, though the case says saves={case.saves}.")


def w5_nothing_stays(case: Wrapping, model: Model, bench: Bench) -> None:
    """The same decode again, on the same wrapper, after another one."""
    record(bench.model, bench.decoder, bench.cache, bench.infill)
    _same(bench, bench.recording, _again(bench, bench.model), "The wrapper remembers a decode that is over: keep memory in KVBuffer.notes.")


WRAPPER_CHECKS = (w1_neutral, w2_first_forward, w3_poison, w4_account, w5_nothing_stays)


def check_wrapper(case: Wrapping, model: Model, bench: Bench) -> list[str]:
    """Every failed check of one wrapper around `model` (`bench.model` is the wrapped one), in words."""
    assert isinstance(bench.model, Wrapper)
    failed = []
    for check in decoder_checks(case):
        try:
            check(bench)
        except Violation as problem:
            failed.append(f"{check.__name__}: {problem}")
    for check in WRAPPER_CHECKS:
        try:
            check(case, model, bench)
        except Violation as problem:
            failed.append(f"{check.__name__}: {problem}")
    return failed
