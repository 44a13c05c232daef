"""Several processes that measure together: who this one is, and how they talk. Alone, nothing is imported and nothing is sent.

    torchrun --nproc_per_node 8 -m dllm_toolkit compare recipe.yaml

Whoever starts them says so in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; Lightning Fabric joins them.
They talk over the CPU (gloo), which takes no memory on a GPU, and a process may keep the others waiting for as long as its share takes.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from dllm_toolkit.errors import SaidElsewhere, ToolkitError

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=7)


class ProcessError(ToolkitError):
    """Processes that cannot work together, or an error of another process."""


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them. rank: its number; local_rank: among those of its machine, of which there are local."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this one prints and reports."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The first process's `value`, in all of them."""
        if self.count == 1:
            return value
        import torch.distributed

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """In the first process the `value` of each, by rank; in the others nothing."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] | None = [None] * self.count if self.first else None
        torch.distributed.gather_object(value, values, dst=0)
        return values or []

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A ToolkitError in the block of one process ends all of them after the block: none waits for one that is gone.

        Process 0 raises it, its own or another's; the others raise SaidElsewhere.
        """
        problem: ToolkitError | None = None
        try:
            yield
        except ToolkitError as error:
            if self.count == 1:
                raise
            problem = error
        if self.count == 1:
            return
        said = self.gather(None if problem is None else str(problem))
        others = [f"process {rank} of {self.count}: {text}" for rank, text in enumerate(said) if text is not None]
        if not self.share(bool(others)):
            return
        if not self.first:
            raise SaidElsewhere("process 0 says why.") from problem
        raise problem or ProcessError("\n".join(dict.fromkeys(others)))


ALONE = Processes()


def announced() -> Processes:
    """What the environment says, before anybody is joined. Raises ProcessError for numbers that are none."""
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return ALONE
        rank = int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        found = Processes(rank, count, int(os.environ.get("LOCAL_RANK", rank % local)), local)
    except (KeyError, ValueError) as error:
        raise ProcessError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes, but not which this is ({error}). "
            "Start them with torchrun, or unset WORLD_SIZE."
        ) from error
    if not (0 <= found.rank < count and 0 <= found.local_rank < local <= count and count % local == 0):
        raise ProcessError(f"the environment announces {found}, which cannot be. Every machine needs as many. Start them with torchrun.")
    return found


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """This process among those it was started with, for the length of the block."""
    here = announced()
    if here.count == 1:
        yield here
        return
    import torch.distributed
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy

    for name in ("lightning.fabric", "lightning.pytorch"):  # their lines say nothing about the run
        logging.getLogger(name).setLevel(logging.WARNING)
    strategy = DDPStrategy(process_group_backend="gloo", timeout=_PATIENCE)
    fabric = Fabric(
        accelerator="cpu",  # of the talk; where a process decodes is the recipe's `run.device`
        strategy=strategy,
        devices=here.local,
        num_nodes=here.count // here.local,
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    yield here
    torch.distributed.destroy_process_group()


def require_alone(command: str) -> None:
    """Raises ProcessError where a command that does all of its work itself was started several times at once."""
    here = announced()
    if here.count > 1:
        raise ProcessError(
            f"{command} works in one process, got {here.count}. Each would do, and write, the same. Start it without torchrun; "
            "compare and train take several."
        )
