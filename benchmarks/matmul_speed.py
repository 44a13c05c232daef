"""How close do the matrix products of one decoding step come to the memory's speed?

    python benchmarks/matmul_speed.py                        an 8B model's shapes on a GPU (16 GB of weights), 16 to 128 lanes
    python benchmarks/matmul_speed.py --layers 2 --width 64 --mlp-width 128 --vocabulary 300 --device cpu      a second on any machine

A step of few lanes reads every weight once and computes little, so its floor is bytes of weights over the bandwidth of a plain copy, both
measured here. Each variant runs all products of all layers, one after the other, on weights that differ from layer to layer (so that
no cache holds them), replayed as one CUDA graph where there is one:

    separate    seven products a layer, as a checkpoint stores them: q, k, v, o, gate, up, down
    fused       four products a layer: qkv, o, gate-up, down
    autotuned   `fused`, each compiled with torch.compile(mode="max-autotune-no-cudagraphs")
    int8        weight-only: int8 weights, a bf16 scale for each output row, compiled like `autotuned`
    fp8         weights and activations in float8_e4m3 with row-wise scales (torch._scaled_mm)

Every variant is checked against float32 products first (relative error below 2e-2, 6e-2 for 8 bits). Prints the machine, a table, and one
JSON line. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Output and input width of each fused product of a layer."""
    width, mlp = options.width, options.mlp_width
    return {"qkv": (3 * width, width), "o": (width, width), "gate_up": (2 * mlp, width), "down": (width, mlp)}


def parts_of(name: str, weight: Tensor) -> tuple[Tensor, ...]:
    """The separate weights that a fused one is made of."""
    count = {"qkv": 3, "gate_up": 2}.get(name, 1)
    return tuple(part.contiguous() for part in weight.chunk(count))


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale.squeeze(1).to(weight.dtype)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale.t().contiguous()  # [1, out]


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    own = x.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max  # [M, 1]
    narrow = (x / own).to(torch.float8_e4m3fn)
    return torch._scaled_mm(narrow, weight.t(), scale_a=own, scale_b=scale, out_dtype=x.dtype, use_fast_accum=True)


def build(variant: str, name: str, weight: Tensor, compiled: dict[str, Any]) -> tuple[Product, int]:
    """A product with this weight, and the bytes of weights that it reads."""
    if variant == "separate":
        pieces = parts_of(name, weight)
        return (lambda x: tuple(F.linear(x, piece) for piece in pieces)), weight.numel() * weight.element_size()
    if variant in ("fused", "autotuned"):
        run = F.linear if variant == "fused" else compiled.setdefault("linear", autotune(F.linear))
        return (lambda x: run(x, weight)), weight.numel() * weight.element_size()
    narrow, scale = (int8 if variant == "int8" else fp8)(weight)
    function = int8_linear if variant == "int8" else fp8_linear
    run = compiled.setdefault(variant, autotune(function))
    return (lambda x: run(x, narrow, scale)), narrow.numel()


def autotune(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def error(product: Product, x: Tensor, weight: Tensor) -> float:
    exact = x.float() @ weight.float().t()
    got = product(x)
    whole = torch.cat(got, 1) if isinstance(got, tuple) else got
    return float((whole.float() - exact).norm() / exact.norm())


def timed(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median milliseconds of `run`, as a CUDA graph on a GPU."""
    if device.type == "cpu":
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """GB/s of a plain copy, bytes read plus bytes written."""
    source = torch.randn(size // 2, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = timed(partial(run_all, [target.copy_], source), device, repeats)
    return 2 * source.numel() * 2 / milliseconds / 1e6


def measure(variant: str, options: argparse.Namespace, device: torch.device, gbps: float) -> list[dict[str, Any]]:
    """One row for each number of lanes."""
    made: dict[str, list[Product]] = {}
    compiled: dict[str, Any] = {}
    first: dict[str, Tensor] = {}
    read = 0
    for key, (outputs, inputs) in {**shapes(options), "head": (options.vocabulary, options.width)}.items():
        for _ in range(1 if key == "head" else options.layers):
            weight = (torch.randn(outputs, inputs, device=device) * 0.02).to(torch.bfloat16)
            product, size = build(variant, key, weight, compiled)
            made.setdefault(key, []).append(product)
            first.setdefault(key, weight)
            read += size
    rows = []
    for lanes in options.lanes:
        x = {key: torch.randn(lanes, weight.shape[1], device=device).to(torch.bfloat16) for key, weight in first.items()}
        worst = max(error(made[key][0], x[key], first[key]) for key in made)
        limit = 6e-2 if variant in ("int8", "fp8") else 2e-2
        if not worst < limit:
            raise SystemExit(f"{variant} is wrong at {lanes} lanes: relative error {worst:.3g}, limit {limit}")
        each = {key: timed(partial(run_all, made[key], x[key]), device, options.repeats) for key in made}
        total = sum(each.values())
        reached = read / total / 1e6
        rows.append(
            {
                "variant": variant, "lanes": lanes, "ms": round(total, 3), "weights_gb": round(read / 1e9, 3), "gbps": round(reached),
                "of_copy": round(reached / gbps, 3), "error": round(worst, 5), "each_ms": {key: round(one, 3) for key, one in each.items()},
            }
        )  # fmt: skip
        print(f"{variant:10} {lanes:4} lanes {total:8.3f} ms {reached:6.0f} GB/s  {rows[-1]['each_ms']}", file=sys.stderr, flush=True)
    return rows


def run_all(products: list[Product], x: Tensor) -> None:
    for product in products:
        product(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp-width", type=int, default=12288)
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--lanes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--variants", nargs="+", default=["separate", "fused", "autotuned", "int8", "fp8"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    gbps = bandwidth(device, 4 << 30 if device.type == "cuda" else 64 << 20, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}; a copy moves {gbps:.0f} GB/s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for variant in options.variants:
        try:
            rows += measure(variant, options, device, gbps)
        except RuntimeError as failure:  # a product that this machine or this torch does not have
            rows.append({"variant": variant, "failed": str(failure).splitlines()[0][:160]})
            print(f"{variant:10} failed: {rows[-1]['failed']}", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"benchmark": "matmul_speed", "device": name, "torch": torch.__version__, "copy_gbps": round(gbps), "rows": rows}))


if __name__ == "__main__":
    main()
