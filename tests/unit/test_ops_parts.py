"""Products cut along their inputs: the same sums, by as many parts as the machine has room for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dllm_toolkit.models.fused import at_once, in_parts, summed
from dllm_toolkit.ops import parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_add_up_to_the_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 48).to(dtype), torch.randn(7, 48).to(dtype)
    exact = x.double() @ weight.double().T
    for count in (1, 2, 4):
        made = parts.by_parts(x, weight, count)
        assert made.shape == (count, 2, 5, 7) and made.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.allclose(made.sum(0).double(), exact, rtol=1e-5, atol=1e-5)


def test_narrow_maps_are_cut_and_wide_ones_are_not() -> None:
    assert [parts.cuts(*shape) for shape in ((4096, 4096), (4096, 12288), (12288, 4096), (24576, 4096), (126464, 4096))] == [2, 2, 1, 1, 1]
    assert parts.cuts(256, 704) == 1  # nothing to gain where a part would be short
    assert parts.cuts(4096, 4096 + 2) == 2  # only whole parts


def test_nothing_is_cut_in_eager_code() -> None:
    one, x = nn.Linear(2048, 8, bias=False), torch.randn(3, 2048)
    with torch.no_grad():
        assert torch.equal(at_once(one, x), one(x)) and torch.equal(summed(in_parts(one, x), x.dtype), one(x))


def test_a_kernel_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "has_triton", lambda: False)
    monkeypatch.setattr(parts, "BEST", "library")
    with pytest.raises(ValueError, match="Triton is not installed, got kernel: triton"):
        parts.use("triton")
    assert parts.BEST == "library"
    parts.use("library")


def test_swiglu_joined_is_what_its_two_maps_say() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 48), torch.randn(14, 48)
    gate, up = (x @ half.T for half in weight.chunk(2))
    assert torch.allclose(parts.gated(x, weight), nn.functional.silu(gate) * up, atol=1e-5)
