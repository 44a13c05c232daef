"""When memory runs out: the batch is halved and the run goes on; a problem that does not fit alone is recorded as failed.

    room = Room(configuration, size=64)
    for part, result in room.parts(indices, work):     work(part) is called with at most `size` of them
        ...                                            result is None where not even one fitted

Whatever is halved stays halved for that configuration: it would not fit later either, and each attempt costs the time of a batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
# Of allocators and libraries that raise a plain RuntimeError: the CPU's, cuBLAS and cuDNN, the CUDA runtime.
_SAID = ("DefaultCPUAllocator", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether memory is the reason of an error, or of the error behind it (compilers wrap what they meet)."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(behind, RuntimeError) and any(words in str(behind) for words in _SAID):
            return True
        behind = behind.__cause__
    return False


def first_line(error: BaseException) -> str:
    """What an error says, without the advice and the stack behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Room:
    """How many problems of a configuration fit into memory at once.

    size: what is tried first. told: called with words and the new size when that changes; memory was given back by then.
    """

    def __init__(self, size: int, told: Callable[[str, int], None]) -> None:
        self.size, self.told = size, told
        self.problem = ""  # what memory's last refusal said

    def parts(self, indices: Sequence[int], work: Callable[[Sequence[int]], T]) -> Iterator[tuple[Sequence[int], T | None]]:
        """`work` on `indices` in parts of at most `size`; on half of a part that does not fit. (part, None): one alone does not fit."""
        rest = list(indices)
        while rest:
            part = rest[: self.size]
            result = self._attempt(part, work)
            if result is None and len(part) > 1:
                self.size = len(part) // 2
                self.told(f"out of memory with {len(part)} problems in a batch ({self.problem}); goes on with {self.size}", self.size)
                continue
            yield part, result
            rest = rest[len(part) :]

    def _attempt(self, part: Sequence[int], work: Callable[[Sequence[int]], T]) -> T | None:
        try:
            return work(part)
        except Exception as error:
            if not ran_out(error):
                raise
            self.problem = first_line(error)
        # Outside of the handler: the error's traceback holds the frames, and they hold the tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
