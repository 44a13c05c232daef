"""A new Transformer for a tokenizer: the model slot of a recipe that trains from scratch.

Vocabulary size and special ids come from the tokenizer, so no recipe holds a literal id.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dllm_toolkit.models.transformer import ModelError, Transformer, transformer
from dllm_toolkit.registry import register
from dllm_toolkit.types import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name == "stories":
        from dllm_toolkit.data.stories import build_tokenizer

        return build_tokenizer()
    if not (Path(name) / "tokenizer.json").is_file():
        raise ModelError(
            f"cannot find the tokenizer, got {name!r}. It is `stories` or a directory with a tokenizer.json. Write tokenizer: stories."
        )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(name)


@register("model", "fresh")
def fresh(
    tokenizer: str = "stories",
    width: int = 256,
    layers: int = 6,
    heads: int = 8,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    max_positions: int = 256,
    rope_theta: float = 10000.0,
    attention: Attention = "full",
    block_size: int | None = None,
    shift: Literal[0, 1] = 0,
    seed: int = 0,
) -> Transformer:
    """A freshly initialised Transformer with the vocabulary and the special ids of `tokenizer` (`stories`, or a directory)."""
    words = _tokenizer(tokenizer)
    if words.mask_token is None or words.eos_token is None:
        raise ModelError(
            f"the tokenizer must name a mask token and an end token, got mask_token={words.mask_token!r} and "
            f"eos_token={words.eos_token!r}. Diffusion needs both. Set mask_token and eos_token in tokenizer_config.json."
        )
    ids = words.get_vocab()
    model = transformer(
        vocab_size=len(words),
        mask_id=ids[str(words.mask_token)],
        eos_ids=[ids[str(words.eos_token)]],
        pad_id=ids[str(words.pad_token or words.eos_token)],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        max_positions=max_positions,
        rope_theta=rope_theta,
        attention=attention,
        block_size=block_size,
        shift=shift,
        seed=seed,
    )
    model.tokenizer = words
    return model
