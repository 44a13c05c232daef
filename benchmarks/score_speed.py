"""What does it cost to turn logits into proposals, against one read of the logits?

    python benchmarks/score_speed.py                         V = 126464, 32, 64 and 128 read lanes, bf16, one GPU; a few MB of memory
    python benchmarks/score_speed.py --vocabulary 500 --reads 8 --device cpu --dtype float32 --eager      a second on any machine

    argmax              the best token alone: the least that every method needs
    probability         its probability (ops/score.py), argmax included, and so on:
    margin              probability of the best minus that of the second
    entropy             of the distribution
    margin, sorted      as it is often written: all probabilities, then topk
    entropy, plain      as it is often written: log-softmax, then sum p ln p
    proposal            the whole of `Sample`: mask id hidden, argmax, probability, back to the canvas
    proposal, margin / negative_entropy / temperature 1

Each is compiled as the engine does and replayed as one CUDA graph (with --eager: as it stands). `times_one_read` is its time over the time
in which a plain copy moves as many bytes. Logits of 32 to 128 lanes fit into a GPU's L2 cache, where the LM head has just left them; with
--cold something else is written there first. Prints the machine, a table, and one JSON line. Times are medians.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import finish, save_option
from matmul_speed import bandwidth, timed
from torch import Tensor

from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.ops import score
from dllm_toolkit.state import Answer, Proposal, State, begin_state
from dllm_toolkit.types import ModelSpec

Measured = Callable[[Tensor], Any]


def sorted_margin(logits: Tensor) -> Tensor:
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def plain_entropy(logits: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def with_best(function: Measured) -> Measured:
    return lambda logits: (logits.argmax(-1), function(logits))


def first_state(vocabulary: int, reads: int, device: torch.device) -> State:
    spec = ModelSpec(
        vocab_size=vocabulary, mask_id=vocabulary - 1, eos_ids=(vocabulary - 2,), pad_id=vocabulary - 2, layers=1, heads=1, kv_heads=1,
        head_dim=2, width=2, max_positions=4 * reads, attention="full", block_size=None, shift=0,
    )  # fmt: skip
    return begin_state(spec, [([0] * reads, [None] * reads)], [0], length=2 * reads, device=device)


def candidates(vocabulary: int, reads: int, device: torch.device) -> dict[str, Measured]:
    state = first_state(vocabulary, reads, device)
    positions = torch.arange(reads, 2 * reads, device=device).unsqueeze(0)

    def proposal(rule: Sample, logits: Tensor) -> tuple[Tensor, ...]:
        made: Proposal = rule(Answer(logits, positions), state)
        return made.tokens, made.confidence, made.score

    return {
        "argmax": lambda logits: logits.argmax(-1),
        "probability": lambda logits: score.probability(logits, logits.argmax(-1)),
        "margin": with_best(score.margin),
        "entropy": with_best(score.entropy),
        "margin, sorted": with_best(sorted_margin),
        "entropy, plain": with_best(plain_entropy),
        "proposal": partial(proposal, Sample()),
        "proposal, margin": partial(proposal, Sample(score="margin")),
        "proposal, negative_entropy": partial(proposal, Sample(score="negative_entropy")),
        "proposal, temperature 1": partial(proposal, Sample(temperature=1.0)),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--reads", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--eager", dest="compile", action="store_false")
    parser.add_argument("--cold", action="store_true", help="write 256 MB between repeats, so that no cache holds the logits")
    save_option(parser)
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    gbps = bandwidth(device, 4 << 30 if device.type == "cuda" else 16 << 20, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}; a copy moves {gbps:.0f} GB/s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for reads in options.reads:
        logits = (torch.randn(1, reads, options.vocabulary, device=device) * 3).to(dtype)
        once = logits.numel() * logits.element_size() / gbps / 1e6
        waste = torch.empty(128 << 20, dtype=torch.bfloat16, device=device) if options.cold else None
        swept = 0.0 if waste is None else timed(waste.zero_, device, options.repeats)
        for key, function in candidates(options.vocabulary, reads, device).items():
            if options.only is not None and key not in options.only:
                continue
            row: dict[str, Any] = {"what": key, "reads": reads}
            try:
                run = torch.compile(function, fullgraph=True, dynamic=False) if options.compile else function
                milliseconds = timed(partial(step, run, logits, waste), device, options.repeats) - swept
                row |= {"ms": round(milliseconds, 4), "one_read_ms": round(once, 4), "times_one_read": round(milliseconds / once, 2)}
            except Exception as failure:  # whatever the compiler stumbles over is the result of this line
                row["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:200]
            rows.append(row)
            said = row.get("failed") or f"{row['ms']:9.4f} ms, {row['times_one_read']} reads"
            print(f"{reads:4} lanes  {key:28} {said}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "score_speed", "device": name, "torch": torch.__version__, "vocabulary": options.vocabulary, "dtype": options.dtype,
        "compile": options.compile, "cold": options.cold, "copy_gbps": round(gbps), "rows": rows,
    }  # fmt: skip
    return finish("score_speed", result, options, device)


def step(run: Measured, logits: Tensor, waste: Tensor | None) -> None:
    if waste is not None:
        waste.zero_()
    with torch.inference_mode():
        run(logits)


if __name__ == "__main__":
    main()
