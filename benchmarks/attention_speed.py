"""Which attention is fastest for few lanes against a K/V buffer, with a mask of any shape?

    python benchmarks/attention_speed.py                     LLaDA-8B's heads on a GPU
    python benchmarks/attention_speed.py --heads 2 --head-dim 16 --layers 2 --device cpu --lanes 4 --slots 40 --batch 2

A step attends from W lanes to S slots under a dense mask that differs from row to row. Variants, all over the same buffers
[B, S, H, D] and replayed as one CUDA graph on a GPU, `--layers` times on different buffers:

    sdpa        scaled_dot_product_attention with a boolean mask, PyTorch's own choice of kernel
    efficient   the same, memory-efficient kernel only
    cudnn       the same, cuDNN's kernel only
    bias        scaled_dot_product_attention with an additive bf16 mask
    products    two batched products and a softmax, compiled
    triton      our own kernel (ops/attention_triton.py), where Triton is installed
    flex        flex_attention, compiled, the mask read from a tensor
    64x4        that kernel with tiles of so many lanes and slots in so many parts (`--tiles`)
    unmasked    scaled_dot_product_attention without a mask: the price of masking

The floor is the bytes of keys, values and mask over the bandwidth of a plain copy. Prints the machine, a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, save_option
from matmul_speed import bandwidth, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm_toolkit.ops.attention import few

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=allow.unsqueeze(1))


def with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, allow)


def bias(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    mask = torch.zeros(allow.shape, dtype=q.dtype, device=q.device).masked_fill(~allow, float("-inf"))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.unsqueeze(1))


def products(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    scores = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)).float() * q.shape[-1] ** -0.5  # [B, H, W, S]
    weights = scores.masked_fill(~allow.unsqueeze(1), float("-inf")).softmax(-1).to(v.dtype)
    return torch.matmul(weights, v.transpose(1, 2))


def own_kernel(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    return few("triton", q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allow.unsqueeze(1))


def tiled(tile: str, q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    from dllm_toolkit.ops.attention_triton import attend

    lanes, parts = map(int, tile.split("x"))
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allow.unsqueeze(1), (lanes, parts))


def flex(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def masked(score: Tensor, b: Tensor, h: Tensor, lane: Tensor, slot: Tensor) -> Tensor:
        return torch.where(allow[b, lane, slot], score, float("-inf"))

    return flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=masked)  # type: ignore[return-value]


def unmasked(q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def variants(device: torch.device, tiles: Sequence[str] = ()) -> dict[str, Attention]:
    found: dict[str, Attention] = {"sdpa": sdpa, "bias": torch.compile(bias, dynamic=False)}
    if device.type == "cuda":
        found["efficient"] = partial(with_backend, SDPBackend.EFFICIENT_ATTENTION)
        found["cudnn"] = partial(with_backend, SDPBackend.CUDNN_ATTENTION)
        found["flex"] = torch.compile(flex, dynamic=False)
        found["triton"] = torch.compile(own_kernel, dynamic=False)
        found |= {tile: partial(tiled, tile) for tile in tiles}
    found["products"] = torch.compile(products, dynamic=False)
    found["unmasked"] = unmasked
    return found


def run_all(attention: Attention, layers: list[tuple[Tensor, Tensor, Tensor]], allow: Tensor, _: None = None) -> None:
    for q, k, v in layers:
        attention(q, k, v, allow)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 32, 64, 128, 512])
    parser.add_argument("--slots", type=int, nargs="+", default=[528])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tiles", nargs="*", default=[], metavar="LANESxPARTS", help="of our own kernel, such as 64x4")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    save_option(parser)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 256
    gbps = bandwidth(device, 4 << 30 if device.type == "cuda" else 64 << 20, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}; a copy moves {gbps:.0f} GB/s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        for slots in options.slots:
            for lanes in options.lanes:
                shape = (options.heads, options.head_dim)
                made = [
                    tuple(torch.randn(batch, count, *shape, device=device).to(torch.bfloat16) for count in (lanes, slots, slots))
                    for _ in range(options.layers)
                ]
                allow = torch.rand(batch, lanes, slots, device=device) > 0.3
                allow[:, :, 0] = True
                exact = sdpa(*(one.float() for one in made[0]), allow)  # type: ignore[call-arg, misc]
                floor = (2 * made[0][1].numel() * 2 + allow.numel()) / gbps / 1e3  # microseconds a layer
                row: dict[str, Any] = {"batch": batch, "slots": slots, "lanes": lanes, "floor_us": round(floor, 2), "us_a_layer": {}}
                for key, attention in variants(device, options.tiles).items():
                    try:
                        got = attention(*made[0], allow)  # type: ignore[call-arg, misc]
                        error = float((got.float() - exact).norm() / exact.norm())
                        if key != "unmasked" and not error < 2e-2:
                            raise SystemExit(f"{key} is wrong: relative error {error:.3g}")
                        spent = timed(partial(run_all, attention, made, allow), device, options.repeats)  # type: ignore[arg-type]
                        row["us_a_layer"][key] = round(spent / options.layers * 1e3, 2)
                    except RuntimeError as failure:
                        row["us_a_layer"][key] = f"failed: {str(failure).splitlines()[0][:80]}"
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    result = {"benchmark": "attention_speed", "device": name, "torch": torch.__version__, "copy_gbps": round(gbps), "rows": rows}
    return finish("attention_speed", result, options, device)


if __name__ == "__main__":
    main()
