"""What a layout shows to a model, asked of all positions: the definition that training/forward.py is held against."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.training.layouts import Seen


def read_logits(model: Transformer, seen: Seen) -> Float[Tensor, "B L V"]:
    """Logits of every canvas position, wherever they lie. Rows of the prompt may hold anything."""
    return model(Query(seen.tokens, seen.positions, None, seen.allow, seen.read))
