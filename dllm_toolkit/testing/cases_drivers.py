"""The part of the catalogue for drivers, and for the stop rule that staged programs bring along; see `cases`.

Drivers are compared by what a whole generation returns, so their knobs are turned in tests/contract/test_drivers.py.
"""

from __future__ import annotations

from dllm_toolkit.cache.policies import BlockCausalCache, DualCache
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.rules.sequence import AtSequence
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.drivers.base import Denoise
from dllm_toolkit.drivers.external_verify import ExternalVerify
from dllm_toolkit.drivers.staged import Stage, Staged
from dllm_toolkit.testing.case import Case, Knob

_COARSE = Stage(semi_ar(2), max_new_tokens=3, append=(5,))
_WINDOW = {"draft_canvas": "window"}
_IN_STEPS = {"draft": fast_dllm(4, threshold=0.6)}

DRIVERS = (
    Case("denoise", "driver", Denoise),
    Case(
        "deer",
        "driver",
        ExternalVerify,
        {"drafter": "toy", "draft_length": 4},
        knobs={
            "drafter": Knob("other toy"),
            "draft_length": Knob(2),
            "draft": Knob(semi_ar(4)),
            "draft_steps": Knob(3, _IN_STEPS),
            "draft_canvas": Knob("window"),
            "separator": Knob(7, _WINDOW),
            "draft_cache": Knob(DualCache(), _IN_STEPS),
        },
    ),
    Case("deer in steps", "driver", ExternalVerify, {"drafter": "toy", "draft_steps": 2, "draft_cache": DualCache(), **_IN_STEPS}),
    Case(
        "staged",
        "driver",
        Staged,
        {"stages": (_COARSE, Stage())},
        knobs={"stages": Knob((Stage(),))},
    ),
    Case("staged by tag", "driver", Staged, {"stages": (Stage(until=(5,), append=(6, 7)), Stage(semi_ar(1), cache=BlockCausalCache()))}),
)
STOPS = (
    Case("at_sequence", "stop", AtSequence, {"ids": (12, 12), "inner": AtEos()}, knobs={"ids": Knob((1, 1)), "inner": Knob(WhenFull())}),
)
