"""LLaDA's own sampler: predict every mask, commit the most confident ones, repeat (low-confidence or random remasking).

    for each block, for each of its steps t:
        logits  <- model(canvas)                       the whole canvas, no cache needed
        tokens  <- argmax, or Gumbel-max at temperature T
        commit the k_t best-ranked masked positions    k_t: the block's masks spread evenly over its steps

Reference: Nie et al., Large Language Diffusion Models, arXiv 2502.09992.
"""

from __future__ import annotations

from typing import Literal

from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample, Special
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.registry import register


@register("decoder", "vanilla")
def vanilla(
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    remasking: Literal["low_confidence", "random"] = "low_confidence",
    suppress: tuple[Special, ...] = (),
    defer: tuple[Special, ...] = (),
    idle_steps: bool = False,
) -> BlockDecoder:
    """LLaDA sampling (arXiv 2502.09992): a fixed quota of the most confident tokens a step, no early stop.

    steps: forwards of the whole answer (None: one token a step). block_length: None decodes the whole canvas at once.
    suppress / defer: LLaDA's logits_eos_inf / confidence_eos_eot_inf, as ids or "eos". idle_steps: when there are more steps
    than tokens, spend forwards on full blocks as the released generate.py does.
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length, hold=steps if idle_steps else None),
        commit=Quota(steps),
        propose=Sample(
            temperature=temperature,
            score="probability" if remasking == "low_confidence" else "random",
            suppress=suppress,
            defer=defer,
        ),
        stop=WhenFull(),
    )
