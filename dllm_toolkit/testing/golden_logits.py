"""Recorded logits of the official modelling code against ours: full, padded, block-causal and cached attention, merged adapters.

Entries hold raw head outputs (for shifted models before any shift), at every lane of the recorded forward. Entries whose forward has a
cache are forwards of one decode, in order: each sees keys that an earlier one left in the buffer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import masks
from dllm_toolkit.types import Attention

TOLERANCE = 1e-3  # logits reach +-30; the official copies of the modelling code differ by 2e-5 among themselves
MERGED_TOLERANCE = 2e-3  # a merged and an unmerged adapter differ by 4e-4
Entry = dict[str, Any]
Loader = Callable[[str, str | None], Transformer]


def entries(path: Path) -> list[Entry]:
    """The entries of a `*_logits.json`."""
    return json.loads(path.read_text(encoding="utf-8"))["entries"]


@torch.inference_mode()
def errors(path: Path, model: Loader) -> Iterator[tuple[str, float, float]]:
    """(entry, largest absolute difference, tolerance) for every entry of a file; `model(checkpoint, adapter)` gives the weights."""
    described = json.loads(path.read_text(encoding="utf-8"))
    official = load_file(str(path.with_suffix(".safetensors")))
    name, pipeline = described["checkpoint"], Pipeline(described["entries"])
    for entry in described["entries"]:
        adapter = entry.get("adapter")
        ours = pipeline.logits(model(name, adapter), entry)
        theirs = official[entry["name"]]
        if "attention_mask" in entry:
            keep = torch.tensor(entry["attention_mask"]).bool()
            ours, theirs = ours[keep], theirs[keep]
        yield entry["name"], (ours - theirs).abs().max().item(), TOLERANCE if adapter is None else MERGED_TOLERANCE


class Pipeline:
    """Runs the entries of one file in order. Staged ones (with a `start`) see keys that earlier forwards left in the buffer."""

    def __init__(self, described: list[Entry]) -> None:
        self.described = {entry["name"]: entry for entry in described}
        self.length = max(entry.get("start", 0) + len(entry["input_ids"][0]) for entry in described)
        self.kv: KVBuffer | None = None

    def logits(self, model: Transformer, entry: Entry) -> Float[Tensor, "B W V"]:
        """Raw logits of every lane of the recorded forward."""
        tokens = torch.tensor(entry["input_ids"])
        if "cache_from" in entry:  # a full forward fills the buffer, then a part of it is computed again
            whole = torch.tensor(self.described[entry["cache_from"]]["input_ids"])
            self._staged(model, {"start": 0}, whole, whole.shape[1])
            return self._staged(model, entry, tokens, whole.shape[1])
        if "start" in entry:
            return self._staged(model, entry, tokens, entry["start"] + tokens.shape[1])
        allow: Bool[Tensor, "B W W"] | None = None
        if "attention_mask" in entry:
            allow = torch.tensor(entry["attention_mask"]).bool().unsqueeze(1).expand(-1, tokens.shape[1], -1)
        elif "block_size" in entry:
            allow = masks.block_causal(_blocks(entry, tokens.shape[1]))
        return model(Query(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, allow, None))

    def _staged(self, model: Transformer, entry: Entry, tokens: Int[Tensor, "1 W"], seen: int) -> Float[Tensor, "1 W V"]:
        if entry["start"] == 0:
            self.kv = model.buffer(1, self.length + 1)
        assert self.kv is not None
        attention: Attention = "block_causal" if "block_size" in entry else "full"
        block = _blocks(entry, self.length) if "block_size" in entry else torch.zeros(1, self.length, dtype=torch.long)
        positions = torch.arange(entry["start"], entry["start"] + tokens.shape[1]).unsqueeze(0)
        allow = masks.lanes_allow(attention, torch.arange(self.length).unsqueeze(0) < seen, block, positions)
        allow = torch.cat((allow, torch.zeros_like(allow[..., :1])), dim=2)  # nobody looks at the trash slot
        return model(Query(tokens, positions, positions, allow, positions), self.kv)


def _blocks(entry: Entry, length: int) -> Int[Tensor, "1 L"]:
    return masks.answer_blocks(torch.tensor([entry["prompt_length"]]), length, entry["block_size"])
