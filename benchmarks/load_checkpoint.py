"""How long does `load` take against reading the same files once, and how much memory does it touch?

    python benchmarks/load_checkpoint.py --device cuda                       LLaDA-8B's shape in bf16: 16 GB in a temporary directory
    python benchmarks/load_checkpoint.py --layers 2 --width 64 --device cpu  a second on any machine

Writes a sharded checkpoint in LLaDA's layout (random bytes of a normal distribution, one pool used over and over: only sizes matter here),
then takes turns at reading the files from start to end in one thread and loading the model. The times are the best of `--repeats` turns.
`--page-cache warm` reads files that the system still holds in memory, which is the harder comparison: nothing hides behind a slow disk.
`cold` asks the system to drop them before every turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dllm_toolkit.models.load import load

GIB = 2**30
POOL_BYTES = 64 << 20
HEADER = {"format": "pt"}


def shapes(layers: int, width: int, mlp_width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaDA checkpoint."""
    found: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (vocabulary, width)}
    for layer in range(layers):
        block = f"model.transformer.blocks.{layer}."
        found |= {block + name + ".weight": (width,) for name in ("attn_norm", "ff_norm")}
        found |= {block + name + ".weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        found |= {block + name + ".weight": (mlp_width, width) for name in ("ff_proj", "up_proj")}
        found[block + "ff_out.weight"] = (width, mlp_width)
    return {**found, "model.transformer.ln_f.weight": (width,), "model.transformer.ff_out.weight": (vocabulary, width)}


def size_of(shape: tuple[int, ...]) -> int:
    return 2 * int(torch.tensor(shape).prod())


def write_checkpoint(directory: Path, options: argparse.Namespace) -> list[Path]:
    """config.json, the shards and their index, in bf16."""
    tensors = shapes(options.layers, options.width, options.mlp_width, options.vocabulary)
    config = {
        "model_type": "llada", "d_model": options.width, "n_heads": options.heads, "n_kv_heads": options.heads,
        "n_layers": options.layers, "mlp_hidden_size": options.mlp_width, "vocab_size": options.vocabulary,
        "embedding_size": options.vocabulary, "max_sequence_length": 4096, "mask_token_id": options.vocabulary - 1,
        "eos_token_id": options.vocabulary - 2, "pad_token_id": options.vocabulary - 2, "weight_tying": False,
    }  # fmt: skip
    total = sum(map(size_of, tensors.values()))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if sum(map(size_of, shards[-1].values())) >= total / options.shards:
            shards.append({})
        shards[-1][name] = shape
    pool = memoryview((torch.randn(POOL_BYTES // 2) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy())  # type: ignore[arg-type]
    files = [directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(write_shard, files, shards, [pool] * len(files)))
    index = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config))
    return files


def write_shard(file: Path, tensors: dict[str, tuple[int, ...]], pool: memoryview) -> None:
    header: dict[str, Any] = {"__metadata__": HEADER}
    end = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size_of(shape)]}
        end += size_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= opened.write(pool[: min(end, len(pool))])


def drop_from_page_cache(files: Sequence[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(files: Sequence[Path]) -> None:
    """Every byte of every file, from start to end, in one thread and into one buffer."""
    buffer = bytearray(16 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


class Resident:
    """The largest growth of this process's resident memory inside the block, sampled every 5 ms."""

    def __enter__(self) -> Resident:
        self.before = self.peak = self.now()
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watcher.join()
        self.growth = max(self.peak, self.now()) - self.before

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(directory: Path, files: Sequence[Path], options: argparse.Namespace, page_cache: str) -> dict[str, Any]:
    reads, loads, growths, peaks = [], [], [], []
    cuda = options.device.startswith("cuda")
    for _ in range(options.repeats):
        if page_cache == "cold":
            drop_from_page_cache(files)
        reads.append(seconds(lambda: read_once(files)))
        if page_cache == "cold":
            drop_from_page_cache(files)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with Resident() as resident:
            loads.append(seconds(lambda: load(str(directory), dtype="bfloat16", device=options.device)))  # the model dies at once
        growths.append(resident.growth)
        peaks.append(torch.cuda.max_memory_allocated() if cuda else 0)
        if cuda:
            torch.cuda.empty_cache()
    weights = sum(file.stat().st_size for file in files)
    largest = max(file.stat().st_size for file in files)
    ratio = min(loads) / min(reads)
    return {
        "page_cache": page_cache,
        "read_seconds": [round(value, 3) for value in reads],
        "load_seconds": [round(value, 3) for value in loads],
        "read_gb_per_second": round(weights / min(reads) / 1e9, 2),
        "load_gb_per_second": round(weights / min(loads) / 1e9, 2),
        "ratio": round(ratio, 3),
        "host_growth_gib": round(max(growths) / GIB, 3),
        # On a CPU the model itself is host memory; elsewhere one shard and 2 GB are the limit.
        "host_limit_gib": round((largest + 2e9 + (0 if cuda else weights)) / GIB, 3),
        "device_peak_gib": round(max(peaks) / GIB, 3),
        "ratio_ok": ratio <= 1.3,
        "host_ok": max(growths) <= largest + 2e9 + (0 if cuda else weights),
        "device_ok": max(peaks) <= 1.1 * weights,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--mlp-width", type=int, help="3 x width unless given")
    parser.add_argument("--vocabulary", type=int, help="126464 at width 4096, else 8 x width")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--page-cache", choices=["warm", "cold", "both"], default="warm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", help="where the temporary directory is made")
    options = parser.parse_args(arguments)
    options.mlp_width = options.mlp_width or 3 * options.width
    options.vocabulary = options.vocabulary or (126464 if options.width == 4096 else 8 * options.width)
    if options.device.startswith("cuda"):
        torch.zeros(1).pin_memory().to(options.device)  # the driver's own memory and start-up are no part of loading
    directory = Path(tempfile.mkdtemp(prefix="load_checkpoint_", dir=options.directory))
    try:
        started = time.perf_counter()
        files = write_checkpoint(directory, options)
        written = time.perf_counter() - started
        read_once(files)
        kinds = ["warm", "cold"] if options.page_cache == "both" else [options.page_cache]
        runs = [measure(directory, files, options, kind) for kind in kinds]
        size = sum(file.stat().st_size for file in files)
    finally:
        shutil.rmtree(directory)
    result = {
        "benchmark": "load_checkpoint",
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "layers": options.layers,
        "width": options.width,
        "files": len(files),
        "gigabytes": round(size / 1e9, 3),
        "write_seconds": round(written, 1),
        "runs": runs,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
