"""How close do the matrix products of one decoding step come to the memory's speed, in bf16 and in 8 bits?

    python benchmarks/matmul_speed.py                        an 8B model's shapes on a GPU (16 GB of weights), 16 to 128 lanes
    python benchmarks/matmul_speed.py --tiles                and every tile of the 8-bit Triton kernel on every shape
    python benchmarks/matmul_speed.py --variants --kernels --cuts       the bf16 Triton kernel in every way to cut it, beside the library
    python benchmarks/matmul_speed.py --layers 2 --width 128 --mlp-width 256 --vocabulary 256 --device cpu --eager     seconds anywhere

A step of few lanes reads every weight once and computes little, so its floor is bytes of weights over the bandwidth of a plain copy, both
measured here. All weights differ from layer to layer, so that no cache holds them; on a GPU everything is replayed as one CUDA graph.

Products alone, bf16:

    separate    seven products a layer, as a checkpoint stores them: q, k, v, o, gate, up, down
    fused       four products a layer: qkv, o, gate-up, down
    autotuned   `fused`, each compiled with torch.compile(mode="max-autotune-no-cudagraphs"); searches for minutes, so only when it is named
    parts4      `fused`, each cut along its inputs into that many products, whose sum is left to what comes next (ops/parts.py); any number

Layers without attention (norm, qkv, o, norm, gate-up, SwiGLU, down) and the LM head, one compiled function for each, as a forward has them:
what quantising the activations costs is in there, fused with the norms as far as the compiler can.

    bf16               exact weights
    scaled_mm, ...     the kernels of ops/eight_bit.py, by name; `triton_weights_fp8` is the weight-only kernel on e4m3 weights

A candidate that a machine does not have, that is wrong or that takes longer than --seconds to compile and run has its reason in the table.
Relative errors against float32 must be below 2e-2 for products in bf16, and 1e-1 for what a layer adds. Prints the machine, a table, and
one JSON line. Times are medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from common import finish, save_option
from replays import seconds_of
from torch import Tensor

from dllm_toolkit.ops import eight_bit
from dllm_toolkit.ops.parts import by_parts

Product = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
KERNELS = ["bf16", "scaled_mm", "scaled_mm_whole", "triton_fp8", "triton_weights", "triton_weights_fp8", "int_mm", "int8_formula"]


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Output and input width of each fused product of a layer."""
    width, mlp = options.width, options.mlp_width
    return {"qkv": (3 * width, width), "o": (width, width), "gate_up": (2 * mlp, width), "down": (width, mlp)}


def parts_of(name: str, weight: Tensor) -> tuple[Tensor, ...]:
    """The separate weights that a fused one is made of."""
    count = {"qkv": 3, "gate_up": 2}.get(name, 1)
    return tuple(part.contiguous() for part in weight.chunk(count))


def build(variant: str, name: str, weight: Tensor, compiled: dict[str, Any]) -> tuple[Product, int]:
    """A product with this weight, and the bytes of weights that it reads."""
    if variant == "separate":
        pieces = parts_of(name, weight)
        return (lambda x: tuple(F.linear(x, piece) for piece in pieces)), weight.numel() * weight.element_size()
    if variant.startswith("parts"):
        count = int(variant.removeprefix("parts"))
        return (lambda x: by_parts(x, weight, count)), weight.numel() * weight.element_size()
    run = F.linear if variant == "fused" else compiled.setdefault("linear", autotune(F.linear))
    return (lambda x: run(x, weight)), weight.numel() * weight.element_size()


def autotune(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def error(product: Product, x: Tensor, weight: Tensor) -> float:
    exact = x.float() @ weight.float().t()
    got = product(x)
    whole = torch.cat(got, 1) if isinstance(got, tuple) else got if got.ndim == 2 else got.sum(0)
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
    if device.type == "cuda":  # not as a graph: there a copy is another, slower operation
        milliseconds = 1e3 * seconds_of(partial(target.copy_, source), repeats)
    else:
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
        if not worst < 2e-2:
            raise RuntimeError(f"wrong at {lanes} lanes: relative error {worst:.3g}, limit 0.02")
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


Weights = tuple[Tensor, Tensor]  # numbers [N, K], scale [N]


def exact(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight)


def layer_of(product: Callable[..., Tensor], width: int) -> Callable[..., Tensor]:
    """A layer without attention: its values, as if every lane saw itself alone, go into `o`."""

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (width,), None, 1e-5).to(x.dtype)

    def layer(x: Tensor, qkv: Weights, o: Weights, gate_up: Weights, down: Weights) -> Tensor:
        x = x + product(product(norm(x), *qkv)[:, 2 * width :].contiguous(), *o)
        gate, up = product(norm(x), *gate_up).chunk(2, -1)
        return x + product(F.silu(gate) * up, *down)

    return layer


def head_of(product: Callable[..., Tensor], width: int) -> Callable[..., Tensor]:
    return lambda x, head: product(F.rms_norm(x.float(), (width,), None, 1e-5).to(x.dtype), *head)


