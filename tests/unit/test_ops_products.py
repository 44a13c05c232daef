"""Products of few lanes by the Triton kernel, in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/unit/test_ops_products.py          where Triton is installed; no GPU is needed
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from dllm_toolkit.ops import attention

pytestmark = pytest.mark.skipif(
    not attention.has_triton() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton, and TRITON_INTERPRET=1 from the start"
)


@pytest.mark.parametrize("lanes", [1, 16, 23])
@pytest.mark.parametrize("cut", [(16, 16, 1), (16, 32, 2), (32, 16, 4)], ids=str)
def test_parts_add_up_to_the_product(lanes: int, cut: tuple[int, int, int]) -> None:
    from dllm_toolkit.ops.products_triton import Tile, by_parts

    torch.manual_seed(0)
    x, weight = torch.randn(1, lanes, 192).half()[..., 64:], torch.randn(40, 128).half()  # lanes that are part of something wider
    made = by_parts(x, weight, Tile(*cut))
    assert made.shape == (cut[2], 1, lanes, 40) and made.dtype == (torch.float16 if cut[2] == 1 else torch.float32)
    exact = x.double() @ weight.double().T
    assert (made.sum(0).double() - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("lanes", [5, 16])
def test_gates_are_joined_as_two_products_would_be(lanes: int) -> None:
    from dllm_toolkit.ops.products_triton import Tile, gated

    torch.manual_seed(0)
    x, weight = torch.randn(lanes, 64).half(), torch.randn(2 * 24, 64).half()
    gate, up = (x.float() @ one.float().T for one in weight.chunk(2))
    exact = F.silu(gate) * up
    made = gated(x, weight, Tile(16, 32))
    assert made.shape == (lanes, 24) and (made.float() - exact).norm() / exact.norm() < 2e-3


def test_a_product_is_cut_to_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_toolkit.ops import parts, products_triton
    from dllm_toolkit.ops.products_triton import Tile

    room = 232_448
    monkeypatch.setattr(products_triton, "shared_memory", lambda _: room)
    monkeypatch.setattr(parts, "BEST", "triton")

    def tile(outputs: int, inputs: int, lanes: int = 64, whole: bool = False) -> Tile | None:
        return parts.tile_for(torch.empty(lanes, inputs, device="meta"), torch.empty(outputs, inputs, device="meta"), whole)

    assert tile(12288, 4096) == Tile(64, 128, 1, stages=3) and tile(4096, 12288) == Tile(64, 128, 2, stages=5)
    assert tile(24576, 4096, whole=True) == Tile(64, 64, 1, stages=4)
    assert tile(12288, 4096, lanes=65) is None, "not measured"
    assert tile(1024, 1024) is None, "too few tiles"
    assert tile(12288, 4100) is None and tile(4096, 4224) is None, "no whole steps"
    room = 101_376
    assert tile(4096, 12288) == Tile(64, 128, 2, stages=3) and tile(4096, 12288, lanes=16) == Tile(64, 128, 2, stages=4)
    room = 65_536
    assert tile(12288, 4096) is None
    room = 232_448
    monkeypatch.setattr(parts, "ENABLED", False)
    assert tile(4096, 12288) is None, "one part has too few tiles"


def test_what_does_not_fit_is_refused() -> None:
    from dllm_toolkit.ops.products_triton import Tile, by_parts, gated

    x, weight = torch.randn(2, 64).half(), torch.randn(32, 64).half()
    for message, call in {
        "multiple of 128": lambda: by_parts(x, weight, Tile(16, 64, 2)),
        "at most 128 lanes": lambda: by_parts(x.repeat(65, 1), weight, Tile(16, 64)),
        "dense rows": lambda: by_parts(x, torch.randn(64, 32).half().T, Tile(16, 64)),
        "two equal halves": lambda: gated(x, weight[:31], Tile(16, 64)),
        "parts=1": lambda: gated(x, weight, Tile(16, 32, 2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
