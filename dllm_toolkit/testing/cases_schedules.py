"""The part of the catalogue for methods that differ in where they decode; see `cases`."""

from __future__ import annotations

from functools import partial

from dllm_toolkit.cache.nested import NestedCache
from dllm_toolkit.decoders.ada_block import Delimited, ada_block
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.block_diffusion import ThresholdOrQuota, block_diffusion
from dllm_toolkit.decoders.d3llm import d3llm
from dllm_toolkit.decoders.explore_then_exploit import CrossBlock, Explore, explore_then_exploit
from dllm_toolkit.decoders.fast_dllm_v2 import Nested, fast_dllm_v2
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.scheduler import NoiseSchedule, scheduler
from dllm_toolkit.decoders.slow_fast import Cycles, slow_fast
from dllm_toolkit.testing.case import Case, Knob

DELIMITERS = tuple(range(0, 29, 3))
OFTEN = {"delimiters": DELIMITERS, "block_length": 4, "window": 0.8, "certainty": 0.2}
SAMPLED = {"temperature": 1.0}
_whole = partial(BlockDecoder, SemiAutoregressive(None))


DECODERS = (
    Case(
        "d3llm",
        "decoder",
        d3llm,
        {"block_length": 4, "entropy": 1.0, "add_at": 0.25},
        knobs={
            "block_length": Knob(2),
            "entropy": Knob(0.2),
            "add_at": Knob(1.0),
            "minimum": Knob(2),
            "strict": Knob(True, {"entropy": 0.0}),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False),
        },
    ),
    Case(
        "ada_block",
        "decoder",
        ada_block,
        {**OFTEN, "threshold": 0.6},
        knobs={
            "delimiters": Knob((1, "eos")),
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "certainty": Knob(1.1),
            "window": Knob(0.3),
            "temperature": Knob(1.0),
        },
    ),
    Case(
        "slow_fast",
        "decoder",
        slow_fast,
        {"threshold": 0.6, "explore_steps": 3, "trust": 0.5},
        knobs={
            "block_length": Knob(3),
            "threshold": Knob(0.9),
            "explore_steps": Knob(2, {"spread": 0.0}),
            "trust": Knob(0.9),
            "spread": Knob(9.0),
            "memory": Knob(1),
            "temperature": Knob(1.0),
        },
    ),
    Case("slow_fast in blocks", "decoder", slow_fast, {"block_length": 4, "threshold": 0.8, "trust": 0.6, "explore_steps": 2, **SAMPLED}),
    Case(
        "explore_then_exploit",
        "decoder",
        explore_then_exploit,
        {"block_length": 3, "threshold": 0.7, "at_least": 0.2},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.95),
            "ahead": Knob(0),
            "explore": Knob(2),
            "at_least": Knob(0.6),
            "enough": Knob(3),
            "order": Knob("uncertain"),
            "temperature": Knob(1.0),
        },
    ),
    Case(
        "fast_dllm_v2",
        "decoder",
        fast_dllm_v2,
        {"block_length": 4, "part_length": 2, "threshold": 0.6},
        knobs={
            "block_length": Knob(3),
            "part_length": Knob(1),
            "threshold": Knob(0.9),
            "temperature": Knob(1.0),
            "top_p": Knob(0.5, SAMPLED),
        },
    ),
    Case(
        "block_diffusion",
        "decoder",
        block_diffusion,
        {"block_length": 4, "threshold": 0.6, "steps": 6},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(1.1),
            "steps": Knob(3),
            "strict": Knob(False, {"threshold": 1.0, "steps": None}),
            "temperature": Knob(1.0),
            "top_p": Knob(0.5, SAMPLED),
            "top_k": Knob(2, SAMPLED),
        },
    ),
    Case(
        "scheduler",
        "decoder",
        scheduler,
        {"steps": 6, "noise": "cosine"},
        knobs={
            "steps": Knob(3),
            "noise": Knob("linear"),
            "draw": Knob(True),
            "block_length": Knob(4),
            "temperature": Knob(1.0),
            "suppress": Knob((3, "eos")),
            "stop_at_eos": Knob(False, {"noise": "linear"}),
        },
        slow=lambda: scheduler(6, "cosine", stop_at_eos=False),
    ),
    Case("scheduler drawn", "decoder", scheduler, {"steps": 5, "draw": True, "block_length": 4}),
)

SCHEDULES = (
    Case(
        "delimited",
        "schedule",
        Delimited,
        OFTEN,
        knobs={"delimiters": Knob((1, "eos")), "block_length": Knob(2), "window": Knob(0.3), "certainty": Knob(1.1)},
    ),
    Case(
        "cycles",
        "schedule",
        Cycles,
        {"explore_steps": 3, "trust": 0.5},
        knobs={
            "block_length": Knob(3),
            "explore_steps": Knob(2, {"spread": 0.0}),
            "trust": Knob(0.9),
            "spread": Knob(9.0),
            "memory": Knob(1),
        },
    ),
    Case("cross_block", "schedule", CrossBlock, {"block_length": 4}, knobs={"block_length": Knob(2), "ahead": Knob(0)}),
    Case("nested", "schedule", Nested, {"block_length": 4, "part_length": 2}, knobs={"block_length": Knob(3), "part_length": Knob(1)}),
    Case("staged blocks", "schedule", SemiAutoregressive, {"block_length": (2, 3)}),
)

COMMITS = (
    Case(
        "explore",
        "commit",
        Explore,
        {"threshold": 0.7, "at_least": 0.2},
        knobs={
            "threshold": Knob(0.95),
            "count": Knob(2),
            "at_least": Knob(0.6),
            "enough": Knob(3),
            "order": Knob("uncertain"),
        },
    ),
    Case(
        "threshold_or_quota",
        "commit",
        ThresholdOrQuota,
        {"at_least": 0.6, "steps": 6},
        knobs={"at_least": Knob(1.1), "steps": Knob(3), "strict": Knob(True, {"at_least": 1.0, "steps": None})},
    ),
    Case(
        "noise_schedule",
        "commit",
        NoiseSchedule,
        {"steps": 6, "noise": "cosine"},
        knobs={"steps": Knob(3), "noise": Knob("linear", place=_whole), "draw": Knob(True, place=_whole)},
    ),
)

CACHES = (
    Case("nested", "cache", NestedCache),
)
