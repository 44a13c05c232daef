"""dParallel: commit every token of the block whose distribution is nearly certain, measured by entropy.

    S <- masked positions of the block
    commit {i in S : H_i <= eta}, at least the one of lowest entropy        H in nats, tokens by argmax

The gain comes from certainty-forcing distillation, which makes many positions certain early; the decoding is this one line.

Reference: Chen et al., dParallel: Learnable Parallel Decoding for dLLMs, arXiv 2509.26488.
"""

from __future__ import annotations

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.registry import register


@register("decoder", "dparallel")
def dparallel(
    block_length: int | None = 32,
    entropy: float = 0.5,
    strict: bool = False,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
    trailing_forward: bool = False,
) -> BlockDecoder:
    """dParallel (arXiv 2509.26488): commit positions with at most `entropy` nats, block after block.

    strict: < instead of <= (the released Dream code). stop_at_eos false decodes every block to its end; trailing_forward spends a second
    forward on a block that its first one filled (both: the released LLaDA code, the second with a cache).
    """
    if entropy < 0:
        raise DecodeError(f"entropy must be 0 or more, got {entropy}. It is an upper bound in nats. Write entropy: 0.5.")
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length, least_steps=2 if trailing_forward else 1),
        commit=Gate(-entropy, strict=strict, on="score"),
        propose=Sample(temperature=temperature, score="negative_entropy"),
        stop=stop,
    )
