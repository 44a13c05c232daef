"""Attention of few lanes: who rotates the queries, and the Triton kernel in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/unit/test_ops_attention.py          where Triton is installed; no GPU is needed

On a GPU tests/compile/test_gpu.py has the compiled kernel.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_toolkit.models.base import Flat, Query
from dllm_toolkit.models.transformer import Transformer, TransformerConfig, rotate
from dllm_toolkit.ops import attention

WIDTH, SLOTS = 4, 7
interpreted = pytest.mark.skipif(
    not attention.has_triton() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton, and TRITON_INTERPRET=1 from the start"
)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_queries_are_rotated_once_whoever_does_it(monkeypatch: pytest.MonkeyPatch, qk_norm: bool, flat: bool) -> None:
    """The kernel's place is taken by its definition: what a layer hands to it, and when, decides the logits."""
    config = TransformerConfig(
        vocab_size=29, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, mask_id=28, eos_ids=(27,), pad_id=27, qk_norm=qk_norm
    )
    model = Transformer(config).double().eval().requires_grad_(False)
    lanes = torch.arange(2 * WIDTH).view(2, WIDTH)
    slots = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 6]])
    allow = torch.rand(2, WIDTH, SLOTS) > 0.5
    allow[:, :, 2] = True
    query = Query(lanes, slots, slots, allow, flat=Flat(lanes.flatten(), lanes) if flat else None)
    asked: list[bool] = []

    def kernel(way: str, q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        asked.append(angles is not None)
        if angles is not None:
            q = rotate(q.transpose(1, 2), *(one.unsqueeze(2) for one in angles)).transpose(1, 2)
        return attention.products(q, k, v, allow)

    before = model(query, model.buffer(2, SLOTS))
    monkeypatch.setattr(attention, "way_for", lambda q, allow: "triton")
    monkeypatch.setattr(attention, "few", kernel)
    after = model(query, model.buffer(2, SLOTS))
    assert asked == [not flat] * config.layers
    assert torch.allclose(before, after, atol=1e-12)


def test_only_the_kernel_rotates() -> None:
    q, angles = torch.randn(1, 2, 3, 16), (torch.ones(1, 3, 16), torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="Write way: triton"):
        attention.few("products", q, q, q, None, angles)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((1, 2, 1, 20, 80, 32), (16, 2, 32, 4, 2)),  # two whole blocks and a tail, tiles of which one is not full, grouped heads
        ((2, 2, 2, 5, 70, 16), (16, 1, 64)),  # one part
        ((1, 2, 2, 16, 118, 64), (16, 3, 32)),  # what is nearly a block
        ((1, 1, 1, 16, 40, 16), (64, 4, 64)),  # less than a block
        ((1, 2, 1, 16, 176, 32), (16, 3, 32)),  # parts that do not divide the blocks: the last one would reach into the tail
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_interpreted(sizes: tuple[int, ...], tile: tuple[int, ...], dtype: torch.dtype) -> None:
    from dllm_toolkit.ops.attention_triton import Tiling, attend

    rows, heads, groups, width, slots, size = sizes
    tiling = Tiling(*tile)
    q = torch.randn(rows, width, 3 * heads * size).to(dtype)[..., : heads * size].view(rows, width, heads, size)
    k, v = (torch.randn(rows, slots, groups, size).to(dtype).transpose(1, 2) for _ in range(2))
    allow = torch.rand(rows, 1, width, slots) > 0.5
    allow[..., 64:] &= torch.rand(rows, 1, width, 1) > 0.5  # some lanes see nothing there
    allow[:, :, :, 3] = True
    allow[:, :, 0] = False
    allow[:, :, 0, slots - 1] = True  # the only one, in the last part
    angle = torch.rand(rows, width, size // 2).repeat(1, 1, 2) * 6
    turned = rotate(q, angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)).transpose(1, 2)
    exact = F.scaled_dot_product_attention(turned.double(), k.double(), v.double(), attn_mask=allow, enable_gqa=True)
    made = attend(turned, k, v, allow, tiling=tiling)
    assert (made.double() - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(attend(q.transpose(1, 2), k, v, allow, angle.cos(), angle.sin(), tiling), made)


@interpreted
def test_what_the_kernel_would_read_past_is_refused() -> None:
    from dllm_toolkit.ops.attention_triton import attend

    q, allow, angle = torch.randn(2, 1, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool), torch.ones(2, 16, 16)
    wrong: dict[str, tuple[Any, ...]] = {
        "allow.expand": (allow[:1],),
        "cos, sin": (allow, angle[:1], angle[:1]),
        "come together": (allow, angle),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            attend(q, q, q, *arguments)


@interpreted
def test_a_long_context_is_cut_into_more_parts() -> None:
    from dllm_toolkit.ops.attention_triton import tiling_for

    parts = [tiling_for(32, 64, slots, 128).parts for slots in (64, 528, 1100, 2048, 4352, 100_000)]
    assert parts == [1, 4, 5, 5, 8, 8]
    assert [tiling_for(heads, 64, 4352, 128).parts for heads in (28, 64, 512)] == [8, 4, 1]


@interpreted
def test_tilings_that_no_program_can_have() -> None:
    from dllm_toolkit.ops.attention_triton import Tiling

    wrong = {"lanes": (24, 1), "slots": (16, 1, 8), "parts": (16, 0), "warps": (16, 1, 16, 3), "stages": (16, 1, 16, 4, 0)}
    for name, given in wrong.items():
        with pytest.raises(ValueError, match=name):
            Tiling(*given)
