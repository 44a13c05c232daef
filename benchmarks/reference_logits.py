"""Do the models compute in bf16 on a GPU what they compute in float32 on a CPU?

    python benchmarks/reference_logits.py --device cuda          two layers of LLaDA-8B and of Dream-7B at full width
    python benchmarks/reference_logits.py --shrink 32            the same at 1/32 of the width, anywhere

The same weights (random, rounded to bf16) are run three times under full attention: in float32 on the CPU, in bf16 on the CPU, and in bf16
on the device. The second run says what bf16 alone costs; the device's error may be at most twice that, in the mean and at the worst logit.
A row inside a batch is then compared with the same row alone, under the same tolerance: other shapes take other matrix kernels, which
round differently. The last line is JSON; the exit code is 1 if something disagrees.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_toolkit.models.transformer import Transformer, TransformerConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llada-8b": {
        "vocab_size": 126464, "width": 4096, "heads": 32, "kv_heads": 32, "mlp_width": 12288, "rope_theta": 500000.0, "norm_eps": 1e-5,
    },
    "dream-7b": {
        "vocab_size": 152064, "width": 3584, "heads": 28, "kv_heads": 4, "mlp_width": 18944, "rope_theta": 1000000.0, "norm_eps": 1e-6,
        "qkv_bias": True, "shift": 1,
    },
}  # fmt: skip
SLACK = 2.0


def shape(name: str, layers: int, shrink: int) -> TransformerConfig:
    """A model's real sizes, or all widths divided by `shrink` (the head size stays even)."""
    sizes = dict(SHAPES[name])
    head_dim = max(sizes["width"] // sizes["heads"] // shrink, 4)
    sizes["vocab_size"] //= shrink
    sizes["mlp_width"] //= shrink
    last = sizes["vocab_size"] - 1
    sizes |= {"width": head_dim * sizes["heads"], "head_dim": head_dim, "layers": layers, "max_positions": 4096}
    return TransformerConfig(**sizes, mask_id=last, eos_ids=(last - 1,), pad_id=last - 1)


def random_model(config: TransformerConfig, device: str, seed: int) -> Transformer:
    """bf16 weights drawn on the device. Every layer keeps the size of its input, so attention and logits are far from flat."""
    with torch.device("meta"):
        model = Transformer(config)
    model.allocate(torch.bfloat16, device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(std=0.5, generator=generator)
            else:
                fan_in = 1 if name.startswith("embed") else weight.shape[1]
                weight.normal_(std=fan_in**-0.5, generator=generator)
    return model.eval().requires_grad_(False)


def copy_to_cpu(model: Transformer, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        other = Transformer(model.config)
    other.allocate(dtype, "cpu")
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    return other.eval().requires_grad_(False)


def errors(logits: Tensor, reference: Tensor) -> dict[str, float]:
    difference = logits.float().cpu() - reference
    scale = reference.square().mean().sqrt().item()
    return {
        "max_abs": round(difference.abs().max().item(), 6),
        "rms": round(difference.square().mean().sqrt().item(), 7),
        "rms_relative": round(difference.square().mean().sqrt().item() / scale, 6),
        "same_argmax": round((logits.float().cpu().argmax(-1) == reference.argmax(-1)).double().mean().item(), 4),
    }


@torch.inference_mode()
def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    config = shape(name, options.layers, options.shrink)
    model = random_model(config, options.device, seed=1)
    tokens = torch.randint(0, config.vocab_size, (2, options.length), generator=torch.Generator().manual_seed(2))
    tokens[:, options.length // 2 :: 2] = config.mask_id
    on_device = model.logits(tokens.to(options.device)).cpu()
    alone = torch.cat([model.logits(tokens[row : row + 1].to(options.device)) for row in range(2)]).cpu()
    reference = copy_to_cpu(model, torch.float32).logits(tokens)
    eager = copy_to_cpu(model, torch.bfloat16).logits(tokens)
    of_device, of_cpu, of_batch = errors(on_device, reference), errors(eager, reference), errors(alone, on_device.float())
    allowed = {key: SLACK * of_cpu[key] for key in ("max_abs", "rms")}
    return {
        "model": name,
        "layers": options.layers,
        "width": config.width,
        "tokens": list(tokens.shape),
        "logit_rms": round(reference.square().mean().sqrt().item(), 4),
        "bf16_device_against_float32_cpu": of_device,
        "bf16_cpu_against_float32_cpu": of_cpu,
        "batch_row_against_row_alone": {**of_batch, "identical": bool(torch.equal(alone, on_device))},
        "tolerance": {key: round(value, 6) for key, value in allowed.items()},
        "logits_ok": all(of_device[key] <= allowed[key] for key in allowed),
        "batch_ok": all(of_batch[key] <= allowed[key] for key in allowed),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens in each of the two rows")
    parser.add_argument("--shrink", type=int, default=1, help="divide every width by this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    runs = [compare(name, options) for name in options.models]
    result = {
        "benchmark": "reference_logits",
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "runs": runs,
        "ok": all(run["logits_ok"] and run["batch_ok"] for run in runs),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
