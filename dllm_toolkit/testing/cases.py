"""The catalogue: everything that is registered, with arguments that make the toys work, and a live value for every argument.

Explicit on purpose. A method that is in no case is untested, and tests/contract/test_catalogue.py fails; an argument without a knob, or
with a knob that changes nothing on any toy, is dead, and tests/lattice/test_knobs.py fails.
"""

from __future__ import annotations

from functools import partial

from dllm_toolkit.cache import policies
from dllm_toolkit.decoders.autoregressive import NextToken, autoregressive
from dllm_toolkit.decoders.base import Decoder, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.confidence_adaptive import Adaptive, confidence_adaptive
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.dparallel import dparallel
from dllm_toolkit.decoders.dream import Timetable, dream
from dllm_toolkit.decoders.fast_dllm import Allowance, FirstOfBlock, fast_dllm
from dllm_toolkit.decoders.rules.commit import Factor, Gate, Quota, threshold
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive, whole_answer
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.testing import (
    cases_cache,
    cases_commit,
    cases_drafts,
    cases_drivers,
    cases_features,
    cases_revise,
    cases_schedules,
    cases_stops,
)
from dllm_toolkit.testing.case import Case, Knob
from dllm_toolkit.testing.rules import Doubt, Rewrite

SAMPLED = {"temperature": 1.0}
D2F = {"block_length": 4, "threshold": 0.6, "add_at": 0.5, "activate_at": 0.75}
PIPELINED = {"block_length": 4, "add_at": 0.5, "activate_at": 0.75}
_gate_by_margin = partial(BlockDecoder, SemiAutoregressive(4), propose=Sample(score="margin"))


_timed = partial(BlockDecoder, SemiAutoregressive(None))
_drawn = partial(BlockDecoder, SemiAutoregressive(None, hold=6), propose=Sample(score="random"))


def _gate_to_the_end(schedule: Schedule) -> Decoder:
    return BlockDecoder(schedule, Gate(0.6), stop=WhenFull())


def _rewriting(schedule: Schedule) -> Decoder:
    return BlockDecoder(schedule, Gate(0.4), revise=Rewrite())


