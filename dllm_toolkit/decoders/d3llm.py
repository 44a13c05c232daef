"""d3LLM: D2F's pipeline of blocks on a canvas with full attention, gated by entropy.

    loop:
        open the next block when the last opened one is add_at decoded (all later blocks stay in view, as masks)
        one forward over the canvas
        commit every opened position with H <= entropy; if the first unfinished block got none, its position of lowest H
        once an end-of-text is committed, everything behind it becomes end-of-text; what is masked before it is still decoded

In D2F every fully activated block must commit; here only the first of them, and that is the first unfinished block: what lies before it is
full, which is as activated as can be. So the paper's second threshold (decoded_token_threshold) decides nothing, and is no argument here.

Keys may be kept once a block has been finished for some forwards (`cache: delayed_blocks`): with full attention they go on changing for a
while.

The pseudo-trajectory distillation that makes many positions certain early is not part of decoding.

Reference: d3LLM: Ultra-Fast Diffusion LLM using Pseudo-Trajectory Distillation, arXiv 2601.07568.
"""

from __future__ import annotations

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.registry import register


@register("decoder", "d3llm")
def d3llm(
    block_length: int = 32,
    entropy: float = 0.5,
    add_at: float = 0.5,
    minimum: int = 0,
    strict: bool = False,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """d3LLM multi-block decoding (arXiv 2601.07568): positions with at most `entropy` nats, in all opened blocks.

    minimum: the best so many of a step are committed however unsure (1 in the released LLaDA code). strict: < instead of <= (the released
    Dream code). stop_at_eos false: an end-of-text token is a token like any other.
    """
    if entropy < 0:
        raise DecodeError(f"entropy must be 0 or more, got {entropy}. It is an upper bound in nats. Write entropy: 0.5.")
    stop: Stop = AtEos(fill=True) if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=Pipelined(
            block_length=block_length,
            add_at=add_at,
            activate_at=None,
            past_eos=not stop_at_eos,
        ),
        commit=Gate(-entropy, strict=strict, on="score", minimum=minimum),
        propose=Sample(temperature=temperature, score="negative_entropy"),
        stop=stop,
    )
