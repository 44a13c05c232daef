"""How fast is one D2F step (teacher, student, loss, backward, optimiser) at 8B, and what does it take against the official way?

    python benchmarks/train_speed.py              LLaDA-8B's shape, random bf16 weights, LoRA rank 32, rows of 1024 tokens, one GPU
    python benchmarks/train_speed.py --tiny       toy size, eager, float32, seconds on any CPU

    official            what the released code does (D2F-train and LLaDA's model file): a float mask of L x L written by slices, a pair of
                        blocks at a time, with bounds that live on the device; memory-efficient attention switched off, which leaves the
                        plain formula for a mask; logits and teacher's softmax of all positions; the allocator emptied in each step. It
                        checkpoints nothing; `+ layers` is the same with every layer computed again
    dense               the same step with that much spared: one formula makes the mask, any attention kernel may serve it, nothing is
                        emptied. Still all logits. This is where the ablation starts; each next line changes one thing
      flex              attention over tiles, no L x L
      needed logits     of supervised positions only
      chunked           a chunk of them at a time, gradient at once
      compiled          one graph for all layers, one for a chunk
      + selective       products kept, the rest of a layer computed again
      + layers          only each layer's input kept
      4x rows           the last one with four times the rows: what the memory that is saved can hold

Every line has the same weights, rows, noise, LoRA dropout and optimiser; `loss` is that of its first step, when the adapter adds nothing,
and must agree. tokens/s counts all positions, prompt included. Memory: the most that tensors held in a timed step, weights included.

    MFU   useful operations / time / peak (989 TFLOP/s dense bf16 on H100 and H200). Useful, per token: 6 N for the N weights of the layers
          (2 N teacher, 2 N student, 2 N back to the activations; none to the frozen weights; the adapter's half percent is left out),
          6 V D for each position whose logits the loss needs, and 4 D for each pair (query, key) that the rule allows, in every layer,
          once for the teacher and three times for the student. What is computed again, or computed in vain, counts as time only.

A line that fails, for want of memory for instance, has its error in its place, and the next one runs. What matters most runs first; lines
that `--minutes` leaves no time for are left out by name. Times are medians. Prints the machine, a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import Lanes, Transformer, TransformerConfig
from dllm_toolkit.ops.masks import block_causal
from dllm_toolkit.training.composed import Shown
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.forward import Forward
from dllm_toolkit.training.layouts import canvas_blocks
from dllm_toolkit.training.lora import Lora, adapter_off, inject
from dllm_toolkit.training.objectives import D2FDistillation, full_blocks

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SIZES = {
    "layers": (32, 2), "width": (4096, 32), "heads": (32, 2), "mlp_width": (12288, 64), "vocabulary": (126464, 211), "length": (1024, 48),
    "prompt": (256, 12), "block": (16, 8), "rank": (32, 4), "batch": (4, 2), "repeats": (5, 1),
}  # fmt: skip


@dataclass
class Setup:
    """What every line shares."""

    model: Transformer
    batch: Batch
    objective: D2FDistillation
    dtype: torch.dtype

    def view(self, step: int) -> Shown:
        generator = torch.Generator(self.batch.tokens.device).manual_seed(step)
        return self.objective.show(self.batch, self.model.spec, generator, 1.0)


Line = Callable[[Setup, int], Tensor]
"""The loss of one step, ready for the backward pass."""


# ---- the official way


def mask_by_slices(prompt_length: Tensor, length: int, block: int) -> Tensor:
    """0 where a position may look, -inf elsewhere [B, 1, L, L]: a write for every pair of blocks, waiting for the device each time."""
    rows = prompt_length.shape[0]
    mask = torch.full((rows, 1, length, length), float("-inf"), device=prompt_length.device)
    for row in range(rows):
        begin = prompt_length[row]
        mask[row, :, :, :begin] = 0.0
        for query in range((length - begin + block - 1) // block):
            here = slice(begin + query * block, min(begin + (query + 1) * block, length))
            for key in range(query + 1):
                mask[row, :, here, begin + key * block : min(begin + (key + 1) * block, length)] = 0.0
    return mask


def added(mask: Tensor, plain: bool, q: Tensor, k: Tensor, v: Tensor, lanes: Lanes) -> Tensor:
    """Attention with a mask that is added to the scores. plain: without the memory-efficient kernel, as LLaDA's file has it."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if plain else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def all_logits(model: Transformer, tokens: Tensor, mask: Tensor, plain: bool, layers_again: bool) -> Tensor:
    query = Query(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))
    x, lanes = model.enter(query), model.lanes(query, None)
    mix = partial(added, mask, plain)

    def through(layer: Any, x: Tensor) -> Tensor:
        x = x + layer.attend(x, lanes, None, mix)
        return x + layer.transform(x)

    for layer in model.layers:
        again = layers_again and torch.is_grad_enabled()
        x = checkpoint(through, layer, x, use_reentrant=False) if again else through(layer, x)  # type: ignore[assignment]
    return model.lm_head(model.norm(x))


