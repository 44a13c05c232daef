"""How fast does `decode()` run against the weights' time through the memory?

    python benchmarks/decode_speed.py                        LLaDA-8B's shape, random weights, one GPU: prompt 256, 256 new tokens
    python benchmarks/decode_speed.py --layers 2 --width 64 --heads 4 --mlp-width 128 --vocabulary 300 --prompt 20 --new-tokens 32 \\
        --block 8 --device cpu --eager                       a few seconds on any machine

Random weights commit random numbers of tokens, so acceptance is scripted: a commit rule takes the first `--accept` masked positions that
may be committed, whatever the model says of them. Everything else is the ordinary path: the same `decode()`, decoders and caches as in
any recipe.

    floor       bytes of the weights that a forward reads / bandwidth of a plain copy
    decode      whole generations: d2f + block_causal, semi-AR + dual, + prefix, vanilla without cache, autoregressive
    batch       d2f by batch size, rows of unequal prompts

Each time is a median. Prints the machine, a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from matmul_speed import bandwidth

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import Output, decode
from dllm_toolkit.decoders.autoregressive import NextToken
from dllm_toolkit.decoders.base import Commit, Decoder, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.models.transformer import Transformer, TransformerConfig
from dllm_toolkit.state import Proposal, Region, State
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
    model.with_attention(attention, options.block if attention == "block_causal" else None)
    model.config = _shifted(model, 1 if attention == "causal" else 0)

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
    return {
        "rows": rows,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "forwards": nfe,
        "tokens_per_forward": round(tokens / sum(outputs[0].stats.nfe), 3),
        "ms_per_forward": round(seconds / nfe * 1e3, 3),
        "lanes_per_forward": round(outputs[0].stats.lanes[0] / nfe, 1),
        "warm_up_seconds": round(warm_up, 1),
    }


def _shifted(model: Transformer, shift: int) -> TransformerConfig:
    from dataclasses import replace

    return replace(model.config, shift=shift)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("layers", 32), ("width", 4096), ("heads", 32), ("mlp-width", 12288), ("vocabulary", 126464), ("prompt", 256), ("new-tokens", 256),
        ("block", 32), ("accept", 4), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--only", nargs="*", default=None, help="names of generations, such as 'd2f, block_causal'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", dest="compile", action="store_false")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    gbps = bandwidth(device, 4 << 30 if device.type == "cuda" else 64 << 20, 10)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    with torch.inference_mode():
        model = new_model(options, device, dtype)
    weights = sum(one.numel() * one.element_size() for key, one in model.named_parameters() if "embed" not in key)
    floor = weights / gbps / 1e6
    print(f"{name}, torch {torch.__version__}; a copy moves {gbps:.0f} GB/s; floor {floor:.2f} ms", file=sys.stderr)
    result: dict[str, Any] = {"benchmark": "decode_speed", "device": name, "torch": torch.__version__, "compile": options.compile}
    sizes = ("layers", "width", "heads", "mlp_width", "vocabulary", "prompt", "new_tokens", "block", "accept")
    result |= {"shape": {key: getattr(options, key) for key in sizes}}
    result |= {"copy_gbps": round(gbps), "weights_gb": round(weights / 1e9, 3), "floor_ms": round(floor, 3), "decode": {}, "batch": []}
    for key, (attention, decoder, cache) in settings(options).items():
        if options.only is None or key in options.only:
            result["decode"][key] = generation(model, attention, decoder, cache, options, 1)
            print(f"{key:30} {result['decode'][key]}", file=sys.stderr, flush=True)
    attention, decoder, cache = settings(options)["d2f, block_causal"]
    for rows in options.batch:
        result["batch"].append(generation(model, attention, decoder, cache, options, rows))
        print(f"batch {rows:4} {result['batch'][-1]}", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
