"""Exponential moving average of the trained parameters: used for validation, for decoding while training, and for what is exported.

Sharded parameters have sharded averages. Their state is whole, so that a run may be resumed with another number of devices; making and
loading it takes all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """A sharded tensor put together, on all processes, which must all ask; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class Average:
    """shadow <- d shadow + (1 - d) parameter, with d = min(decay, (1 + n) / (10 + n)) so that the start does not linger.

    Only trainable parameters are averaged (with LoRA: the adapter), always in float32.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._live = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shadow = [parameter.detach().float().clone() for parameter in self._live]
        self._swapped = False

    def to(self, device: torch.device) -> None:
        """Move the averages to `device`, where the parameters are."""
        self.shadow = [shadow.to(device) for shadow in self.shadow]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present parameters. Call once after each optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [parameter.detach().float() for parameter in self._live]
        torch._foreach_lerp_(self.shadow, live, 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their averages, in place; a second call undoes the first."""
        for parameter, shadow in zip(self._live, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)
        self._swapped = not self._swapped

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged parameters. Nested blocks leave them in."""
        if self._swapped:
            yield
            return
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Tensor | int]:
        assert not self._swapped, "the averages are swapped in; the state would hold the live parameters"
        return {"updates": self.updates, **{f"shadow.{name}": whole(t) for name, t in zip(self.names, self.shadow, strict=True)}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, shadow in zip(self.names, self.shadow, strict=True):
            value = state[f"shadow.{name}"]
            assert isinstance(value, Tensor)
            value = value.to(shadow.device)
            if isinstance(shadow, DTensor):
                value = distribute_tensor(value, shadow.device_mesh, shadow.placements)
            shadow.copy_(value)
