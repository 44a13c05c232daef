"""Tokenizer and special ids of a checkpoint, from its own files. No literal id is written anywhere in this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_toolkit.models.families.base import CheckpointError, SpecialIds


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer with its chat template; None if the directory has no tokenizer files.

    tokenizer.json is read as it is. Dream has only the vocab.json and merges.txt of a byte-level BPE in Qwen2's format (its own class is
    remote code, which never runs here). Raises CheckpointError for files in another format.
    """
    if (directory / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(str(directory))
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise CheckpointError(
                f"{directory / 'tokenizer.json'} cannot be read, got {str(error).splitlines()[0]}. Without it text cannot be encoded. "
                "Copy the tokenizer's files again from their source."
            ) from error
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(str(directory))
    if (directory / "tokenizer.model").exists():
        raise CheckpointError(
            f"{directory} has a tokenizer.model and no tokenizer.json. Only the latter is read. Convert it once with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return None


def prompt_text(tokenizer: Any, prompt: str, prompt_format: str | None) -> str:
    """The text that is encoded for a prompt: `prompt_format` with the prompt in it; None: a user's turn of the chat template, if any."""
    if prompt_format is not None:
        return prompt_format.replace("{prompt}", prompt)
    if not tokenizer.chat_template:
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)


def special_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Any, mask_id: int | None = None
) -> SpecialIds:
    """Ids from generation_config.json, else config.json, else the tokenizer; `mask_id` overrides. Raises CheckpointError."""
    eos = _first("eos_token_id", generation, config)
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise CheckpointError(
            "the checkpoint names no end-of-text token: config.json, generation_config.json and the tokenizer have no eos_token_id. "
            'Decoding would not know where to stop. Add "eos_token_id" to config.json.'
        )
    eos_ids = tuple(int(item) for item in eos) if isinstance(eos, list | tuple) else (int(eos),)
    pad = _first("pad_token_id", generation, config)
    if pad is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
    if mask_id is None:
        mask_id = _first("mask_token_id", config, generation)
    if mask_id is None and tokenizer is not None:
        mask_id = _mask_token(tokenizer)
    return SpecialIds(mask_id, eos_ids, eos_ids[0] if pad is None or int(pad) < 0 else int(pad))


def _first(name: str, *files: Mapping[str, Any]) -> Any:
    return next((file[name] for file in files if file.get(name) is not None), None)


def _mask_token(tokenizer: Any) -> int | None:
    """The tokenizer's mask token; else the one added token that says mask in its text, as Fast-dLLM v2's `|<MASK>|` does."""
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    named = [index for index, token in tokenizer.added_tokens_decoder.items() if "mask" in str(token).lower()]
    return named[0] if len(named) == 1 else None
