"""dllm_toolkit: a research toolkit for diffusion language models with pluggable decoders.

    from dllm_toolkit.decode import decode
    from dllm_toolkit.models.load import load

The names below are imported on first use: `import dllm_toolkit` and the command line's `--help` stay fast.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_toolkit.cache.base import Cache, Plan
    from dllm_toolkit.decode import Output, Stats, trace
    from dllm_toolkit.decoders.base import Commit, DecodeError, Decoder, Propose, Revise, Schedule, Stop
    from dllm_toolkit.decoders.block import BlockDecoder
    from dllm_toolkit.errors import ToolkitError
    from dllm_toolkit.models.base import Model
    from dllm_toolkit.recipe import Recipe, RecipeError
    from dllm_toolkit.registry import register
    from dllm_toolkit.state import Proposal, Region, State
    from dllm_toolkit.types import ModelSpec

try:
    __version__ = version("dllm-toolkit")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

# `decode` is missing on purpose: the name belongs to the module, `from dllm_toolkit.decode import decode`.
_HOMES = {
    "BlockDecoder": "decoders.block",
    "Cache": "cache.base",
    "Commit": "decoders.base",
    "DecodeError": "decoders.base",
    "Decoder": "decoders.base",
    "Model": "models.base",
    "ModelSpec": "types",
    "Output": "decode",
    "Plan": "cache.base",
    "Proposal": "state",
    "Propose": "decoders.base",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "Region": "state",
    "Revise": "decoders.base",
    "Schedule": "decoders.base",
    "State": "state",
    "Stats": "decode",
    "Stop": "decoders.base",
    "ToolkitError": "errors",
    "register": "registry",
    "trace": "decode",
}

__all__ = [
    "BlockDecoder",
    "Cache",
    "Commit",
    "DecodeError",
    "Decoder",
    "Model",
    "ModelSpec",
    "Output",
    "Plan",
    "Proposal",
    "Propose",
    "Recipe",
    "RecipeError",
    "Region",
    "Revise",
    "Schedule",
    "State",
    "Stats",
    "Stop",
    "ToolkitError",
    "__version__",
    "register",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
