"""Which attention is fastest for few lanes against a K/V buffer, with a mask of any shape?

    python benchmarks/attention_speed.py                     LLaDA-8B's heads on a GPU
    python benchmarks/attention_speed.py --heads 2 --head-dim 16 --layers 2 --device cpu --lanes 4 --slots 40 --batch 2
    python benchmarks/attention_speed.py --tune --lanes 64 --batch 1     tilings of our own kernel

A step attends from W lanes to S slots under a dense mask that differs from row to row. Variants, all over the same buffers
[B, S, H, D] and replayed as one CUDA graph on a GPU, `--layers` times on different buffers:

    sdpa        scaled_dot_product_attention with a boolean mask, PyTorch's own choice of kernel
    efficient   the same, memory-efficient kernel only
    cudnn       the same, cuDNN's kernel only
    bias        scaled_dot_product_attention with an additive bf16 mask
    products    two batched products and a softmax, compiled
    triton      our own kernel (ops/attention_triton.py), where Triton is installed
    flex        flex_attention, compiled, the mask read from a tensor
    64x4        that kernel with its work cut in a way of your own (`--tiles`), such as 64x4 or 64x4x128x8x2: lanes of a tile, parts of
                the slots at most; and, if given, slots of a block, warps, stages
    unmasked    scaled_dot_product_attention without a mask: the price of masking

The floor is the bytes of keys, values and mask over the bandwidth of a plain copy. Prints the machine, a table, and one JSON line.

`--tune` measures some thirty tilings of our own kernel instead, sorted by time, launched directly and never compiled by PyTorch. The kernel
rotates the queries then (`rotate+`); the five fastest are measured without that too. What does not run or is wrong has its reason in the
table.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, save_option
from matmul_speed import bandwidth, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm_toolkit.ops.attention import few, has_triton

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


def tiling_of(text: str) -> Any:
    """`64x4`, `64x4x128`, ... as a Tiling."""
    from dllm_toolkit.ops.attention_triton import Tiling

    numbers = text.split("x")
    if not 2 <= len(numbers) <= 5 or not all(one.isdigit() for one in numbers):
        raise SystemExit(f"a tiling is LANESxPARTS[xSLOTS[xWARPS[xSTAGES]]], got {text}. Write 64x4, or 64x4x128x8x2.")
    try:
        return Tiling(*map(int, numbers))
    except ValueError as error:
        raise SystemExit(f"{text}: {error}") from None


def tiled(tile: str, q: Tensor, k: Tensor, v: Tensor, allow: Tensor) -> Tensor:
    from dllm_toolkit.ops.attention_triton import attend

    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allow.unsqueeze(1), tiling=tiling_of(tile))


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


def grid(lanes: int, batch: int, heads: int) -> list[str]:
    """What is worth measuring for a shape. Keys in flight (slots x stages) differ most, so they are varied most."""
    if lanes <= 16:
        wide, narrow = 16, None
    else:
        wide, narrow = (64, 32) if lanes > 32 else (32, 16)
    found = []
    for parts in (1, 2, 4, 8) if batch * heads * -(-lanes // wide) <= 132 else (1, 2):
        for block in ("32x4x3", "32x4x4", "64x4x2", "64x4x3", "64x8x3", "128x8x2"):
            if parts < 8 or not block.startswith("128"):  # 528 slots have four such blocks
                found.append(f"{wide}x{parts}x{block}")
    found += [f"{wide}x1x64x4x4", f"{wide}x1x64x8x4", f"{wide}x4x128x4x2", f"{wide}x4x32x4x5"]
    if narrow is not None:
        found += [f"{narrow}x{parts}x64x4x{stages}" for parts in (1, 2, 4) for stages in (3, 4)]
    return found


def tune(options: argparse.Namespace, device: torch.device, batch: int, slots: int, lanes: int) -> dict[str, Any]:
    """Every tiling of the grid on one shape, `--layers` launches in a graph: microseconds a layer, or why there are none."""
    from dllm_toolkit.models.transformer import rotate
    from dllm_toolkit.ops.attention_triton import attend

    heads, size = options.heads, options.head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # Triton's interpreter has no product in bf16
    q = torch.randn(batch, lanes, 3 * heads * size, device=device).to(dtype)[..., : heads * size]  # as a fused product leaves it
    q = q.unflatten(-1, (heads, size)).transpose(1, 2)
    shape = (batch, slots, heads, size)
    stores = [tuple(torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(2)) for _ in range(options.layers)]
    allow = torch.rand(batch, 1, lanes, slots, device=device) > 0.3
    allow[..., 0] = True
    angle = torch.rand(batch, lanes, size // 2, device=device) * 6
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    turned = rotate(q.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)).transpose(1, 2)
    exact = [F.scaled_dot_product_attention(one.float(), *(other.float() for other in stores[0]), attn_mask=allow) for one in (q, turned)]
    spent: dict[str, float] = {}
    failed: dict[str, str] = {}

    def once(text: str, rotated: bool, store: tuple[Tensor, ...]) -> Tensor:
        return attend(q, store[0], store[1], allow, cos if rotated else None, sin if rotated else None, tiling_of(text))

    def layers(text: str, rotated: bool) -> None:
        for store in stores:
            once(text, rotated, store)

    def measured(text: str, rotated: bool) -> None:
        name = f"rotate+{text}" if rotated else text
        try:
            error = float((once(text, rotated, stores[0]).float() - exact[rotated]).norm() / exact[rotated].norm())
            if not error < 2e-2:
                raise RuntimeError(f"relative error {error:.3g}")
            spent[name] = round(timed(partial(layers, text, rotated), device, options.repeats) / options.layers * 1e3, 2)
        except Exception as failure:  # out of shared memory, a compiler's error: the next one may run
            failed[name] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:80]}"

    texts = options.tiles or grid(lanes, batch, heads)
    if device.type == "cuda":  # compiling is what takes the time, and threads share it; what fails here fails again below
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for one in [pool.submit(once, text, True, stores[0]) for text in texts]:
                one.exception()
        torch.cuda.synchronize()
    for text in texts:
        measured(text, True)
    for name in sorted(spent, key=lambda one: spent[one])[:5]:
        measured(name.removeprefix("rotate+"), False)
    ordered = dict(sorted(spent.items(), key=lambda one: one[1]))
    return {"batch": batch, "slots": slots, "lanes": lanes, "us_a_layer": ordered, "failed": failed}


def tuned(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`tune` on every shape, printed as it goes."""
    if not has_triton():
        raise SystemExit("Triton is not installed, and --tune measures its kernel. It comes with PyTorch's builds for CUDA.")
    rows = []
    for batch, slots, lanes in product(options.batch, options.slots, options.lanes):
        rows.append(tune(options, device, batch, slots, lanes))
        print(f"batch {batch}, {slots} slots, {lanes} lanes: us a layer", file=sys.stderr)
        for name, value in (*rows[-1]["us_a_layer"].items(), *rows[-1]["failed"].items()):
            print(f"  {name:<28} {value}", file=sys.stderr, flush=True)
    return finish("attention_speed", {"rows": rows}, options, device, variant="tune")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 32, 64, 128, 512])
    parser.add_argument("--slots", type=int, nargs="+", default=[528])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tiles", nargs="*", default=[], metavar="TILING", help="of our own kernel, such as 64x4 or 64x4x128x8x2")
    parser.add_argument("--tune", action="store_true", help="measure tilings of our own kernel (those of --tiles, if any) and nothing else")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    save_option(parser)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    for text in options.tiles:
        tiling_of(text)
    if options.tune:
        return tuned(options, device)
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
