"""The catalogue, continued: caches that refresh, wait or keep a window, and the decoder that prunes to one. `cases` holds it all."""

from __future__ import annotations

from functools import partial

from dllm_toolkit.cache import policies
from dllm_toolkit.cache.delayed import DelayedBlocksCache, DelayedCache
from dllm_toolkit.cache.refreshed import RefreshedCache
from dllm_toolkit.cache.window import VicinityCache, WindowCache
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.drawn_order import DrawnOrder, drawn_order
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.window_diffusion import Paced, Window, window_diffusion
from dllm_toolkit.testing.case import Case, Knob

WINDOW = {"window": 5, "active": 3, "refresh_every": 4}
_whole = partial(BlockDecoder, SemiAutoregressive(None))
_one_by_one = partial(BlockDecoder, commit=Quota())
_to_the_end = partial(BlockDecoder, commit=Gate(0.3), stop=WhenFull())

DECODERS = (
    Case(
        "window_diffusion",
        "decoder",
        window_diffusion,
        WINDOW,
        knobs={
            "window": Knob(4),
            "active": Knob(2),
            "refresh_every": Knob(2, {"whole_refresh": True}),
            "steps": Knob(4),
            "eps": Knob(0.3, {"steps": 5}),
            "score": Knob("random"),
            "temperature": Knob(1.0),
            "slide": Knob(False),
            "stop_at_eos": Knob(False),
            "first_at_refresh": Knob(True),
            "contiguous": Knob(True),
            "whole_refresh": Knob(True),
            "refresh_at_end": Knob(True),
            "idle_steps": Knob(True, {"steps": 40, "eps": 0.1}),
        },
    ),
    Case(
        "window_diffusion released",
        "decoder",
        window_diffusion,
        {
            **WINDOW,
            "slide": False,
            "first_at_refresh": True,
            "contiguous": True,
            "refresh_at_end": True,
            "steps": 14,
            "eps": 0.1,
            "idle_steps": True,
        },
        idle=14,
    ),
    Case("window_diffusion whole", "decoder", window_diffusion, {**WINDOW, "whole_refresh": True, "stop_at_eos": False, "steps": 6}),
    Case(
        "drawn_order",
        "decoder",
        drawn_order,
        {"block_length": 6, "window": 2},
        knobs={"block_length": Knob(2), "per_step": Knob(2), "window": Knob(1), "temperature": Knob(1.0)},
    ),
)
SCHEDULES = (
    Case(
        "window",
        "schedule",
        Window,
        WINDOW,
        knobs={
            "window": Knob(4),
            "active": Knob(2, place=_one_by_one),
            "refresh_every": Knob(2, {"whole_refresh": True}),
            "slide": Knob(False, place=_one_by_one),
            "truncate": Knob(False, place=_to_the_end),
            "contiguous": Knob(True, place=_one_by_one),
            "whole_refresh": Knob(True),
            "refresh_at_end": Knob(True, place=_one_by_one),
            "hold": Knob(40),
        },
    ),
    Case(
        "drawn_order",
        "schedule",
        DrawnOrder,
        {"inner": SemiAutoregressive(6), "window": 2},
        knobs={"inner": Knob(SemiAutoregressive(2)), "per_step": Knob(2), "window": Knob(1)},
    ),
)
COMMITS = (
    Case(
        "paced",
        "commit",
        Paced,
        knobs={"steps": Knob(4), "eps": Knob(0.5, {"steps": 6}, _whole)},
    ),
)
CACHES = (
    Case(
        "delayed",
        "cache",
        DelayedCache,
        {"refresh_every": 4},
        knobs={"delay": Knob(2), "refresh_every": Knob(2), "keep": Knob("both")},
    ),
    Case("delayed_blocks", "cache", DelayedBlocksCache, knobs={"delay": Knob(1), "refresh_every": Knob(2)}),
    Case(
        "refreshed",
        "cache",
        RefreshedCache,
        {"inner": policies.DualCache(), "every": 3},
        knobs={"inner": Knob(policies.PrefixCache()), "every": Knob(2), "warm_up": Knob(2)},
    ),
    Case(
        "vicinity",
        "cache",
        VicinityCache,
        {"before": 1, "after": 1, "warm_up": 1},
        knobs={"before": Knob(2), "after": Knob(2), "warm_up": Knob(4), "refresh_every": Knob(2)},
    ),
    Case("window", "cache", WindowCache, {"refresh_every": 3}, knobs={"refresh_every": Knob(2)}),
)