def kernel_of(name: str) -> tuple[Callable[..., Tensor], eight_bit.Format | None]:
    """A product (x, numbers, scale) and the format of its weights."""
    if name == "bf16":
        return exact, None
    if name == "triton_weights_fp8":
        return eight_bit.KERNELS["triton_weights"], "fp8"
    return eight_bit.KERNELS[name], "fp8" if "fp8" in name or name.startswith("scaled_mm") else "int8"


def stored(weight: Tensor, format: eight_bit.Format | None) -> Weights:
    if format is None:
        return weight, torch.ones(weight.shape[0], device=weight.device)
    numbers, scale = eight_bit.quantise(weight, format)
    return numbers, scale.squeeze(-1)


def measure_layers(name: str, options: argparse.Namespace, device: torch.device, gbps: float) -> Iterator[dict[str, Any]]:
    """All layers and the head with one kernel: a row for each number of lanes."""
    product, format = kernel_of(name)
    began = time.perf_counter()

    def new(outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, device=device) * 0.02).to(torch.bfloat16)

    whole = [new(*shape) for shape in shapes(options).values()]
    first = [stored(weight, format) for weight in whole]
    layers = [first] + [[stored(new(*shape), format) for shape in shapes(options).values()] for _ in range(options.layers - 1)]
    head = stored(new(options.vocabulary, options.width), format)
    read = sum(numbers.numel() * numbers.element_size() for weights in [*layers, [head]] for numbers, _ in weights)
    compile = (lambda function: torch.compile(function, fullgraph=True, dynamic=False)) if options.compile else (lambda function: function)
    run_layer, run_head = compile(layer_of(product, options.width)), compile(head_of(product, options.width))
    reference = layer_of(exact, options.width)
    for lanes in options.lanes:
        if time.perf_counter() - began > options.seconds:
            raise RuntimeError(f"stopped before {lanes} lanes: {time.perf_counter() - began:.0f} s so far, --seconds {options.seconds}")
        x = torch.randn(lanes, options.width, device=device).to(torch.bfloat16)
        right = reference(x.float(), *((weight.float(), weight) for weight in whole)) - x.float()
        wrong = float((run_layer(x, *first).float() - x.float() - right).norm() / right.norm())
        if not wrong < 1e-1:
            raise RuntimeError(f"wrong at {lanes} lanes: relative error {wrong:.3g}, limit 0.1")

        def every(x: Tensor = x) -> None:
            for weights in layers:
                x = run_layer(x, *weights)
            run_head(x, head)

        total = timed(every, device, options.repeats)
        alone = timed(partial(run_head, x, head), device, options.repeats)
        yield {
            "kernel": name, "lanes": lanes, "ms": round(total, 3), "head_ms": round(alone, 3), "weights_gb": round(read / 1e9, 3),
            "floor_ms": round(read / gbps / 1e6, 3), "gbps": round(read / total / 1e6), "of_copy": round(read / total / 1e6 / gbps, 3),
            "error": round(wrong, 5), "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip


def measure_tiles(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every tile of the Triton kernel on every shape, the activations in 8 bits already."""
    from dllm_toolkit.ops.eight_bit_triton import TILES, cuts, product

    began = time.perf_counter()
    for key, (outputs, inputs) in {**shapes(options), "head": (options.vocabulary, options.width)}.items():
        weight = (torch.randn(outputs, inputs, device=device) * 0.02).to(torch.bfloat16)
        for kind in ("int8 weights", "fp8 weights", "fp8"):
            numbers, scale = stored(weight, "int8" if kind == "int8 weights" else "fp8")
            copies = [numbers.clone() for _ in range(max(2, (128 << 20) // numbers.numel()))]  # more than a cache holds
            for lanes in options.lanes:
                x = torch.randn(lanes, inputs, device=device).to(torch.bfloat16)
                x, own = eight_bit.quantise(x, "fp8") if kind == "fp8" else (x, None)
                for number, tile in enumerate(TILES):
                    if time.perf_counter() - began > options.seconds:
                        return
                    row = {"shape": key, "kind": kind, "lanes": lanes, "tile": number}
                    try:
                        run = [partial(product, x, one, scale, own, torch.bfloat16, tile) for one in copies]
                        each = timed(partial(call_all, run), device, options.repeats) / len(copies)
                        row |= {"parts": cuts(outputs, inputs, tile), "us": round(each * 1e3, 1)}
                        row |= {"gbps": round(numbers.numel() / each / 1e6)}
                    except Exception as failure:
                        row["failed"] = reason(failure)
                    yield row


def cuts_of(inputs: int, joined: bool) -> Iterator[Any]:
    """Ways to cut a product for the bf16 kernel; joined: two maps as one, in one part."""
    from dllm_toolkit.ops.products_triton import Tile

    for outputs, step, warps, stages in (
        (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 5), (128, 64, 4, 4), (128, 64, 4, 8), (128, 64, 8, 4),
        (128, 128, 8, 2), (128, 128, 8, 4), (256, 64, 8, 4), (256, 64, 8, 5),
    ):  # fmt: skip
        for parts in (1,) if joined else (1, 2, 4):
            if inputs % (step * parts) == 0 and inputs // (step * parts) >= 4:
                yield Tile(outputs // 2 if joined else outputs, step, parts, warps, stages)


def measure_cuts(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds of one product of each shape: the library's, in two parts, and the bf16 Triton kernel's. `swiglu`: gate, up, joined."""
    from dllm_toolkit.ops import products_triton

    began = time.perf_counter()
    join = torch.compile(lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1], dynamic=False)
    for key, (outputs, inputs) in {**shapes(options), "swiglu": (2 * options.mlp_width, options.width)}.items():
        weights = [(torch.randn(outputs, inputs, device=device) * 0.02).to(torch.bfloat16)]
        weights += [weights[0].clone() for _ in range((256 << 20) // (2 * weights[0].numel()))]  # more than a cache holds
        joined = key == "swiglu"
        for lanes in options.lanes:
            x = torch.randn(lanes, inputs, device=device).to(torch.bfloat16)
            right = x.float() @ weights[0].float().T
            right = F.silu(right[:, : outputs // 2]) * right[:, outputs // 2 :] if joined else right
            ways: dict[str, Callable[[Tensor], Tensor]] = {}
            if joined:
                ways["library"] = lambda weight, x=x: join(F.linear(x, weight)).unsqueeze(0)
            else:
                ways["library"] = lambda weight, x=x: F.linear(x, weight).unsqueeze(0)
                ways["library, 2 parts"] = lambda weight, x=x: by_parts(x, weight, 2)
            for tile in cuts_of(inputs, joined):
                if joined:
                    ways[str(tile)] = lambda weight, x=x, tile=tile: products_triton.gated(x, weight, tile).unsqueeze(0)
                else:
                    ways[str(tile)] = lambda weight, x=x, tile=tile: products_triton.by_parts(x, weight, tile)
            for name, way in ways.items():
                if time.perf_counter() - began > options.seconds:
                    return
                row: dict[str, Any] = {"shape": key, "lanes": lanes, "way": name}
                try:
                    wrong = float((way(weights[0]).sum(0).float() - right).norm() / right.norm())
                    if not wrong < 2e-2:
                        raise RuntimeError(f"wrong: relative error {wrong:.3g}, limit 0.02")
                    each = timed(partial(call_all, [partial(way, one) for one in weights]), device, options.repeats) / len(weights)
                    row |= {"us": round(each * 1e3, 2), "gbps": round(2 * outputs * inputs / each / 1e6)}
                except Exception as failure:
                    row["failed"] = reason(failure)
                yield row


def call_all(functions: list[Callable[[], Tensor]]) -> None:
    for function in functions:
        function()


def reason(failure: Exception) -> str:
    lines = str(failure).splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp-width", type=int, default=12288)
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--lanes", type=int, nargs="+", default=[16, 32, 64, 128])
    variants = "products alone: separate, fused, autotuned, parts2, parts4, ..."
    parser.add_argument("--variants", nargs="*", default=["separate", "fused"], help=variants)
    parser.add_argument("--kernels", nargs="*", default=KERNELS, help="of whole layers")
    parser.add_argument("--tiles", action="store_true", help="also every tile of the Triton kernel")
    parser.add_argument("--cuts", action="store_true", help="the bf16 Triton kernel, in every way to cut it")
    parser.add_argument("--seconds", type=float, default=60, help="the most that one kernel may take, compilation included")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--eager", dest="compile", action="store_false", help="do not compile layers")
    save_option(parser)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    gbps = bandwidth(device, 4 << 30 if device.type == "cuda" else 16 << 20, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}; a copy moves {gbps:.0f} GB/s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for variant in options.variants:
        try:
            rows += measure(variant, options, device, gbps)
        except Exception as failure:  # whatever this machine or this torch does not have is a result too
            rows.append({"variant": variant, "failed": reason(failure)})
            print(f"{variant:10} failed: {rows[-1]['failed']}", file=sys.stderr, flush=True)
        release(device)
    with torch.inference_mode():
        for kernel in options.kernels:
            try:
                for row in measure_layers(kernel, options, device, gbps):
                    layers.append(row)
                    print(f"{kernel:20} {row['lanes']:4} lanes {row['ms']:8.3f} ms  {row}", file=sys.stderr, flush=True)
            except Exception as failure:
                layers.append({"kernel": kernel, "failed": reason(failure)})
                print(f"{kernel:20} failed: {layers[-1]['failed']}", file=sys.stderr, flush=True)
            release(device)
        tiles: list[dict[str, Any]] = []
        for wanted, measured in ((options.tiles, measure_tiles), (options.cuts, measure_cuts)):
            try:
                for row in measured(options, device) if wanted else ():
                    tiles.append(row)
                    print(f"tile {row}", file=sys.stderr, flush=True)
            except Exception as failure:
                tiles.append({"failed": reason(failure)})
    result = {
        "benchmark": "matmul_speed", "device": name, "torch": torch.__version__, "copy_gbps": round(gbps), "rows": rows, "layers": layers,
        "tiles": tiles,
    }  # fmt: skip
    return finish("matmul_speed", result, options, device)


def release(device: torch.device) -> None:
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
