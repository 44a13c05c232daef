"""The part of the catalogue for wrappers around models and for the decoders that were made for them; see `cases`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dllm_toolkit.decoders.annealed_threshold import Annealed, annealed_threshold
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.certainty_prior import CertaintyPrior, certainty_prior
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.models.base import Model
from dllm_toolkit.models.d2cache import D2Cache
from dllm_toolkit.models.feature_reuse import FeatureReuse
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.smoothing import Smoothed
from dllm_toolkit.models.wrapper import Wrapper
from dllm_toolkit.testing.case import Case, Knob

_by_quota = partial(BlockDecoder, SemiAutoregressive(None), Quota())


def _ranked(propose: CertaintyPrior) -> BlockDecoder:
    return _by_quota(propose=propose)


DECODERS = (
    Case(
        "certainty_prior",
        "decoder",
        certainty_prior,
        {"sigma": 1.0},
        knobs={
            "block_length": Knob(4),
            "steps": Knob(4),
            "threshold": Knob(0.03),
            "sigma": Knob(3.0),
            "temperature": Knob(1.0),
        },
    ),
    Case("certainty_prior threshold", "decoder", certainty_prior, {"block_length": 4, "threshold": 0.15, "sigma": 2.0}),
    Case(
        "annealed_threshold",
        "decoder",
        annealed_threshold,
        {"block_length": 4, "threshold": 0.4, "decay": 0.1},
        knobs={
            "block_length": Knob(2),
            "threshold": Knob(0.9),
            "decay": Knob(0.3),
            "start": Knob(0.5),
            "temperature": Knob(1.0),
        },
    ),
)
COMMITS = (
    Case(
        "annealed",
        "commit",
        Annealed,
        {"at_least": 0.4, "decay": 0.1},
        knobs={"at_least": Knob(0.9), "decay": Knob(0.3), "start": Knob(0.5)},
    ),
)
PROPOSALS = (
    Case(
        "certainty_prior",
        "propose",
        CertaintyPrior,
        {"sigma": 1.0},
        knobs={"sigma": Knob(3.0, place=_ranked), "inner": Knob(Sample(suppress=(3, "eos")))},
    ),
)


@dataclass(frozen=True)
class Wrapping:
    """A wrapper as the tests use it.

    neutral: arguments with which it is the model itself. knobs: for each argument a value that must change logits. inexact: it answers from
    memory, so a decode cannot go on from its state alone. saves: it computes fewer query tokens than it is asked.
    """

    name: str
    maker: type[Wrapper]
    arguments: Mapping[str, Any]
    neutral: Mapping[str, Any]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    inexact: bool = True
    saves: bool = True

    def around(self, model: Model, **changes: Any) -> Wrapper:
        return self.maker(model, **{**self.arguments, **changes})

    def __str__(self) -> str:
        return self.name


WRAPPERS = (
    Wrapping("guided", Guided, {"scale": 0.7}, {"scale": 0.0}, {"scale": 1.5}, inexact=False, saves=False),
    Wrapping(
        "feature_reuse",
        FeatureReuse,
        {"prompt_interval": 4, "response_interval": 3, "ratio": 0.3},
        {"prompt_interval": 1, "response_interval": 1},
        {"prompt_interval": 2, "response_interval": 2, "ratio": 0.6},
    ),
    Wrapping(
        "d2cache",
        D2Cache,
        {"candidates": 1, "sigma": 2.0, "share": 0.2},
        {"candidates": 1000, "share": 1.0},
        {"candidates": 4, "sigma": 0.3, "share": 0.6},
    ),
    Wrapping(
        "smoothed",
        Smoothed,
        # The published weights. Larger ones make a toy's rounding grow tenfold a forward, beyond what D5 allows after eight.
        {"start": 0.15, "growth": 0.02, "most": 0.3},
        {"most": 0.0},
        {"start": 0.05, "growth": 0.1, "most": 0.16},
        saves=False,
    ),
)