def loss_of_all(student: Tensor, teacher: Tensor, view: Shown) -> Tensor:
    """The teacher's softmax everywhere, then cross-entropy at the masked positions, with weights 1/t."""
    masked = view.weight > 0
    return loss_of_masked(student[masked], teacher.softmax(-1)[masked], view)


def loss_of_masked(student: Tensor, told: Tensor, view: Shown) -> Tensor:
    return (F.cross_entropy(student, told, reduction="none") * view.weight[view.weight > 0]).mean()


def official(setup: Setup, step: int, *, released: bool, layers_again: bool) -> Tensor:
    model, batch, view = setup.model, setup.batch, setup.view(step)
    length = batch.tokens.shape[1]
    if released:
        mask = mask_by_slices(batch.prompt_length, length, setup.objective.block_length)
        everybody = torch.zeros(1, 1, length, length, device=mask.device)
    else:
        allow = block_causal(canvas_blocks(batch, setup.objective.block_length)).unsqueeze(1)
        mask = torch.zeros(allow.shape, dtype=setup.dtype, device=allow.device).masked_fill(~allow, float("-inf"))
        everybody = mask.new_zeros(1, 1, length, length)
    student = all_logits(model, view.tokens, mask, released, layers_again)
    with torch.no_grad(), adapter_off(model):
        teacher = all_logits(model, view.tokens, everybody, released, layers_again)
    loss = loss_of_all(student, teacher, view)
    if released and loss.is_cuda:
        torch.cuda.empty_cache()
    return loss


# ---- ours


def by_tiles(setup: Setup, step: int, *, forward: Forward, needed: bool) -> Tensor:
    """Attention as ours, loss as theirs: of all logits, or of the needed ones at once."""
    model, batch, view = setup.model, setup.batch, setup.view(step)
    student = model.norm(forward.hidden(model, view.tokens, canvas_blocks(batch, setup.objective.block_length)))
    with torch.no_grad(), adapter_off(model):
        teacher = model.norm(forward.hidden(model, view.tokens, full_blocks(batch)))
    if needed:
        masked = view.weight > 0
        return loss_of_masked(model.lm_head(student[masked]), model.lm_head(teacher[masked]).softmax(-1), view)
    return loss_of_all(model.lm_head(student), model.lm_head(teacher), view)


def ours(setup: Setup, step: int, *, forward: Forward) -> Tensor:
    objective = D2FDistillation(block_length=setup.objective.block_length, forward=forward)
    return objective(setup.model, setup.batch, torch.Generator(setup.batch.tokens.device).manual_seed(step)).value


def lines(options: argparse.Namespace) -> dict[str, Line]:
    """In the order of the table."""
    kernel: Any = "flex" if torch.device(options.device).type == "cuda" else "dense"
    compiled = partial(Forward, attention=kernel, compile=options.compile)
    return {
        "official": partial(official, released=True, layers_again=False),
        "official + layers": partial(official, released=True, layers_again=True),
        "dense": partial(official, released=False, layers_again=False),
        "dense + layers": partial(official, released=False, layers_again=True),
        "flex": partial(by_tiles, forward=Forward(attention=kernel), needed=False),
        "needed logits": partial(by_tiles, forward=Forward(attention=kernel), needed=True),
        "chunked": partial(ours, forward=Forward(attention=kernel)),
        "compiled": partial(ours, forward=compiled()),
        "compiled + selective": partial(ours, forward=compiled(checkpoint="selective")),
        "compiled + layers": partial(ours, forward=compiled(checkpoint="layers")),
        "4x rows": partial(ours, forward=compiled(checkpoint="layers")),
    }


FIRST = ("compiled", "official", "dense", "compiled + selective", "official + layers", "dense + layers", "compiled + layers", "chunked")


# ---- measuring


