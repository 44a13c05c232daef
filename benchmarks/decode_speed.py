"""How fast does `decode()` run against the weights' time through the memory?

    python benchmarks/decode_speed.py                        LLaDA-8B's shape, random weights, one GPU: prompt 256, 256 new tokens
    python benchmarks/decode_speed.py --layers 2 --width 64 --heads 4 --mlp-width 128 --vocabulary 300 --prompt 20 --new-tokens 32 \\
        --block 8 --device cpu --eager                       a few seconds on any machine

Random weights commit random numbers of tokens, so acceptance is scripted: a commit rule takes the first `--accept` masked positions that
may be committed, whatever the model says of them. Everything else is the ordinary path: the same `decode()`, decoders and caches as in
any recipe.

    floor       bytes of the weights that a forward reads / bandwidth of a plain copy
    decode      whole generations, and the graphs that their steps are made of (replays.py: forward by lanes and reads, its products alone):
                d2f + block_causal, semi-AR + dual, + prefix, vanilla without cache, autoregressive
    batch       d2f by number of rows, `--requests` for each row, prompts and answers of unequal lengths: in batches, of which each waits
                for its slowest row, and with finished rows refilled (stream.py); what its recorded forwards take
    rows        whole generations of several rows whose answers are equally long: d2f, semi-AR + dual, autoregressive
    long        a prompt of `--long` tokens: the same three

`--weights fp8` (or int8) measures everything with the linear maps in 8 bits (models/eight_bit.py). A section that fails, for want of memory
for instance, has its error in its place, and the next one runs; with `--save` a run that is ended from outside leaves what it had in a
file *.partial. Each time is a median. Prints the machine, a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import finish, keep_so_far, save_option
from matmul_speed import bandwidth
from replays import forget, products, steps

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.autoregressive import NextToken
from dllm_toolkit.decoders.base import Commit, Decoder, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.models.eight_bit import quantise
from dllm_toolkit.models.transformer import Transformer, TransformerConfig
from dllm_toolkit.ops import attention as few_lanes
from dllm_toolkit.ops import parts
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.stream import decode_stream
from dllm_toolkit.types import Attention, Canvas


@dataclass(frozen=True)
class First(Commit):
    """Commit the first `count` positions that may be committed: an acceptance that does not depend on the weights."""

    count: int = 4

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        return region.eligible & (region.eligible.cumsum(1) <= self.count)


def scripted(schedule: Schedule, accept: int) -> Decoder:
    return BlockDecoder(schedule, First(accept), propose=Sample(suppress=("eos",)), stop=WhenFull())


def settings(options: argparse.Namespace) -> dict[str, tuple[Attention, Decoder, Cache]]:
    block, accept = options.block, options.accept
    semi = SemiAutoregressive(block)
    return {
        "d2f, block_causal": ("block_causal", scripted(Pipelined(block, add_at=0.1, activate_at=0.95), accept), BlockCausalCache()),
        "semi_ar, dual": ("full", scripted(semi, accept), DualCache()),
        "semi_ar, prefix": ("full", scripted(semi, accept), PrefixCache()),
        "vanilla, none": ("full", scripted(SemiAutoregressive(None), accept), NoCache()),
        "autoregressive, block_causal": ("causal", scripted(NextToken(), 1), BlockCausalCache()),
    }


def new_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The shape of LLaDA-8B, weights from a normal distribution."""
    vocabulary = options.vocabulary
    config = TransformerConfig(
        vocab_size=vocabulary, width=options.width, layers=options.layers, heads=options.heads, mlp_width=options.mlp_width,
        mask_id=vocabulary - 1, eos_ids=(vocabulary - 2,), pad_id=vocabulary - 2, max_positions=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    model.allocate(dtype, device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    return model.eval()


def prompts_of(options: argparse.Namespace, rows: int, seed: int) -> list[list[int]]:
    """Prompts up to `--prompt` tokens long; with several rows, of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [options.prompt] + [
        int(torch.randint(options.prompt // 2, options.prompt + 1, (1,), generator=generator)) for _ in range(rows - 1)
    ]
    return [torch.randint(0, options.vocabulary - 2, (length,), generator=generator).tolist() for length in lengths]


def generation(
    model: Transformer, attention: Attention, decoder: Decoder, cache: Cache, options: argparse.Namespace, rows: int
) -> dict[str, Any]:
    """Median tokens/s of whole generations, after the warm-up, and what they were made of."""
    place(model, attention, options)

    forget(model)

    def once(seed: int) -> Output:
        return decode(
            model, decoder, prompts_of(options, rows, seed), max_new_tokens=options.new_tokens, cache=cache, compile=options.compile
        )

    clock = time.perf_counter()
    once(0)
    once(1)
    warm_up = time.perf_counter() - clock
    outputs = [once(2 + number) for number in range(options.repeats)]
    seconds = statistics.median(output.stats.seconds for output in outputs)
    nfe = max(outputs[0].stats.nfe)
    tokens = sum(outputs[0].stats.commits)
    graphs = steps(model)
    shapes = [name for name in graphs["forward"] if name.count(", ") == 1 and options.weights is None]  # of whole batches, not flat
    alone = {name: products(model, *(rows * int(lanes) for lanes in name.split(", "))) for name in shapes}
    return {
        "rows": rows,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "forwards": nfe,
        "tokens_per_forward": round(tokens / sum(outputs[0].stats.nfe), 3),
        "ms_per_forward": round(seconds / nfe * 1e3, 3),
        "lanes_per_forward": round(outputs[0].stats.lanes[0] / nfe, 1),
        "warm_up_seconds": round(warm_up, 1),
        **({"graphs_ms": {**graphs, **({"products": alone} if alone else {})}} if graphs["forward"] else {}),
    }


def requests_of(options: argparse.Namespace, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts and answer lengths: both between a quarter of the options' and all of it, evenly. The same for every number of rows."""
    generator = torch.Generator().manual_seed(7)

    def between(most: int) -> int:
        return int(torch.randint(max(1, most // 4), most + 1, (1,), generator=generator))

    prompts = [torch.randint(0, options.vocabulary - 2, (between(options.prompt),), generator=generator).tolist() for _ in range(count)]
    lengths = [between(options.new_tokens) for _ in range(count)]
    # The longest of each is in every part, so that all canvases are of one length.
    prompts[0], lengths[0] = torch.randint(0, options.vocabulary - 2, (options.prompt,), generator=generator).tolist(), options.new_tokens
    return prompts, lengths


def throughput(
    model: Transformer, attention: Attention, decoder: Decoder, cache: Cache, options: argparse.Namespace, rows: int, refill: bool
) -> dict[str, Any]:
    """Tokens/s of many unequal requests through `rows` rows."""
    place(model, attention, options)
    forget(model)
    prompts, lengths = requests_of(options, rows * options.requests)
    arguments: dict[str, Any] = {"cache": cache, "compile": options.compile}

    def once() -> tuple[float, list[Output]]:
        if refill:
            made = [decode_stream(model, decoder, prompts, rows=rows, max_new_tokens=lengths, **arguments)]
        else:
            parts = [slice(first, first + rows) for first in range(0, len(prompts), rows)]
            made = [decode(model, decoder, prompts[part], max_new_tokens=lengths[part], **arguments) for part in parts]
        return sum(one.stats.seconds for one in made), made

    clock = time.perf_counter()
    once()
    warm_up = time.perf_counter() - clock
    timed_runs = [once() for _ in range(max(1, options.repeats // 2))]
    seconds = statistics.median(time for time, _ in timed_runs)
    outputs = timed_runs[0][1]
    tokens = sum(sum(one.stats.commits) for one in outputs)
    return {
        "rows": rows,
        "refill": refill,
        "requests": len(prompts),
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "tokens_per_forward_of_a_row": round(tokens / sum(sum(one.stats.nfe) for one in outputs), 3),
        "warm_up_seconds": round(warm_up, 1),
        **({"forward_ms": graphs} if (graphs := steps(model)["forward"]) else {}),
    }


def place(model: Transformer, attention: Attention, options: argparse.Namespace) -> None:
    """Give the model an attention rule, and the shift that goes with it."""
    model.with_attention(attention, options.block if attention == "block_causal" else None)
    model.config = _shifted(model, 1 if attention == "causal" else 0)


def _shifted(model: Transformer, shift: int) -> TransformerConfig:
    return replace(model.config, shift=shift)


def attempt(measured: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What is measured, or why it could not be."""
    try:
        return measured()
    except Exception as failure:  # a section that fails must not cost the others
        lines = str(failure).splitlines()
        return {"failed": f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("layers", 32), ("width", 4096), ("heads", 32), ("mlp-width", 12288), ("vocabulary", 126464), ("prompt", 256), ("new-tokens", 256),
        ("block", 32), ("accept", 4), ("repeats", 5), ("requests", 4), ("long", 4096),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of rows")
    parser.add_argument("--rows", type=int, nargs="*", default=[16], help="numbers of rows with answers of one length")
    parser.add_argument("--attention", choices=["products", "triton"], default=few_lanes.BEST, help="of few lanes")
    parser.add_argument("--products", choices=["library", "triton"], default=parts.BEST, help="of few lanes")
    cut = "cut narrow products (ops/parts.py)"
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=parts.ENABLED, help=cut)
    parser.add_argument("--weights", choices=["fp8", "int8"], default=None, help="linear maps in 8 bits")
    parser.add_argument("--only", nargs="*", default=None, help="of the section decode, such as 'd2f, block_causal'; none: skip it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", dest="compile", action="store_false")
    save_option(parser)
    options = parser.parse_args(arguments)
    few_lanes.use(options.attention)
    parts.use(options.products)
    parts.ENABLED = options.parts
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    gbps = bandwidth(device, 4 << 30 if device.type == "cuda" else 64 << 20, 10)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    with torch.inference_mode():
        model = new_model(options, device, dtype)
        if options.weights is not None:
            quantise(model, options.weights)
    stored = [*model.named_parameters(), *((key, one) for key, one in model.named_buffers() if not key.endswith(("cos", "sin")))]
    weights = sum(one.numel() * one.element_size() for key, one in stored if "embed" not in key)
    floor = weights / gbps / 1e6
    print(f"{name}, torch {torch.__version__}; a copy moves {gbps:.0f} GB/s; floor {floor:.2f} ms", file=sys.stderr)
    result: dict[str, Any] = {"benchmark": "decode_speed", "device": name, "torch": torch.__version__, "compile": options.compile}
    sizes = ("layers", "width", "heads", "mlp_width", "vocabulary", "prompt", "new_tokens", "block", "accept")
    result |= {"shape": {key: getattr(options, key) for key in sizes}}
    result |= {"copy_gbps": round(gbps), "weights_gb": round(weights / 1e9, 3), "floor_ms": round(floor, 3), "decode": {}, "batch": []}
    result |= {"weights": options.weights or options.dtype, "rows": [], "long": {}}
    for key, (attention, decoder, cache) in settings(options).items():
        if options.only is None or key in options.only:
            result["decode"][key] = attempt(partial(generation, model, attention, decoder, cache, options, 1), device)
            print(f"{key:30} {result['decode'][key]}", file=sys.stderr, flush=True)
            keep_so_far("decode_speed", result, options, device, options.weights)
    attention, decoder, cache = settings(options)["d2f, block_causal"]
    for rows in options.batch:
        for refill in (False, True):
            result["batch"].append(attempt(partial(throughput, model, attention, decoder, cache, options, rows, refill), device))
            print(f"batch {rows:4} {result['batch'][-1]}", file=sys.stderr, flush=True)
            keep_so_far("decode_speed", result, options, device, options.weights)
    three = ("d2f, block_causal", "semi_ar, dual", "autoregressive, block_causal")
    for rows in options.rows:
        for key in three:
            attention, decoder, cache = settings(options)[key]
            measured = attempt(partial(generation, model, attention, decoder, cache, options, rows), device)
            result["rows"].append({"generation": key, **measured})
            print(f"{rows:3} rows {key:22} {result['rows'][-1]}", file=sys.stderr, flush=True)
            keep_so_far("decode_speed", result, options, device, options.weights)
    long = argparse.Namespace(**{**vars(options), "prompt": options.long})
    for key in three if options.long else ():
        attention, decoder, cache = settings(options)[key]
        result["long"][key] = attempt(partial(generation, model, attention, decoder, cache, long, 1), device)
        print(f"long {key:25} {result['long'][key]}", file=sys.stderr, flush=True)
        keep_so_far("decode_speed", result, options, device, options.weights)
    return finish("decode_speed", result, options, device, options.weights)


if __name__ == "__main__":
    main()
