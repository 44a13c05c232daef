"""Fast-dLLM: commit every token of the block whose probability licenses it, with a prefix or dual cache.

    threshold   commit {i : c_i >= tau}, at least the best
    factor      commit the longest ranked prefix with (n + 1)(1 - c_(n)) <= f, at least the best

Why: if all n confidences exceed 1 - e and (n + 1) e <= 1, the product of marginals and the joint have the same argmax.

Reference: Wu et al., Fast-dLLM, arXiv 2505.22618. The caches are `cache: prefix` and `cache: dual`.
"""

from __future__ import annotations

from dllm_toolkit.decoders.base import DecodeError, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Factor, Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.registry import register


@register("decoder", "fast_dllm")
def fast_dllm(
    block_length: int = 32,
    threshold: float | None = None,
    factor: float | None = None,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
    official_tail: bool = False,
    step_cap: int | None = None,
) -> BlockDecoder:
    """Fast-dLLM (arXiv 2505.22618): parallel commits by `threshold` (default 0.9) or by `factor`, block after block.

    Three flags reproduce the released code. stop_at_eos false: decode every block to its end. official_tail: a slip of its factor rule, see
    `Factor`. step_cap: its v1 dual-cache loop spends at most this many forwards on an answer and leaves masks, see `SemiAutoregressive`.
    """
    if threshold is not None and factor is not None:
        raise DecodeError(
            f"fast_dllm takes threshold or factor, got threshold={threshold} and factor={factor}. They are two commit rules. "
            "Write one of them, e.g. threshold: 0.9."
        )
    commit = Factor(factor, official_tail) if factor is not None else Gate(0.9 if threshold is None else threshold)
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length, step_cap=step_cap),
        commit=commit,
        propose=Sample(temperature=temperature),
        stop=stop,
    )