def new_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Transformer:
    vocabulary = options.vocabulary
    config = TransformerConfig(
        vocab_size=vocabulary, width=options.width, layers=options.layers, heads=options.heads, mlp_width=options.mlp_width,
        mask_id=vocabulary - 1, eos_ids=(vocabulary - 2,), pad_id=vocabulary - 2, max_positions=options.length, rope_theta=5e5,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    model.allocate(dtype, device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    inject(model, Lora(rank=options.rank, alpha=options.rank, dropout=0.1))
    return model.to(dtype).train()


def new_batch(options: argparse.Namespace, device: torch.device, rows: int) -> Batch:
    """Rows of prompts between half of `--prompt` and all of it; the answer runs to the row's end, as in the official data."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, options.vocabulary - 2, (rows, options.length), generator=generator)
    prompt = torch.randint(options.prompt // 2, options.prompt + 1, (rows,), generator=generator)
    return Batch(tokens.to(device), prompt.to(device), options.length - int(prompt.min()))


def useful(setup: Setup, options: argparse.Namespace) -> float:
    """Operations that a step cannot do without; the formula is the module's."""
    tokens = setup.batch.tokens.numel()
    weights = options.layers * (4 * options.width**2 + 3 * options.width * options.mlp_width)
    supervised = statistics.mean(float((setup.view(step).weight > 0).sum()) for step in range(options.repeats))
    student = float(block_causal(canvas_blocks(setup.batch, options.block)).sum())
    pairs = tokens * options.length + 3 * student
    return 6 * weights * tokens + 6 * options.vocabulary * options.width * supervised + 4 * options.width * options.layers * pairs


def measured(line: Line, setup: Setup, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    for name, parameter in setup.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=on_gpu)

    def once(step: int) -> tuple[float, float]:
        """(seconds, loss)"""
        clock = time.perf_counter()
        loss = line(setup, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())  # waits for the loss; the rest of the step is waited for below
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - clock, value

    clock = time.perf_counter()
    _, loss = once(0)
    once(1)
    warm_up = time.perf_counter() - clock
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(once(2 + step)[0] for step in range(options.repeats))
    tokens = setup.batch.tokens.numel()
    row = {"ms": round(seconds * 1e3, 1), "tokens_per_second": round(tokens / seconds), "rows": setup.batch.tokens.shape[0]}
    if options.peak:
        row["mfu"] = round(useful(setup, options) / seconds / options.peak, 3)
    if on_gpu:
        row |= {
            "gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2),
            "reserved_gb": round(torch.cuda.memory_reserved(device) / 1e9, 2),
        }
    return row | {"loss": round(loss, 4), "warm_up_seconds": round(warm_up, 1)}


def attempt(line: Line, setup: Setup, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What is measured, or why it could not be."""
    try:
        row = measured(line, setup, options, device)
    except Exception as failure:  # a line that fails must not cost the others
        said = str(failure).splitlines()
        row = {"failed": f"{type(failure).__name__}: {said[0] if said else ''}"[:300]}
    setup.model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def told(name: str, row: dict[str, Any]) -> str:
    if "failed" in row or "left_out" in row:
        return f"{name:24} {row.get('failed') or row['left_out']}"
    shown = {
        "ms": "9.1f",
        "tokens_per_second": "9.0f",
        "mfu": "6.3f",
        "gb": "7.2f",
        "speed_up": "6.2f",
        "memory_share": "6.2f",
        "loss": "9.4f",
    }
    return f"{name:24} " + "".join(f"  {key} {row[key]:{form}}" for key, form in shown.items() if key in row)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU, eager, float32")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    parser.add_argument("--only", nargs="*", default=None, help="names of lines, such as 'compiled'")
    parser.add_argument("--minutes", type=float, default=4.5, help="no line is begun after that many")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--peak", type=float, default=None, help="FLOP/s of the device, for MFU; known for H100, H200, A100")
    parser.add_argument("--eager", dest="compile", action="store_false")
    options = parser.parse_args(arguments)
    for name, sizes in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, sizes[options.tiny])
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    options.compile = options.compile and not options.tiny
    device, dtype = torch.device(options.device), getattr(torch, options.dtype or ("float32" if options.tiny else "bfloat16"))
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    options.peak = options.peak or next((peak for key, peak in PEAK.items() if key in name), None)
    torch._dynamo.config.recompile_limit = 64  # every line has graphs of its own
    begun = time.perf_counter()
    torch.manual_seed(0)
    setup = Setup(
        new_model(options, device, dtype), new_batch(options, device, options.batch), D2FDistillation(block_length=options.block), dtype
    )
    print(f"{name}, torch {torch.__version__}, {options.batch} rows of {options.length}", file=sys.stderr, flush=True)
    chosen = {key: line for key, line in lines(options).items() if options.only is None or key in options.only}
    found: dict[str, dict[str, Any]] = {}
    for key in sorted(chosen, key=lambda one: FIRST.index(one) if one in FIRST else len(FIRST)):
        if (time.perf_counter() - begun) / 60 > options.minutes:
            found[key] = {"left_out": "no time was left"}
        else:
            rows = options.batch * (4 if key == "4x rows" else 1)
            found[key] = attempt(chosen[key], replace(setup, batch=new_batch(options, device, rows)), options, device)
        print(told(key, found[key]), file=sys.stderr, flush=True)
    table = {key: found[key] for key in chosen}
    start = next((table[key] for key in ("official", "dense") if "ms" in table.get(key, {})), None)
    for row in table.values():
        if start is not None and "ms" in row:
            row["speed_up"] = round(row["tokens_per_second"] / start["tokens_per_second"], 2)
        if start is not None and "gb" in row:
            row["memory_share"] = round(row["gb"] / start["gb"], 2)
    print("\n".join(["", *(told(key, row) for key, row in table.items())]), file=sys.stderr, flush=True)
    result = {
        "benchmark": "train_speed", "device": name, "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch."),
        "compile": options.compile, "shape": {key: getattr(options, key) for key in SIZES}, "peak_flops": options.peak, "lines": table,
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
