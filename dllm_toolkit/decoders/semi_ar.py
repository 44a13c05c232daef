"""Semi-autoregressive decoding: blocks from left to right, a quota inside each, stop at end-of-text.

Reference: LLaDA, arXiv 2502.09992; the common frame of Fast-dLLM, LocalLeap, KLASS and most others.
"""

from __future__ import annotations

from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.registry import register


@register("decoder", "semi_ar")
def semi_ar(block_length: int | tuple[int, ...] = 32, steps: int | None = None, temperature: float = 0.0) -> BlockDecoder:
    """Block after block (arXiv 2502.09992), `steps` forwards for the whole answer (None: one token a step), stop at end-of-text."""
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Quota(steps),
        propose=Sample(temperature=temperature),
    )
