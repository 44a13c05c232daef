"""The part of the catalogue for rules that stop early or commit the rest at once, and for the trained filter; see `cases`."""

from __future__ import annotations

import torch

from dllm_toolkit.decoders.base import Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.learn2pd import Filter, LearnedFilter, learn2pd
from dllm_toolkit.decoders.prophet import PhasedMargin, prophet
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AnyOf, AtEos, CutAtEos, StepLimit, WhenFull
from dllm_toolkit.decoders.sched import ScheduledMargin, sched
from dllm_toolkit.testing.case import Case, Knob


def _one_by_one(stop: Stop) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(4), Quota(), stop=stop)


def _whole(stop: Stop) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(None), Quota(), stop=stop)


def toy_filter(block_length: int = 4, bound: float = 0.6) -> Filter:
    """A filter nobody trained: sure of positions whose confidence passes `bound`, surer where the position before is sure too."""
    eye = torch.eye(block_length)
    before = torch.diag(torch.full((block_length - 1,), 0.5), -1)
    first = (20 * eye + 4 * before, torch.full((block_length,), 0.5))
    return Filter((first, (eye, torch.full((block_length,), 3.0 - 20 * bound))), block_length)


# Logit gaps of the toys are 0 .. 10, their means over an answer 1 .. 4.
DECODERS = (
    Case(
        "prophet",
        "decoder",
        prophet,
        {"block_length": 4, "early": 4.0, "middle": 3.0, "late": 2.0},
        knobs={
            "steps": Knob(4),
            "block_length": Knob(2),
            "early": Knob(0.0),
            "middle": Knob(0.0),
            "late": Knob(0.0, {"early": 99.0, "middle": 99.0, "late": 99.0}),
            "region": Knob("last"),
            "positions": Knob(1, {"region": "last"}),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(True),
        },
    ),
    Case("prophet whole", "decoder", prophet, {"early": 3.0, "middle": 2.0, "region": "answer", "stop_at_eos": True, "temperature": 1.0}),
    Case(
        "sched",
        "decoder",
        sched,
        {"high": 4.0, "low": 1.0},
        knobs={
            "steps": Knob(4),
            "block_length": Knob(4),
            "high": Knob(9.0),
            "low": Knob(4.0),
            "shape": Knob("cosine"),
            "rate": Knob(9.0, {"shape": "exponential"}),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(True),
        },
    ),
    Case("sched in blocks", "decoder", sched, {"block_length": 4, "steps": 9, "high": 5.0, "shape": "exponential", "stop_at_eos": True}),
    Case(
        "learn2pd",
        "decoder",
        learn2pd,
        {"filter": toy_filter()},
        knobs={
            "filter": Knob(toy_filter(bound=0.3)),
            "accept": Knob(1.1),
            "steps": Knob(4),
            "cut": Knob("predicted"),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False, {"cut": "never"}),
        },
    ),
    Case(
        "block with a step limit",
        "decoder",
        BlockDecoder,
        {"schedule": SemiAutoregressive(4), "commit": Quota(), "stop": AnyOf((StepLimit(5), AtEos()))},
    ),
    Case("learn2pd cutting", "decoder", learn2pd, {"filter": toy_filter(), "cut": "predicted", "stop_at_eos": False}),
)

COMMITS = (
    Case(
        "learned_filter",
        "commit",
        LearnedFilter,
        {"filter": toy_filter()},
        knobs={"filter": Knob(toy_filter(bound=0.3)), "accept": Knob(1.1), "rule": Knob(Quota(4), {"accept": 1.1})},
    ),
)

STOPS = (
    Case("cut_at_eos", "stop", CutAtEos, knobs={"predicted": Knob(True, place=_whole)}),
    Case("step_limit", "stop", StepLimit, {"steps": 3}, knobs={"steps": Knob(2, place=_whole)}),
    Case("any_of", "stop", AnyOf, {"rules": (AtEos(), CutAtEos())}, knobs={"rules": Knob((WhenFull(),))}),
    Case(
        "phased_margin",
        "stop",
        PhasedMargin,
        {"early": 4.0, "middle": 3.0, "late": 2.0},
        knobs={
            "early": Knob(0.0),
            "middle": Knob(0.0, place=_one_by_one),
            "late": Knob(0.0, {"early": 99.0, "middle": 99.0, "late": 99.0}, _one_by_one),
            "region": Knob("last"),
            "positions": Knob(1, {"region": "last"}, _one_by_one),
            "end_at_eos": Knob(True, place=_one_by_one),
        },
    ),
    Case(
        "scheduled_margin",
        "stop",
        ScheduledMargin,
        {"high": 4.0, "low": 1.0},
        knobs={
            "high": Knob(9.0),
            "low": Knob(4.0, place=_one_by_one),
            "shape": Knob("cosine", place=_one_by_one),
            "rate": Knob(9.0, {"shape": "exponential"}, _one_by_one),
            "end_at_eos": Knob(True, place=_one_by_one),
        },
    ),
)

PARTS = (*COMMITS, *STOPS)
ALL = (*DECODERS, *PARTS)
