"""How a training pass is computed: hidden rows first, logits only where the loss wants them. None of it changes a loss beyond rounding.

    tokens, block -> layers -> hidden [B, L, D] -> rows [N, D] -> logits of a few rows at a time -> value of each row

`block` is the whole attention rule: position q sees k where block[k] <= block[q]. One number for each position, so a mask of L x L
booleans is made only for the dense kernels; FlexAttention gets tiles (ops/tiles.py). With LLaDA's 126464 tokens the logits of 1024
positions are 0.5 GB in float32, for teacher and student, with softmax and gradient each: ops/vocabulary.py never has more than a chunk,
and neither have sums of terms (training/composed.py), whose logits are computed again for the backward pass where chunks are several.

A layer is compiled once and that graph serves all layers: their weights are its inputs.

    checkpoint  none        everything that the backward pass reads is kept
                selective   products (linear maps, attention) are kept; norms, rotations, gates are computed again
                layers      only the input of each layer is kept, and the layer is computed again (arXiv 1604.06174)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Lanes, Layer, Transformer, dense
from dllm_toolkit.ops.masks import block_causal
from dllm_toolkit.ops.tiles import block_causal_tiles
from dllm_toolkit.ops.vocabulary import Divergence, Rows, cross_entropy_rows, divergence_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Checkpoint = Literal["none", "selective", "layers"]
Kernel = Literal["auto", "dense", "flex"]

LOGITS = 1 << 26
"""Logits at a time: 256 MB in float32, 512 rows of LLaDA's vocabulary."""
LEAST_HEAD = 16  # dimensions that the CUDA kernel of flex attention takes


class ForwardError(ToolkitError):
    """A way to compute that this machine or this model does not have."""