DECODERS = (
    Case(
        "vanilla",
        "decoder",
        vanilla,
        knobs={
            "steps": Knob(4),
            "block_length": Knob(4),
            "temperature": Knob(1.0),
            "remasking": Knob("random"),
            "suppress": Knob(("eos",)),
            "defer": Knob(("eos",)),
            "idle_steps": Knob(True, {"steps": 40}),
        },
    ),
    Case("vanilla in blocks", "decoder", vanilla, {"steps": 5, "block_length": 4}),
    Case("vanilla sampled", "decoder", vanilla, {"block_length": 4, "remasking": "random", **SAMPLED}),
    Case(
        "vanilla idle",
        "decoder",
        vanilla,
        {"block_length": 4, "steps": 20, "idle_steps": True},
        idle=20,
    ),
    Case("vanilla without end", "decoder", vanilla, {"steps": 6, "suppress": ("eos", 3), "defer": (5, 7)}),
    Case(
        "semi_ar",
        "decoder",
        semi_ar,
        {"block_length": 4},
        knobs={"block_length": Knob(2), "steps": Knob(4), "temperature": Knob(1.0)},
        slow=lambda: vanilla(block_length=4),
    ),
    Case("semi_ar in steps", "decoder", semi_ar, {"block_length": 3, "steps": 5}),
    Case(
        "fast_dllm",
        "decoder",
        fast_dllm,
        {"block_length": 4, "threshold": 0.6},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "factor": Knob(1.5, {"threshold": None}),
            "temperature": Knob(1.0),
            "steps": Knob(8, {"block_length": None}),
            "stop_at_eos": Knob(False),
            "fill_at_eos": Knob(True),
            "official_tail": Knob(True, {"threshold": None, "factor": 1.5}),
            "step_cap": Knob(4),
            "trailing_forward": Knob(True, {"threshold": 0.0}),
            "first_of_block": Knob(True),
        },
        slow=lambda: fast_dllm(4, threshold=0.6, stop_at_eos=False),
    ),
    Case("fast_dllm allowance", "decoder", fast_dllm, {"block_length": None, "threshold": 0.6, "steps": 5, "fill_at_eos": True}),
    Case(
        "fast_dllm first release",
        "decoder",
        fast_dllm,
        {"block_length": 4, "threshold": 0.4, "stop_at_eos": False, "trailing_forward": True, "first_of_block": True},
        idle=3,
    ),
    Case(
        "dream",
        "decoder",
        dream,
        {"steps": 6},
        knobs={
            "steps": Knob(3),
            "algorithm": Knob("maskgit_plus"),
            "eps": Knob(0.5),
            "temperature": Knob(1.0),
            "top_p": Knob(0.5),
            "top_k": Knob(2),
            "order_temperature": Knob(1.0),
            "block_length": Knob(4),
            "idle_steps": Knob(True, {"steps": 12}),
        },
    ),
    Case("dream one by one", "decoder", dream, {"algorithm": "topk_margin", "block_length": 4}),
    Case(
        "dream origin",
        "decoder",
        dream,
        {"steps": 10, "algorithm": "origin", "temperature": 0.7, "top_p": 0.9, "top_k": 9, "idle_steps": True},
        idle=10,
    ),
    Case("dream origin eager", "decoder", dream, {"steps": 5, "algorithm": "origin", "order_temperature": 0.3}),
    Case(
        "dparallel",
        "decoder",
        dparallel,
        {"block_length": 4, "entropy": 1.0},
        knobs={
            "block_length": Knob(2),
            "entropy": Knob(0.1),
            "strict": Knob(True, {"entropy": 0.0}),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False),
            "trailing_forward": Knob(True, {"entropy": 9.0}),
        },
        slow=lambda: dparallel(4, entropy=1.0, stop_at_eos=False),
    ),
    Case("fast_dllm factor", "decoder", fast_dllm, {"block_length": None, "factor": 1.5, "official_tail": True}),
    Case("fast_dllm factor sampled", "decoder", fast_dllm, {"block_length": 4, "factor": 1.0, **SAMPLED}),
    Case(
        "confidence_adaptive",
        "decoder",
        confidence_adaptive,
        {"block_length": 4, "threshold": 0.6},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "minimum": Knob(2),
            "maximum": Knob(1),
            "eos_share": Knob(0.0),
            "late": Knob(tuple(range(13))),
            "max_steps_per_block": Knob(1),
            "score": Knob("negative_entropy", {"threshold": None}),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False),
        },
        slow=lambda: confidence_adaptive(4, threshold=0.6, stop_at_eos=False),
    ),
    Case(
        "confidence_adaptive entropy",
        "decoder",
        confidence_adaptive,
        {"block_length": None, "score": "negative_entropy", "threshold": -1.2, "minimum": 2, "maximum": 3, "max_steps_per_block": 2},
    ),
    Case(
        "d2f",
        "decoder",
        d2f,
        D2F,
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "add_at": Knob(1.0),
            "activate_at": Knob(0.25),
            "fallback": Knob("margin", {"threshold": 0.9}),
            "temperature": Knob(1.0),
            "top_p": Knob(0.5, SAMPLED),
            "top_k": Knob(2, SAMPLED),
            "max_open": Knob(1),
            "official_loop": Knob(True),
        },
    ),
    Case(
        "d2f sampled",
        "decoder",
        d2f,
        {**D2F, **SAMPLED, "top_p": 0.9, "top_k": 5, "max_open": 2, "fallback": "negative_entropy"},
    ),
    Case("d2f official", "decoder", d2f, {**D2F, "official_loop": True}),
    Case("d2f eager", "decoder", d2f, {"block_length": 2, "threshold": 0.3, "add_at": 0.0, "activate_at": 0.0}),
    Case(
        "autoregressive",
        "decoder",
        autoregressive,
        knobs={"temperature": Knob(1.0), "top_p": Knob(0.5, SAMPLED), "top_k": Knob(2, SAMPLED)},
    ),
    Case("autoregressive sampled", "decoder", autoregressive, {**SAMPLED, "top_p": 0.9, "top_k": 8}),
    Case(
        "block",
        "decoder",
        BlockDecoder,
        {"schedule": SemiAutoregressive(4), "commit": Gate(0.5, minimum=1, maximum=2)},
        knobs={
            "schedule": Knob(SemiAutoregressive(2)),
            "commit": Knob(Gate(0.9)),
            "propose": Knob(Sample(score="margin")),
            "revise": Knob(Rewrite()),
            "stop": Knob(WhenFull()),
        },
    ),
    Case(
        "block opening",
        "decoder",
        BlockDecoder,
        {
            "schedule": SemiAutoregressive(4, hold=9),
            "commit": FirstOfBlock(Timetable(9)),
            "stop": AtEos(fill=True, skip_first=True),
        },
        idle=9,
    ),
    Case(
        "block rewriting",
        "decoder",
        BlockDecoder,
        {"schedule": SemiAutoregressive(4), "commit": Gate(0.4), "revise": Rewrite()},
    ),
    Case(
        "block doubting",
        "decoder",
        BlockDecoder,
        {"schedule": SemiAutoregressive(None), "commit": Gate(0.4), "revise": Doubt()},
    ),
    Case(
        "pipeline rewriting",
        "decoder",
        BlockDecoder,
        {"schedule": Pipelined(**PIPELINED), "commit": Gate(0.4), "revise": Rewrite()},
    ),
    *cases_commit.DECODERS,
    *cases_revise.DECODERS,
    *cases_cache.DECODERS,
    *cases_stops.DECODERS,
    *cases_schedules.DECODERS,
    *cases_features.DECODERS,
    *cases_drafts.DECODERS,
)

