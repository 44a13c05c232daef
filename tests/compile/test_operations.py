"""Operations that torch traces. Not in the other tests of ops: shape checks wrap functions, and tracing refuses to look through them."""

from __future__ import annotations

import torch
import torch._dynamo
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from dllm_toolkit.ops import score
from dllm_toolkit.ops.masks import answer_blocks, block_causal
from dllm_toolkit.ops.tiles import block_causal_tiles


def test_margin_is_one_graph() -> None:
    logits = torch.randn(1, 3, 17)
    compiled = torch.compile(score.margin, fullgraph=True, backend="eager")(logits)
    torch.testing.assert_close(compiled, score.margin(logits), rtol=0, atol=1e-6)
    torch._dynamo.reset()


def test_flex_attention_over_tiles_equals_attention_under_the_dense_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    block = answer_blocks(torch.tensor([5, 30]), 44, 8)
    q, k, v = (torch.randn(2, heads, 44, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    got = flex_attention(q, k, v, block_mask=block_causal_tiles(block, 16), enable_gqa=True)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=block_causal(block).unsqueeze(1), enable_gqa=True)
    assert torch.allclose(got, expected, atol=1e-12)  # type: ignore[arg-type]
