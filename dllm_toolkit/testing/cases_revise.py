"""The part of the catalogue for the methods that look back; see `cases`."""

from __future__ import annotations

from dataclasses import replace

from dllm_toolkit.decoders.base import Revise, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.hierarchy import Hierarchy, TakeBackDoubtful, hierarchy
from dllm_toolkit.decoders.remdm_loop import LookingBack, TakeBackLeast, remdm_loop
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.saber import AboveMean, TakeBackFallen, saber
from dllm_toolkit.decoders.token_editing import EditTokens, llada21
from dllm_toolkit.testing.case import Case, Knob

SAMPLED = {"temperature": 1.0}
EDITED = {"block_length": 4, "threshold": 0.4, "edit_threshold": 0.2, "max_post_steps": 3}
REMASKED = {"action": "remask", "limit": 2}
REOPENED = {"block_length": 5, "low": 0.3, "high": 0.7, "remask_below": 0.5}
LOOPED = {"at": 0.5, "loops": 3}


def _eager(revise: Revise) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(4), Gate(0.2), revise=revise)


def _looking(schedule: Schedule) -> BlockDecoder:
    return BlockDecoder(schedule, Quota(), revise=TakeBackLeast())


def _looped(revise: Revise) -> BlockDecoder:
    return BlockDecoder(LookingBack(**LOOPED), Quota(), revise=revise)


def _endless(decoder: BlockDecoder) -> BlockDecoder:
    return replace(decoder, stop=WhenFull())


def _gaps(revise: Revise) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(None), Hierarchy(0.3, 0.7), revise=revise)


DECODERS = (
    Case(
        "llada21",
        "decoder",
        llada21,
        EDITED,
        knobs={
            "mode": Knob("speed", {"threshold": None, "edit_threshold": None}),
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "edit_threshold": Knob(0.9),
            "max_post_steps": Knob(0),
            "minimum": Knob(2),
            "action": Knob("remask", {"limit": 2}),
            "suspect": Knob("improbable", REMASKED),
            "limit": Knob(0),
            "no_return": Knob(True),
            "reach": Knob("answer"),
            "temperature": Knob(1.0),
        },
        slow=lambda: _endless(llada21(**EDITED)),
    ),
    Case("llada21 remasking", "decoder", llada21, {**EDITED, **REMASKED, "suspect": "improbable"}),
    Case("llada21 multi-block", "decoder", llada21, {**EDITED, "reach": "answer", "no_return": True, **SAMPLED}),
    Case("llada21 multi-block remasking", "decoder", llada21, {**EDITED, **REMASKED, "reach": "answer"}),
    Case(
        "saber",
        "decoder",
        saber,
        {"block_length": 5},
        knobs={"block_length": Knob(None), "minimum": Knob(4), "one_in": Knob(1), "temperature": Knob(1.0)},
        slow=lambda: _endless(saber(5)),
    ),
    Case(
        "hierarchy remasking",
        "decoder",
        hierarchy,
        REOPENED,
        slow=lambda: _endless(hierarchy(**REOPENED)),
    ),
    Case(
        "remdm_loop",
        "decoder",
        remdm_loop,
        LOOPED,
        knobs={"steps": Knob(4), "at": Knob(0.9), "loops": Knob(1), "count": Knob(2), "temperature": Knob(1.0)},
        slow=lambda: _endless(remdm_loop(**LOOPED)),
    ),
)


SCHEDULES = (
    Case(
        "looking_back",
        "schedule",
        LookingBack,
        LOOPED,
        knobs={
            "schedule": Knob(SemiAutoregressive(4), place=_looking),
            "at": Knob(0.9, place=_looking),
            "loops": Knob(1, place=_looking),
        },
    ),
)

COMMITS = (Case("above_mean", "commit", AboveMean, knobs={"minimum": Knob(1)}),)

REVISIONS = (
    Case(
        "edit_tokens",
        "revise",
        EditTokens,
        {"threshold": 0.2, "max_post_steps": 3},
        knobs={
            "threshold": Knob(0.9, place=_eager),
            "max_post_steps": Knob(0, place=_eager),
            "action": Knob("remask", {"limit": 2}, _eager),
            "suspect": Knob("improbable", REMASKED, _eager),
            "limit": Knob(0, place=_eager),
            "no_return": Knob(True, place=_eager),
        },
    ),
    Case("take_back_fallen", "revise", TakeBackFallen, knobs={"least": Knob(3, place=_gaps), "one_in": Knob(1, place=_gaps)}),
    Case("take_back_doubtful", "revise", TakeBackDoubtful, knobs={"below": Knob(0.8, place=_gaps)}),
    Case("take_back_least", "revise", TakeBackLeast, knobs={"count": Knob(2, place=_looped)}),
)

PARTS = (*SCHEDULES, *COMMITS, *REVISIONS)
