"""The part of the catalogue for methods that look at hypothetical canvases, or ask a decided position anew; see `cases`."""

from __future__ import annotations

from functools import partial

from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.freedave import SelfDraft, freedave
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.wino import NarrowOut, WideIn, wino
from dllm_toolkit.testing.case import Case, Knob

_whole = partial(BlockDecoder, SemiAutoregressive(None))
_revised = partial(BlockDecoder, SemiAutoregressive(4), WideIn(0.3, least=2))

DECODERS = (
    Case(
        "freedave",
        "decoder",
        freedave,
        {"block_length": 4, "drafts": 3},
        knobs={
            "block_length": Knob(2),
            "drafts": Knob(2),
            "threshold": Knob(0.5),
            "form": Knob("batch"),
            "match": Knob("subset", {"block_length": None, "threshold": 0.5}),
            "eager": Knob(True),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False),
        },
        slow=lambda: semi_ar(4),
    ),
    Case(
        "self_draft",
        "decoder",
        SelfDraft,
        {"inner": fast_dllm(4, threshold=0.5), "drafts": 3, "form": "batch", "eager": True},
        knobs={
            "inner": Knob(semi_ar(4)),
            "drafts": Knob(2),
            "form": Knob("tree"),
            "match": Knob("subset", {"inner": fast_dllm(None, threshold=0.5)}),
            "eager": Knob(False),
            "official_loop": Knob(True, {"eager": False}),
        },
        slow=lambda: fast_dllm(4, threshold=0.5),
    ),
    Case(
        "wino",
        "decoder",
        wino,
        {"block_length": 8, "wide": 0.3, "least": 2},
        knobs={
            "block_length": Knob(4),
            "wide": Knob(0.9),
            "narrow": Knob(0.3),
            "share": Knob(0.1),
            "least": Knob(1),
            "most": Knob(2),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False),
        },
    ),
)

COMMITS = (
    Case(
        "wide_in",
        "commit",
        WideIn,
        {"at_least": 0.3, "least": 2},
        knobs={
            "at_least": Knob(0.9),
            "share": Knob(0.1, place=_whole),
            "least": Knob(1),
            "most": Knob(2, place=_whole),
        },
    ),
)

REVISIONS = (
    Case("narrow_out", "revise", NarrowOut, knobs={"at_least": Knob(0.3, place=lambda rule: _revised(revise=rule))}),
)

