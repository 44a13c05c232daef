"""The part of the catalogue for the published commit rules that have a file of their own; see `cases`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dllm_toolkit.decoders.ascending_steps import Ascending, ascending_steps
from dllm_toolkit.decoders.bacd import BoundedAdaptive, bacd
from dllm_toolkit.decoders.base import Propose
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.credit import Credit, credit
from dllm_toolkit.decoders.entropy_bounded import EntropyBudget, entropy_bounded
from dllm_toolkit.decoders.eoser import RejectEarly, eoser
from dllm_toolkit.decoders.hierarchy import Hierarchy, hierarchy
from dllm_toolkit.decoders.klass import Stable, klass
from dllm_toolkit.decoders.local_leap import LocalLeap, local_leap
from dllm_toolkit.decoders.pc_sampler import PositionAndCorpus, pc_sampler
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.testing.case import Case, Knob

COUNTS = str(Path(__file__).with_name("toy_counts.json"))
SAMPLED = {"temperature": 1.0}
WHOLE = SemiAutoregressive(None)
_whole = partial(BlockDecoder, WHOLE)


def _by_quota(propose: Propose) -> BlockDecoder:
    return BlockDecoder(WHOLE, Quota(), propose=propose)


# The toys have 29 tokens: entropies of 0 .. 3 nats, probabilities of 0.2 .. 1, divergences of 0 .. 5 nats between steps.
DECODERS = (
    Case(
        "entropy_bounded",
        "decoder",
        entropy_bounded,
        {"block_length": 4, "budget": 1.0},
        knobs={"block_length": Knob(2), "budget": Knob(0.1), "order": Knob("margin"), "temperature": Knob(1.0)},
    ),
    Case("entropy_bounded whole", "decoder", entropy_bounded, {"block_length": None, "budget": 2.0, "order": "probability", **SAMPLED}),
    Case(
        "local_leap",
        "decoder",
        local_leap,
        {"block_length": 4, "anchor": 0.7, "relaxed": 0.4, "distance": 1},
        knobs={
            "block_length": Knob(2),
            "anchor": Knob(0.9),
            "relaxed": Knob(0.6),
            "distance": Knob(3),
            "temperature": Knob(1.0),
        },
    ),
    Case("local_leap whole", "decoder", local_leap, {"block_length": None, "anchor": 0.6, "relaxed": 0.3, "distance": 2}),
    Case(
        "klass",
        "decoder",
        klass,
        {"block_length": 4, "threshold": 0.5, "divergence": 1.0, "history": 1},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.8),
            "divergence": Knob(0.05),
            "history": Knob(2),
            "steps": Knob(4),
            "temperature": Knob(1.0),
        },
    ),
    Case("klass whole", "decoder", klass, {"block_length": None, "threshold": 0.4, "divergence": 0.5, "history": 2, "steps": 6}),
    Case(
        "pc_sampler",
        "decoder",
        pc_sampler,
        {"counts": COUNTS},
        knobs={
            "block_length": Knob(4),
            "steps": Knob(4),
            "decay": Knob(0.0),
            "cap": Knob(0.5),
            "counts": Knob(None),
            "temperature": Knob(1.0),
        },
    ),
    Case("pc_sampler in blocks", "decoder", pc_sampler, {"block_length": 4, "steps": 6, "decay": 0.1, **SAMPLED}),
    Case(
        "bacd",
        "decoder",
        bacd,
        {"block_length": 4, "low": 0.4, "high": 0.8},
        knobs={"block_length": Knob(2), "low": Knob(0.7), "high": Knob(0.5), "temperature": Knob(1.0)},
    ),
    Case("bacd sampled", "decoder", bacd, {"block_length": None, "low": 0.2, "high": 0.9, **SAMPLED}),
    Case(
        "ascending_steps",
        "decoder",
        ascending_steps,
        knobs={"block_length": Knob(4), "stages": Knob(2), "temperature": Knob(1.0), "stop_at_eos": Knob(False)},
        slow=lambda: ascending_steps(stop_at_eos=False),
    ),
    Case("ascending_steps in blocks", "decoder", ascending_steps, {"block_length": 5, "stages": 3}),
    Case(
        "eoser",
        "decoder",
        eoser,
        knobs={
            "steps": Knob(4),
            "block_length": Knob(4),
            "low": Knob(0.0),
            "high": Knob(0.4),
            "ascending": Knob(True),
            "stages": Knob(2, {"ascending": True}),
            "late": Knob(tuple(range(13))),
            "temperature": Knob(1.0),
            "stop_at_eos": Knob(False),
        },
        slow=lambda: eoser(stop_at_eos=False),
    ),
    Case("eoser ascending", "decoder", eoser, {"ascending": True, "stages": 2, "low": 0.05}),
    Case("eoser in blocks", "decoder", eoser, {"block_length": 4, "steps": 20, "low": 0.1, "late": ("eos", 3)}),
    Case(
        "hierarchy",
        "decoder",
        hierarchy,
        {"block_length": 4, "low": 0.3, "high": 0.7},
        knobs={"block_length": Knob(2), "low": Knob(0.6), "high": Knob(0.9), "temperature": Knob(1.0), "remask_below": Knob(0.8)},
    ),
    Case("hierarchy whole", "decoder", hierarchy, {"block_length": None, "low": 0.2, "high": 0.9}),
    Case(
        "credit",
        "decoder",
        credit,
        {"block_length": 4, "threshold": 0.7, "weight": 1.5, "power": 0.5, "memory": 2},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "weight": Knob(0.0),
            "decay": Knob(0.0),
            "power": Knob(2.0),
            "memory": Knob(1),
            "temperature": Knob(1.0),
        },
    ),
    Case("credit whole", "decoder", credit, {"block_length": None, "threshold": 0.6, "memory": 1, **SAMPLED}),
)

COMMITS = (
    Case("entropy_budget", "commit", EntropyBudget, {"budget": 1.0}, knobs={"budget": Knob(0.1)}),
    Case(
        "local_leap",
        "commit",
        LocalLeap,
        {"anchor": 0.7, "relaxed": 0.4, "distance": 1},
        knobs={"anchor": Knob(0.9), "relaxed": Knob(0.6), "distance": Knob(3)},
    ),
    Case("hierarchy", "commit", Hierarchy, {"low": 0.3, "high": 0.7}, knobs={"low": Knob(0.6), "high": Knob(0.9)}),
    Case("bounded_adaptive", "commit", BoundedAdaptive, {"low": 0.4, "high": 0.8}, knobs={"low": Knob(0.7), "high": Knob(0.5)}),
    Case("ascending", "commit", Ascending, knobs={"stages": Knob(2, place=_whole)}),
    Case(
        "stable",
        "commit",
        Stable,
        {"at_least": 0.5, "divergence": 1.0, "history": 1},
        knobs={
            "at_least": Knob(0.8),
            "divergence": Knob(0.05),
            "history": Knob(2),
            "memory": Knob(1),
            "fallback": Knob(Quota(4)),
        },
    ),
    Case(
        "reject_early",
        "commit",
        RejectEarly,
        knobs={
            "rule": Knob(Gate(0.6)),
            "low": Knob(0.0, place=_whole),
            "high": Knob(0.4, place=_whole),
            "pace": Knob("doubling", place=_whole),
            "steps": Knob(40, place=_whole),
            "late": Knob(tuple(range(13)), place=_whole),
        },
    ),
)

PROPOSALS = (
    Case(
        "position_and_corpus",
        "propose",
        PositionAndCorpus,
        {"counts": COUNTS},
        knobs={
            "decay": Knob(0.0, place=_by_quota),
            "cap": Knob(0.5, place=_by_quota),
            "counts": Knob(None, place=_by_quota),
            "inner": Knob(Sample(suppress=(3, "eos"))),
        },
    ),
    Case(
        "credit",
        "propose",
        Credit,
        {"weight": 1.5, "power": 0.5, "memory": 2},
        knobs={
            "weight": Knob(0.0),
            "decay": Knob(0.0),
            "power": Knob(2.0),
            "memory": Knob(1),
            "inner": Knob(Sample(suppress=(3, "eos"))),
        },
    ),
)

PARTS = (*COMMITS, *PROPOSALS)
ALL = (*DECODERS, *PARTS)