@dataclass(frozen=True)
class Forward:
    """How to compute a training pass.

    attention: `flex` (tiles), `dense` (a mask of L x L), or `auto`: flex where it is compiled, on a CUDA device, for heads of 16
    dimensions or more, else dense. checkpoint:
    what is kept for the backward pass. compile: one graph for all layers and one for the loss of a chunk (the trainer's `compile`
    switches it on). chunk: rows of logits at a time; by default as many as make 64 million logits.
    """

    attention: Kernel = "auto"
    checkpoint: Checkpoint = "none"
    compile: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ForwardError(f"chunk must be at least 1, got {self.chunk}. It counts rows of logits. Write chunk: 512, or leave it out.")

    def hidden(self, model: Transformer, tokens: Int[Tensor, "B L"], block: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """What the last layer gives, before the last norm, where position q sees k if block[k] <= block[q]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        allow = None if self._flex(model, tokens.device) else block_causal(block)
        return self.hidden_of(model, Query(tokens, positions, allow=allow), block)

    def hidden_of(self, model: Transformer, query: Query, block: Int[Tensor, "B W"] | None) -> Float[Tensor, "B W D"]:
        """`hidden` of lanes that lie otherwise than the canvas. block: `query.allow` as numbers, None if it has no such form."""
        flex = self._flex(model, query.tokens.device) and block is not None
        if self.attention == "flex" and not flex:
            raise ForwardError(
                "flex attention has tiles of blocks in an order, got attention: flex and a layout of another rule. Its mask is drawn, or "
                "is that of a doubled row. Write attention: auto, which is dense there."
            )
        query = query._replace(allow=None if flex else query.allow)
        x, lanes = model.enter(query), model.lanes(query, None)
        tiles = block_causal_tiles(block.to(torch.int32)) if flex and block is not None else None
        keep: Checkpoint = self.checkpoint if torch.is_grad_enabled() else "none"
        if self.compile and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # else the first layer above a frozen embedding is a graph of its own
        run = _compiled_layer() if self.compile else _layer
        for layer in model.layers:
            x = run(layer, x, lanes, tiles, keep)  # type: ignore[arg-type]
        return x

    def rows(self, model: Transformer, wanted: Bool[Tensor, "B L"], parts: int = 1) -> Int[Tensor, "N"]:
        """Flat positions (row * L + position) that hold all the wanted ones, first and in order, up to whole chunks.

        parts: what is less than a chunk is rounded up to whole parts of one, so that there are as many sizes to compile. Waits for the
        device once, to count them; not where the least of these sizes holds every position, which are returned as they are then.
        """
        total, chunk = wanted.numel(), self.rows_at_a_time(model)
        part = max(1, chunk // parts)
        if part >= total:
            return torch.arange(total, device=wanted.device)
        count = int(wanted.sum())
        size = part if count <= chunk else chunk
        return wanted.flatten().to(torch.int8).argsort(descending=True, stable=True)[: max(size, -(-count // size) * size)]

    def by_chunk(
        self, model: Transformer, measure: Callable[..., tuple[Tensor, ...]], *columns: Shaped[Tensor, "N ..."] | None
    ) -> tuple[Shaped[Tensor, "N"], ...]:
        """What `measure` says of rows, asked for a chunk at a time. Where there are several, it is asked again for the backward pass."""
        count = next(column.shape[0] for column in columns if column is not None)
        chunk = self.rows_at_a_time(model)
        if count <= chunk:
            return measure(*columns)
        found = []
        for begin in range(0, count, chunk):
            some = [None if column is None else column[begin : begin + chunk] for column in columns]
            found.append(checkpoint(measure, *some, use_reentrant=False))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))  # type: ignore[arg-type]

    def rows_at_a_time(self, model: Transformer) -> int:
        """How many rows of logits exist at once."""
        return self.chunk or max(128, LOGITS // model.spec.vocab_size // 128 * 128)

    def at(self, model: Transformer, hidden: Float[Tensor, "B L D"], rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """What the LM head is asked for these positions: normed, and one position early where the model predicts the next token."""
        if model.spec.shift:
            rows = rows - (rows % hidden.shape[1] > 0).to(rows.dtype)  # position 0 has no predecessor, as in `Transformer.logits`
        return model.norm(hidden.flatten(0, 1)[rows])

    def cross_entropy(self, model: Transformer, rows: Float[Tensor, "N D"], target: Int[Tensor, "N"]) -> Rows:
        """-log p(target) of each row."""
        return cross_entropy_rows(rows, _head(model), target, chunk=self.rows_at_a_time(model), compile=self.compile)

    def divergence(
        self, model: Transformer, student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"], which: Divergence, temperature: float
    ) -> Rows:
        """The divergence of teacher and student at each row, under the head that they share."""
        chunk = self.rows_at_a_time(model)
        return divergence_rows(student, teacher, _head(model), which, temperature, chunk=chunk, compile=self.compile)

    def _flex(self, model: Transformer, device: torch.device) -> bool:
        on_gpu = device.type == "cuda"
        if self.attention == "flex" and not on_gpu and torch.is_grad_enabled():
            raise ForwardError(
                f"flex attention has no backward pass on {device.type}, got attention: flex. Only CUDA devices have that kernel. "
                "Write attention: auto, which is dense there."
            )
        chosen = self.attention == "flex" or (self.attention == "auto" and self.compile and on_gpu)
        fits = not (chosen and on_gpu) or (model.config.head_dim or 0) >= LEAST_HEAD
        if self.attention == "flex" and not fits:
            raise ForwardError(
                f"flex attention on CUDA needs heads of at least {LEAST_HEAD} dimensions, got attention: flex and a model with heads of "
                f"{model.config.head_dim}. Write attention: auto, which is dense there."
            )
        return chosen and fits


def _head(model: Transformer) -> Tensor:
    if type(model.lm_head) is not nn.Linear:
        raise ForwardError(
            f"the LM head must be one matrix for teacher and student, got {type(model.lm_head).__name__}. An adapter on it would be "
            "left out of the loss. Write lora.targets without lm_head."
        )
    return model.lm_head.weight


def _layer(layer: Layer, x: Tensor, lanes: Lanes, tiles: BlockMask | None, keep: Checkpoint) -> Tensor:
    if keep == "none":
        return _through(layer, x, lanes, tiles)
    how: dict[str, Any] = {"use_reentrant": False}
    if keep == "selective":
        how["context_fn"] = _keep_products
    return checkpoint(_through, layer, x, lanes, tiles, **how)  # type: ignore[return-value]


def _through(layer: Layer, x: Tensor, lanes: Lanes, tiles: BlockMask | None) -> Tensor:
    x = x + layer.attend(x, lanes, None, dense if tiles is None else partial(_flex_mix, tiles))
    return x + layer.transform(x)


def _flex_mix(tiles: BlockMask, q: Tensor, k: Tensor, v: Tensor, lanes: Lanes) -> Tensor:
    """Attention over tiles. Eager flex attention is only a definition, with L x L scores, so a device always gets the kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return run(q, k, v, block_mask=tiles, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled_layer() -> Any:
    return torch.compile(_layer, dynamic=False)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)
