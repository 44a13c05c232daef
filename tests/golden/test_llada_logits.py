"""Logits of the LLaDA layout against the official modelling code: full, padded, block-causal, cached, with a merged adapter."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import masks
from tests.golden.replay import VECTORS, model

TOLERANCE = 1e-3  # logits reach +-30; the official copies of the modelling code differ by 2e-5 among themselves
MERGED_TOLERANCE = 2e-3  # a merged and an unmerged adapter differ by 4e-4
ENTRIES: dict[str, dict[str, Any]] = {
    entry["name"]: entry for entry in json.loads((VECTORS / "logits" / "llada_logits.json").read_text())["entries"]
}


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return load_file(str(VECTORS / "logits" / "llada_logits.safetensors"))


def tokens_of(name: str) -> Tensor:
    return torch.tensor(ENTRIES[name]["input_ids"])


def agree(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < tolerance


def block_causal(entry: dict[str, Any], length: int) -> Tensor:
    begin = torch.tensor([entry["prompt_length"]])
    return masks.block_causal(masks.answer_blocks(begin, length, entry["block_size"]))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["full_no_mask", "full_prompt_and_masks", "full_batch_of_two", "fast_dllm_full"])
def test_full_attention(name: str, official: dict[str, Tensor]) -> None:
    agree(model("llada-tiny").logits(tokens_of(name)), official[name])


@torch.inference_mode()
def test_padded_batch(official: dict[str, Tensor]) -> None:
    keep = torch.tensor(ENTRIES["padded_batch"]["attention_mask"]).bool()
    allow = keep.unsqueeze(1).expand(-1, keep.shape[1], -1)
    ours = model("llada-tiny").logits(tokens_of("padded_batch"), allow)
    agree(ours[keep], official["padded_batch"][keep])


@torch.inference_mode()
def test_block_causal(official: dict[str, Tensor]) -> None:
    tokens = tokens_of("block_causal")
    agree(model("llada-tiny").logits(tokens, block_causal(ENTRIES["block_causal"], tokens.shape[1])), official["block_causal"])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["lora_full", "lora_block_causal"])
def test_merged_adapter(name: str, official: dict[str, Tensor]) -> None:
    entry, tokens = ENTRIES[name], tokens_of(name)
    allow = block_causal(entry, tokens.shape[1]) if "block_size" in entry else None
    agree(model("llada-tiny", entry["adapter"]).logits(tokens, allow), official[name], MERGED_TOLERANCE)


def forward(transformer: Transformer, kv: KVBuffer, tokens: Tensor, start: int, rule: Any, block: Tensor, seen: int) -> Tensor:
    """Logits of the lanes start .. start + W, with the keys of 0 .. seen visible; everything else comes from the buffer."""
    positions = torch.arange(start, start + tokens.shape[1]).unsqueeze(0)
    visible = torch.arange(block.shape[1]).unsqueeze(0) < seen
    allow = masks.lanes_allow(rule, visible, block, positions)
    allow = torch.cat((allow, torch.zeros_like(allow[..., :1])), dim=2)  # nobody looks at the trash slot
    return transformer(Query(tokens, positions, positions, allow, positions), kv)


@torch.inference_mode()
def test_d2f_pipeline_with_cache(official: dict[str, Tensor]) -> None:
    """Four forwards of one decode. Each sees keys that an earlier one left in the buffer, where its own span does not reach."""
    transformer = model("llada-tiny")
    names = [f"d2f_cached_{number}" for number in range(1, 5)]
    length = max(ENTRIES[name]["start"] + tokens_of(name).shape[1] for name in names)
    first = ENTRIES[names[0]]
    block = masks.answer_blocks(torch.tensor([first["prompt_length"]]), length, first["block_size"])
    kv = transformer.buffer(1, length + 1)
    for name in names:
        tokens, start = tokens_of(name), ENTRIES[name]["start"]
        agree(forward(transformer, kv, tokens, start, "block_causal", block, start + tokens.shape[1]), official[name])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["fast_dllm_prefix", "fast_dllm_dual"])
def test_prefix_and_dual_cache(name: str, official: dict[str, Tensor]) -> None:
    """A full forward fills the buffer; then only the suffix (prefix) or the block (dual) is computed again."""
    transformer, whole = model("llada-tiny"), tokens_of("fast_dllm_full")
    length = whole.shape[1]
    kv, block = transformer.buffer(1, length + 1), torch.zeros(1, length, dtype=torch.long)
    agree(forward(transformer, kv, whole, 0, "full", block, length), official["fast_dllm_full"])
    agree(forward(transformer, kv, tokens_of(name), ENTRIES[name]["start"], "full", block, length), official[name])


def test_every_entry_is_used() -> None:
    used = {"full_no_mask", "full_prompt_and_masks", "full_batch_of_two", "fast_dllm_full", "padded_batch", "block_causal", "lora_full"}
    used |= {"lora_block_causal", "fast_dllm_prefix", "fast_dllm_dual", *(f"d2f_cached_{number}" for number in range(1, 5))}
    assert used == set(ENTRIES)
