"""A stop rule for texts that end in words rather than in an end-of-text token: an end tag, a separator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_toolkit.decoders.base import DecodeError, Stop, check_ids
from dllm_toolkit.registry import register
from dllm_toolkit.state import Proposal, Region, State, Verdict
from dllm_toolkit.types import Canvas, ModelSpec, PyTree, Result


@register("stop", "at_sequence")
@dataclass(frozen=True)
class AtSequence(Stop):
    """Stop a row behind the first place where it has written the tokens `ids` and nothing before them is masked; else as `inner` says.

    Reference: TCCF's end of thinking, arXiv 2602.09555.
    """

    cite = ("2602.09555",)

    ids: tuple[int, ...]
    inner: Stop

    def __post_init__(self) -> None:
        if not self.ids:
            raise DecodeError("ids is empty. There is nothing to wait for. Write the token ids of an end tag, such as ids: [17, 4].")

    def check_model(self, spec: ModelSpec) -> None:
        check_ids(spec, "ids", self.ids)

    def init(self, state: State) -> PyTree:
        return self.inner.init(state)

    def check(self, proposal: Proposal, region: Region, state: State) -> Verdict:
        length = state.tokens.shape[1]
        verdict = self.inner.check(proposal, region, state)
        first_mask = torch.where(state.masked, state.positions, length).amin(1)
        found = torch.where(written(state, self.ids), state.positions, length).amin(1) + len(self.ids)
        here = (found <= first_mask) & (found <= length) & state.settled
        sooner = here & (~verdict.done | (found < verdict.end))
        reason = verdict.result if isinstance(verdict.result, Tensor) else int(verdict.result)
        reason = torch.where(sooner, int(Result.STOP_SEQUENCE), reason)
        return replace(verdict, done=verdict.done | here, end=torch.where(sooner, found, verdict.end), result=reason)


def written(state: State, ids: Sequence[int]) -> Canvas:
    """Where the sequence `ids` begins among the decided tokens of the answer that were not given."""
    found = torch.ones_like(state.masked)
    own = ~state.masked & ~state.fixed & state.inside
    for offset, one in enumerate(ids):
        found = found & _ahead((state.tokens == one) & own, offset)
    return found


def _ahead(flags: Tensor, offset: int) -> Tensor:
    """flags[:, i + offset] at i, False beyond the end."""
    return F.pad(flags[:, offset:], (0, min(offset, flags.shape[1])))
