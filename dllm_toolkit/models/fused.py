"""Linear maps that read the same input, as one product: q, k and v; gate and up.

One wide product reads the weights faster than several narrow ones and starts fewer kernels. The maps keep their names: their weights
become views of one tensor, so checkpoints, adapters and optimisers see what they always saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_toolkit.models.eight_bit import QuantisedLinear
from dllm_toolkit.ops import parts


def fused(maps: Sequence[nn.Module]) -> nn.Module | None:
    """One map for several, or None where they do not fit: an adapter in the place of one, or a bias beside one that has none.

    Changes where the weights of `maps` lie, not what they are.
    """
    if any(_hooked(one) for one in maps):
        return None
    with torch.inference_mode(False), torch.no_grad():  # the weights must stay trainable, whoever decodes
        return _whole(maps)


def _whole(maps: Sequence[nn.Module]) -> nn.Module | None:
    if all(type(one) is QuantisedLinear for one in maps):
        return _fused_bits([one for one in maps if isinstance(one, QuantisedLinear)])
    linear = [one for one in maps if type(one) is nn.Linear and type(one.weight) is nn.Parameter]  # no shard, no computed weight
    if len(linear) != len(maps) or len({one.bias is None for one in linear}) != 1 or len({one.weight.requires_grad for one in linear}) != 1:
        return None
    weight = _laid_out([one.weight for one in linear])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    biases = [one.bias for one in linear if one.bias is not None]
    if biases:
        whole.bias = nn.Parameter(_laid_out(biases), requires_grad=False)
    return whole


def intact(whole: nn.Module, maps: Sequence[nn.Module]) -> bool:
    """Is the map still what these are? Not after one got another tensor (`load_state_dict(assign=True)`, `.data =`) or a hook."""
    first = 0
    for one in maps:
        if _hooked(one) or type(one) is not type(whole):
            return False
        for mine, theirs in zip(_tensors(whole), _tensors(one), strict=True):
            if mine is None or theirs is None:
                if mine is not theirs:
                    return False
            elif theirs.dtype != mine.dtype or theirs.data_ptr() != mine.data_ptr() + first * mine.stride(0) * mine.element_size():
                return False
        first += int(one.out_features)  # type: ignore[arg-type]
    return True


def _tensors(one: Any) -> tuple[Tensor | None, ...]:
    return (one.weight, one.bias) if isinstance(one, nn.Linear) else (one.bits, one.scale, one.bias)


def _hooked(one: nn.Module) -> bool:
    return bool(one._forward_hooks or one._forward_pre_hooks)


def _fused_bits(maps: Sequence[QuantisedLinear]) -> QuantisedLinear | None:
    if len({(one.format, one.kernel, one.bias is None) for one in maps}) != 1:
        return None
    whole = QuantisedLinear.fused(maps, maps[0].format, maps[0].kernel)
    first = 0
    for one in maps:
        last = first + one.out_features
        one.bits, one.scale = whole.bits[first:last], whole.scale[first:last]
        if whole.bias is not None:
            one.bias = whole.bias[first:last]
        first = last
    return whole


def _laid_out(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one behind the other; each becomes a view of its part."""
    whole = torch.cat([one.detach() for one in tensors])
    first = 0
    for one in tensors:
        one.data = whole[first : first + one.shape[0]]
        first += one.shape[0]
    return whole


def together(x: Tensor, whole: nn.Module | None, *maps: nn.Module) -> tuple[Tensor, ...]:
    """What each map says of x [..., K]: by one product where there is one and nobody wants gradients."""
    if whole is None or torch.is_grad_enabled() or not (torch.compiler.is_compiling() or intact(whole, maps)):
        return tuple(one(x) for one in maps)
    widths = [int(one.out_features) for one in maps]  # type: ignore[arg-type]
    return tuple(at_once(whole, x).split(widths, dim=-1))


def gated(x: Tensor, whole: nn.Module | None, gate: nn.Module, up: nn.Module) -> Tensor:
    """silu of what `gate` says of x [..., K], times what `up` says. whole: both as one map."""
    if whole is not None and _own(whole):
        return parts.gated(x, whole.weight)  # type: ignore[arg-type]
    gates, ups = together(x, whole, gate, up)
    return F.silu(gates) * ups


def in_parts(one: nn.Module, x: Tensor) -> Tensor:
    """What a map says of x [..., K], as terms of a sum [P, ..., M]: one term, or more where that is faster (ops/parts.py)."""
    return parts.terms(x, one.weight) if _own(one) else one(x).unsqueeze(0)  # type: ignore[arg-type]


def no_parts(one: nn.Module, x: Tensor) -> Tensor:
    """Zeros in the form of `in_parts` of a map that gives tensors like x."""
    count = parts.parts_for(x, one.weight) if _own(one) else 1  # type: ignore[arg-type]
    return x.new_zeros(count, *x.shape, dtype=x.dtype if count == 1 else torch.promote_types(x.dtype, torch.float32))


def summed(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of such terms, in the type of the stream."""
    return terms.squeeze(0) if terms.shape[0] == 1 else terms.sum(0).to(dtype)


def at_once(one: nn.Module, x: Tensor) -> Tensor:
    """The same as a whole."""
    return summed(in_parts(one, x), x.dtype) if _own(one) else one(x)


def _own(one: nn.Module) -> bool:
    """May a compiled layer multiply by this map's weight in its own way? Not where the map is more than that, or gradients are wanted."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return type(one) is nn.Linear and one.bias is None and type(one.weight) is nn.Parameter and not _hooked(one)
