"""How many lanes a model wrapper computes, read on the host. Alone here: its decorator imports torch's compiler, which takes a second."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def read_widths(*widths: Int[Tensor, ""]) -> list[int]:
    """Widths of packed lanes, read on the host: exact, or rounded up to a multiple of 16 where the caller is being compiled."""
    return _read(torch.stack(widths), 16 if torch.compiler.is_compiling() else 1)  # type: ignore[call-arg]


@torch.compiler.disable
def _read(widths: Int[Tensor, "N"], step: int) -> list[int]:
    # Outside of the graph, so that the code behind it is compiled for few widths and not for every one that occurs.
    return [-(-width // step) * step for width in widths.tolist()]
