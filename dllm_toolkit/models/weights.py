"""Reading safetensors straight to where they belong: headers first, then every byte once.

The headers say all that can be wrong with a checkpoint (missing shards, truncated files, wrong shapes) before anything is allocated. Then
a few threads read pieces of the files. On a CPU the pieces land in the parameters themselves; for another device they pass through small
page-locked buffers, so reading and copying overlap and host memory never holds more than those buffers.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_toolkit.models.families.base import CheckpointError

PIECE_BYTES = 16 << 20
THREADS = 4
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: `size` bytes of `file` from `begin` on."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint; CheckpointError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. A checkpoint needs it. Point `path` at the directory that holds it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON, got {error}. Copy the file again from its source.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}. Copy the file again from its source.")
    return value


def tensor_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) and Path(name).name == name for name in weights.values()):
            raise CheckpointError(
                f"{index} must map tensors to file names beside it, got {str(weights):.80}. Copy the file again from its source."
            )
        return [directory / name for name in sorted(set(weights.values()))]
    return [directory / f"{stem}.safetensors"]


def stored_tensors(directory: Path, stem: str = "model") -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, from the headers alone. Raises CheckpointError for files that are missing or damaged."""
    found: dict[str, Stored] = {}
    for file in tensor_files(directory, stem):
        if not file.exists():
            raise CheckpointError(
                f"{file} is missing. The weights are expected there as safetensors (pickled weights are never read). "
                "Copy the file, or convert the checkpoint to safetensors."
            )
        try:
            with safe_open(str(file), framework="pt"):
                pass  # checks that header and length of the file agree
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged, got {error}. The download may be incomplete. Copy the file again.") from error
        for stored in _header(file):
            if stored.name in found:
                raise CheckpointError(
                    f"{stored.name} is stored twice, got {found[stored.name].file.name} and {file.name}. Only one can be right. "
                    "Copy the checkpoint again from its source."
                )
            found[stored.name] = stored
    return found


def _header(file: Path) -> Iterator[Stored]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: Mapping[str, Any] = json.loads(opened.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{name} in {file} is stored as {entry['dtype']}, readable are {', '.join(_DTYPES)}. Quantised weights need code of their "
                "own. Use the checkpoint that is not quantised."
            )
        begin, end = entry["data_offsets"]
        yield Stored(name, file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin)


def read(stored: Stored) -> Tensor:
    """One tensor on the CPU, as stored."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    read_into([(stored, tensor)])
    return tensor


def read_into(pairs: Iterable[tuple[Stored, Tensor]]) -> None:
    """Fill each tensor (contiguous, of the stored shape, any floating dtype and device) with its stored values."""
    pieces = [piece for stored, target in pairs for piece in _pieces(stored, target)]
    pieces.sort(key=lambda piece: (piece.file, piece.begin))  # disks like files from start to end
    reader = _Reader()
    if sum(piece.size for piece in pieces) <= PIECE_BYTES:  # not worth a thread
        for piece in pieces:
            reader(piece)
    else:
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(reader, pieces):
                pass
    for device in {piece.target.device for piece in pieces}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Piece:
    file: Path
    begin: int
    size: int
    dtype: torch.dtype
    target: Tensor  # flat, `size` bytes' worth of elements


def _pieces(stored: Stored, target: Tensor) -> Iterator[_Piece]:
    flat = target.detach().view(-1)
    step = PIECE_BYTES // stored.dtype.itemsize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        width = stored.dtype.itemsize
        yield _Piece(stored.file, stored.begin + start * width, part.numel() * width, stored.dtype, part)


class _Reader:
    """Reads pieces; every thread has two buffers, so that one is filled while the other is still being copied to the device."""

    def __init__(self) -> None:
        self.local = threading.local()

    def __call__(self, piece: _Piece) -> None:
        target = piece.target
        if target.device.type == "cpu":
            if target.dtype == piece.dtype:
                _read_bytes(piece, target)
            else:
                target.copy_(_read_bytes(piece, torch.empty_like(target, dtype=piece.dtype)))
        elif target.device.type == "cuda":
            self._through_pinned(piece)
        else:
            target.copy_(_read_bytes(piece, torch.empty(target.shape, dtype=piece.dtype)))

    def _through_pinned(self, piece: _Piece) -> None:
        local, target = self.local, piece.target
        if not hasattr(local, "buffers"):
            local.buffers = [(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
            local.turn = 0
        local.turn = 1 - local.turn
        buffer, copied = local.buffers[local.turn]
        with torch.cuda.device(target.device):
            copied.synchronize()  # returns at once the first time
            source = _read_bytes(piece, buffer[: piece.size].view(piece.dtype))
            if source.dtype == target.dtype:
                target.copy_(source, non_blocking=True)
            else:  # cast on the device, which is faster and needs no second buffer here
                target.copy_(source.to(target.device, non_blocking=True))
            copied.record()


def _read_bytes(piece: _Piece, into: Tensor) -> Tensor:
    """Fill a flat CPU tensor with the bytes of a piece."""
    view = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    with piece.file.open("rb", buffering=0) as opened:
        opened.seek(piece.begin)
        done = 0
        while done < piece.size:
            got = opened.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{piece.file} ended early while it was being read. Something changed it. Copy the file again.")
            done += got
    return into
