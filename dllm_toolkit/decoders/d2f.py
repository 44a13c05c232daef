"""D2F, discrete diffusion forcing: several blocks of a block-causal student decoded in a pipeline, with an exact K/V cache.

    loop:
        open a new block of masks when the last one is add_at decoded (none after an end-of-text token)
        a block is fully activated once its predecessor is activate_at decoded
        one forward over everything that is not stored: the block just finished (clean, to be stored) and all open ones
        commit every position with p > threshold; a fully activated block without one commits its best position
        finished blocks are stored in order: earlier blocks never see later ones, so their K/V is exact for good

Defaults differ from the released code where that only saves work: once an end-of-text token is committed, later blocks are dropped
and the row ends when nothing before that token is masked. `official_loop` restores the released loop: opened blocks are
decoded to their end, the last block is dropped if it would be shorter, nothing stops early.

Reference: Wang et al., Diffusion LLMs Can Do Faster-Than-AR Inference via Discrete Diffusion Forcing, arXiv 2508.09192.
"""

from __future__ import annotations

from typing import Literal

from dllm_toolkit.decoders.base import Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.registry import register


@register("decoder", "d2f")
def d2f(
    block_length: int = 32,
    threshold: float = 0.9,
    add_at: float = 0.1,
    activate_at: float = 0.95,
    fallback: Literal["probability", "margin", "negative_entropy"] = "probability",
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_open: int | None = None,
    official_loop: bool = False,
) -> BlockDecoder:
    """D2F pipelined decoding (arXiv 2508.09192). threshold is compared with a strict >, as published.

    fallback: what ranks positions when a fully activated block has none above the threshold. max_open: most unfinished blocks at a time
    (None: no limit, as published). official_loop: spend the forwards of the released code after an end-of-text token.
    """
    stop: Stop = WhenFull() if official_loop else AtEos()
    return BlockDecoder(
        schedule=Pipelined(
            block_length=block_length,
            add_at=add_at,
            activate_at=activate_at,
            max_open=max_open,
            finish_opened=official_loop,
            whole_blocks=official_loop,
        ),
        commit=Gate(threshold, strict=True),
        propose=Sample(temperature=temperature, top_p=top_p, top_k=top_k, score=fallback, evidence="filtered"),
        stop=stop,
    )