SCHEDULES = (
    Case(
        "semi_autoregressive",
        "schedule",
        SemiAutoregressive,
        {"block_length": 4},
        knobs={
            "block_length": Knob(2),
            "hold": Knob(40),
            "step_cap": Knob(4),
            "least_steps": Knob(5),
            "reach": Knob("answer", place=_rewriting),
        },
    ),
    Case("whole_answer", "schedule", whole_answer),
    Case(
        "pipelined",
        "schedule",
        Pipelined,
        PIPELINED,
        knobs={
            "block_length": Knob(2),
            "add_at": Knob(1.0),
            "activate_at": Knob(0.25),
            "max_open": Knob(1),
            "finish_opened": Knob(True, {"add_at": 0.0}, _gate_to_the_end),
            "whole_blocks": Knob(True),
            "past_eos": Knob(True, {}, _gate_to_the_end),
        },
    ),
    Case("next_token", "schedule", NextToken),
    *cases_revise.SCHEDULES,
    *cases_cache.SCHEDULES,
    *cases_schedules.SCHEDULES,
)

PROPOSALS = (
    Case(
        "sample",
        "propose",
        Sample,
        knobs={
            "temperature": Knob(1.0),
            "top_k": Knob(2, SAMPLED),
            "top_p": Knob(0.5, SAMPLED),
            "score": Knob("random"),
            "evidence": Knob("filtered", {"temperature": 0.5}),
            "suppress": Knob(("eos", 3)),
            "defer": Knob(("eos", 3)),
            "order_temperature": Knob(1.0),
        },
    ),
    *cases_commit.PROPOSALS,
    *cases_features.PROPOSALS,
)

COMMITS = (
    Case("quota", "commit", Quota, knobs={"steps": Knob(4)}),
    Case(
        "gate",
        "commit",
        Gate,
        {"at_least": 0.6},
        knobs={
            "at_least": Knob(0.9),
            "strict": Knob(True, {"at_least": 1.0}),
            "on": Knob("score", place=_gate_by_margin),
            "minimum": Knob(2),
            "maximum": Knob(1),
        },
    ),
    Case(
        "threshold",
        "commit",
        threshold,
        {"at_least": 0.6},
        knobs={"at_least": Knob(0.9), "strict": Knob(True, {"at_least": 1.0})},
    ),
    Case("factor", "commit", Factor, {"factor": 1.5}, knobs={"factor": Knob(0.5), "official_tail": Knob(True)}),
    Case(
        "adaptive",
        "commit",
        Adaptive,
        {"at_least": 0.6},
        knobs={
            "at_least": Knob(0.9),
            "minimum": Knob(2),
            "maximum": Knob(1),
            "eos_share": Knob(0.0),
            "late": Knob(tuple(range(13))),
            "max_steps": Knob(1),
        },
    ),
    Case(
        "timetable",
        "commit",
        Timetable,
        {"steps": 6},
        knobs={"steps": Knob(3), "eps": Knob(0.5, place=_timed), "draw": Knob(True, place=_drawn)},
    ),
    Case(
        "allowance",
        "commit",
        Allowance,
        {"at_least": 0.6, "steps": 5},
        knobs={"at_least": Knob(0.9, place=_timed), "steps": Knob(2, place=_timed)},
    ),
    Case("first_of_block", "commit", FirstOfBlock, {"then": Gate(0.6)}, knobs={"then": Knob(Gate(0.9))}),
    *cases_commit.COMMITS,
    *cases_revise.COMMITS,
    *cases_cache.COMMITS,
    *cases_stops.COMMITS,
    *cases_schedules.COMMITS,
    *cases_features.COMMITS,
    *cases_drafts.COMMITS,
)

REVISIONS = (Case("keep", "revise", Keep), *cases_revise.REVISIONS, *cases_drafts.REVISIONS)
STOPS = (
    Case(
        "at_eos",
        "stop",
        AtEos,
        knobs={"fill": Knob(True), "skip_first": Knob(True, {"fill": True}), "wait_for": Knob("whole_block")},
    ),
    Case("when_full", "stop", WhenFull),
    *cases_stops.STOPS,
    *cases_drivers.STOPS,
)
CACHES = (
    Case("none", "cache", policies.NoCache),
    Case("prefix", "cache", policies.PrefixCache),
    Case("dual", "cache", policies.DualCache),
    Case("block_causal", "cache", policies.BlockCausalCache),
    *cases_cache.CACHES,
    *cases_schedules.CACHES,
)

PARTS = (*SCHEDULES, *PROPOSALS, *COMMITS, *REVISIONS, *STOPS)
ALL = (*DECODERS, *PARTS, *CACHES)
