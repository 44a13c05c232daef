"""Letters, aliases and the few constants everybody shares. Nothing here depends on anything else.

Shapes in this package are written with these letters only:

    B rows (requests)        L canvas length        W lanes (queries of one forward)     R read lanes
    S slots (K/V buffer)     V vocabulary           H heads      D head size             G groups (blocks)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

Rows = Bool[Tensor, "B"]
"""A yes or no for every row."""
Canvas = Bool[Tensor, "B L"]
"""A decision about every position of every row. All rules speak in canvases."""
Tokens = Int[Tensor, "B L"]
Scores = Float[Tensor, "B L"]
PyTree = Any
"""The private state of one part: a tensor, or tuples / dataclasses of tensors."""

Attention = Literal["full", "block_causal", "causal"]
BlockAnchor = Literal["prompt", "absolute"]


@dataclass(frozen=True)
class ModelSpec:
    """What decoding must know of a model.

    `attention`: who may see whom: everybody (`full`), earlier and own blocks (`block_causal`), earlier positions
    (`causal`). `block_size`: the block length that a block-causal model was trained with, if any.
    `block_anchor`: whether blocks count from the prompt's end (LLaDA, D2F) or from position 0 (SDAR, Fast-dLLM v2), where the prompt's tail
    shares a block with the first answer tokens. `shift`: 0 if the output at a position predicts that position (LLaDA), 1 if it predicts
    the next (Dream, AR). `mask_id` may be `vocab_size` for a causal model, whose undecided positions are never computed.
    """

    vocab_size: int
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    max_positions: int
    attention: Attention = "full"
    block_size: int | None = None
    block_anchor: BlockAnchor = "prompt"
    shift: Literal[0, 1] = 0


class Need(enum.Enum):
    """A capability that a decoder or a cache asks of the model; checked when the three are put together."""

    BIDIRECTIONAL = "a model that fills masks (attention full or block_causal)"
    BLOCK_CAUSAL = "a model whose past never sees its future (attention block_causal or causal)"
    CAUSAL = "an autoregressive model (attention causal, shift 1)"
    UNSHIFTED = "a model whose output at a position is about that very position (shift 0)"

    def met_by(self, spec: ModelSpec) -> bool:
        if self is Need.BIDIRECTIONAL:
            return spec.attention != "causal"
        if self is Need.BLOCK_CAUSAL:
            return spec.attention != "full"
        if self is Need.UNSHIFTED:
            return spec.shift == 0
        return spec.attention == "causal" and spec.shift == 1


class Result(enum.IntEnum):
    """How a row ended. The text is for people."""

    RUNNING = 0
    FULL = 1
    END_OF_TEXT = 2
    MAX_STEPS = 3
    EARLY_COMMIT = 4
    STOP_SEQUENCE = 5

    @property
    def text(self) -> str:
        return {
            Result.RUNNING: "still running",
            Result.FULL: "every position of the budget was decided",
            Result.END_OF_TEXT: "an end-of-text token was committed and nothing before it is masked",
            Result.MAX_STEPS: "the step limit was reached; the text ends before its first undecided position",
            Result.EARLY_COMMIT: "a stop rule was sure of the answer and committed the rest at once",
            Result.STOP_SEQUENCE: "the tokens that end a text were committed and nothing before them is masked",
        }[self]


@dataclass(frozen=True)
class Special:
    """Special ids of the model, carried by the state so that rules never hold a literal."""

    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
