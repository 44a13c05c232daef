"""What the engine asks of a model: one call on packed lanes.

A model sees *lanes*: tokens with positions and slots. A lane's key and value are written to its slot of the K/V buffer, and a
lane may look at the slots that `allow` names. Rules, caches and blocks do not exist at this level.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.registry import declare
from dllm_toolkit.types import ModelSpec


class Flat(NamedTuple):
    """The live lanes of all rows one behind the other, [1, N] instead of [B, W]: for all that a layer computes where no lane sees another.

    lane: the number b * W + w of each of them; place: the place of every lane among them. Places behind the last live lane repeat a dead
    one, which ends in the trash slot; dead lanes have the place of any other, and are read by nobody.
    """

    lane: Int[Tensor, "N"]
    place: Int[Tensor, "B W"]

    def of(self, values: Tensor) -> Tensor:
        """Values of lanes [B, W, ...] at the flat ones [1, N, ...]."""
        return values.flatten(0, 1).index_select(0, self.lane).unsqueeze(0)

    def back(self, values: Tensor) -> Tensor:
        """Values of flat lanes [1, N, ...] at every lane [B, W, ...]."""
        return values.squeeze(0).index_select(0, self.place.flatten()).view(*self.place.shape, *values.shape[2:])


class Query(NamedTuple):
    """One forward. With no K/V buffer the keys are the lanes themselves: `slots` is None and S == W.

    `read` names slots, not lanes: a shift-1 model reads position i from the row of position i - 1, which may have been
    computed in an earlier forward and is then remembered by the buffer. None reads every lane. `prompt` marks the lanes that
    hold the prompt, for models that treat it apart (guidance); most ignore it. `added` is added to the lanes' embeddings, for wrappers
    that feed something back. `flat` lets a model skip the dead lanes of a batch; only a transformer that is asked directly gets it.
    """

    tokens: Int[Tensor, "B W"]
    positions: Int[Tensor, "B W"]
    slots: Int[Tensor, "B W"] | None = None
    allow: Bool[Tensor, "B W S"] | None = None
    read: Int[Tensor, "B R"] | None = None
    prompt: Bool[Tensor, "B W"] | None = None
    added: Float[Tensor, "B W width"] | None = None
    flat: Flat | None = None


@runtime_checkable
class Model(Protocol):
    """Anything that answers a Query. `spec` says what it is; `dtype` and `device` where its buffers belong.

    Contract (checked by testing/contract.py): the answer for a read slot depends on the tokens and positions in the allowed
    slots only; a lane of one row never depends on another row. A model that answers some lanes from memory may say in a method
    `computed(kv)` how many query tokens of each row really ran [B] (models/wrapper.py).
    """

    @property
    def spec(self) -> ModelSpec: ...

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]: ...

    def buffer(self, rows: int, slots: int) -> KVBuffer: ...


declare("model", Model)
