"""Will it fit? Bytes that a model needs against bytes that a device has left, asked before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from dllm_toolkit.models.eight_bit import eight_bit_memory
from dllm_toolkit.models.families.base import CheckpointError


def gibibytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_available(), _container()) if limit is not None]
    return min(limits) if limits else None


def _available() -> int | None:
    """MemAvailable of Linux (free memory plus file cache that can be dropped), else what is free of the physical memory."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system counts pages
        return None


def _container() -> int | None:
    """What a control group (container) leaves below its limit; file cache counts as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no control group, or one of the old kind
        return None
    if limit == "max":
        return None
    cache = int(statistics[statistics.index("inactive_file") + 1]) if "inactive_file" in statistics else 0
    return int(limit) - used + cache


def required_memory(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters in `dtype`, plus its buffers. Works on the meta device."""
    parameters = sum(value.numel() for value in model.parameters()) * dtype.itemsize
    return parameters + sum(value.numel() * value.element_size() for value in model.buffers())


def check_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """CheckpointError if the model cannot fit on the device."""
    need, free = required_memory(model, dtype), free_memory(device)
    if free is None or need <= free:
        return
    half = required_memory(model, torch.bfloat16)
    narrow = eight_bit_memory(model, torch.bfloat16)
    if dtype.itemsize > 2 and half <= free:
        smaller = f"Write dtype: bfloat16 ({gibibytes(half)})"
    elif device.type != "cpu" and narrow <= free:  # on the CPU the full weights must fit first
        smaller = f"Write dtype: bfloat16 and weights: fp8 ({gibibytes(narrow)}, loaded through host memory)"
    else:
        smaller = "Free memory there"
    raise CheckpointError(
        f"not enough memory: the model needs {gibibytes(need)} in {str(dtype).removeprefix('torch.')}, {device} has "
        f"{gibibytes(free)} free. Loading would fail halfway. {smaller}, or another device:."
    )


def staging(model: nn.Module, dtype: torch.dtype, device: torch.device, head: bool = True) -> torch.device:
    """Where a model is filled whose linear maps will be kept in 8 bits: on its device, or on the CPU if it does not fit there before.

    Raises CheckpointError if the 8-bit model does not fit on the device either.
    """
    free = free_memory(device)
    if device.type == "cpu" or free is None or required_memory(model, dtype) <= free:
        return device
    need = eight_bit_memory(model, dtype, head)
    if need > free:
        raise CheckpointError(
            f"not enough memory: with its weights in 8 bits the model needs {gibibytes(need)}, {device} has {gibibytes(free)} free. "
            "Loading would fail halfway. Free memory there, or write another device:."
        )
    return torch.device("cpu")


def check_device(device: str) -> torch.device:
    """The device of that name (`auto`: CUDA when there is one); CheckpointError if this machine has none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three, depending on the build
        raise CheckpointError(
            f"device {device!r} cannot be used here, got: {str(error).splitlines()[0]} A model must live on a device that exists. "
            "Write device: cpu, cuda, cuda:1 or auto."
        ) from error
    return found


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """CheckpointError if the device cannot compute in `dtype` (float16 on some CPUs): tried on a two-by-two attention."""
    try:
        ones = torch.ones(1, 1, 2, 2, dtype=dtype, device=device)
        torch.matmul(torch.nn.functional.scaled_dot_product_attention(ones, ones, ones), ones)
    except RuntimeError as error:
        raise CheckpointError(
            f"{device} cannot compute in {str(dtype).removeprefix('torch.')}, got: {str(error).splitlines()[0]} Every forward would fail. "
            "Write dtype: float32 or bfloat16."
        ) from error
