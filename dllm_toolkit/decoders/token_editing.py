"""LLaDA2.1's token editing: masks become tokens, and decided tokens become other tokens, in the same forward.

    for the open block, one forward:  v_i <- most probable token, q_i <- its probability
        fill  {i masked : q_i > tau_mask}            at least the surest `minimum`                  mask to token
        edit  {i decided before : v_i != x_i and q_i > tau_edit}                                    token to token
        do both at once
    the block is finished by a forward that found no mask and edits nothing, or by the `max_post_steps`-th forward that found no mask

         forward   1          2          3          4                 tau_mask .5, tau_edit 0
                   . . . .    A . C .    A B D .    A B D E           forward 2 reads C, edits it to D and commits B
                                                    found no mask, edits nothing: finished

Speed mode commits early and lets edits repair; quality mode asks for more on both sides. Two variants: *token to mask* takes a suspect
token back instead of overwriting it, so that it is decided anew without its own influence; *multi-block editing* keeps finished blocks open
for edits until the answer is finished, and no cache may keep their keys.

Two coupled positions can swap for ever (A B, B A, A B, ...). `max_post_steps` ends that; `no_return` forbids it.

Reference: LLaDA2.1, arXiv 2602.08676. Token to mask: Targeted Remasking, arXiv 2604.18738.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Revise
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import full, standing
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.registry import register
from dllm_toolkit.state import Edit, Proposal, Region, State
from dllm_toolkit.types import Canvas, Tokens


@dataclass(frozen=True)
class Editing:
    """State of EditTokens: forwards of the open span that found no mask, their epoch, changes and last token of each position."""

    spent: Int[Tensor, "B"]
    epoch: Int[Tensor, "B"]
    times: Int[Tensor, "B L"]
    left: Tokens  # the token that the last edit of a position replaced; -1: none


@register("revise", "edit_tokens")
@dataclass(frozen=True)
class EditTokens(Revise):
    """Change the suspect tokens of the open span, while it fills and afterwards, until nothing is suspect or a cap is reached.

    suspect: "outvoted" when the model now proposes another token with probability > `threshold`; "improbable" when the present token's
    probability is < `threshold`. action: "replace" a suspect by the proposal, or "remask" it. A span is settled by a forward that found no
    mask in it and changes nothing, or by the `max_post_steps`-th one that found no mask (0: as soon as it is full). limit: changes of one
    position, None without limit. no_return: never put back the token that a position's last edit replaced.

    Reference: LLaDA2.1, arXiv 2602.08676; improbable tokens remasked at most three times: arXiv 2604.18738.
    """

    cite = ("2602.08676", "2604.18738")

    threshold: float = 0.5
    max_post_steps: int = 16
    action: Literal["replace", "remask"] = "replace"
    suspect: Literal["outvoted", "improbable"] = "outvoted"
    limit: int | None = None
    no_return: bool = False

    def __post_init__(self) -> None:
        if self.max_post_steps < 0:
            raise DecodeError(
                f"max_post_steps must be 0 or more, got {self.max_post_steps}. It counts forwards of a full block. "
                "Write max_post_steps: 16."
            )
        if self.limit is not None and self.limit < 0:
            raise DecodeError(f"limit must be 0 or more, got {self.limit}. It counts changes of one position. Write limit: 3, or null.")
        if self.action == "remask" and self.limit is None:
            raise DecodeError(
                "remask needs a limit, got limit=None. A token may be taken back and decided again as the same one for ever. "
                "Write limit: 3."
            )
        if self.action == "remask" and self.no_return:
            raise DecodeError(
                "no_return does not go with remask, got no_return=True. A position that is masked again may become any token. Remove "
                "no_return; limit bounds how often."
            )
        if self.action == "replace" and self.suspect == "improbable":
            raise DecodeError(
                "improbable tokens can only be remasked, got action='replace'. The proposal may be the improbable token itself. Write "
                "action: remask and limit: 3."
            )

    @property
    def idle(self) -> bool:
        """Can nothing ever be changed?"""
        never = self.threshold >= 1 if self.suspect == "outvoted" else self.threshold <= 0
        return never or self.limit == 0

    @property
    def net_progress(self) -> bool:
        return self.action == "replace" or self.idle

    def extra_steps(self, answer_length: int) -> int:
        if self.idle:
            return 0
        again = self.limit or 0 if self.action == "remask" else 0
        return answer_length * (self.max_post_steps + again)  # as if every token were a block

    def init(self, state: State) -> Editing:
        nothing = torch.zeros_like(state.begin)
        return Editing(nothing, nothing - 1, torch.zeros_like(state.tokens), torch.full_like(state.tokens, -1))

    def edit(self, proposal: Proposal, region: Region, before: State, after: State) -> Edit:
        own: Editing = before.parts.revise
        found_none = full(region, before)
        spent = own.spent.masked_fill(region.epoch != own.epoch, 0) + found_none.long()
        suspects = self._suspects(proposal, region, before)
        if self.limit is not None:
            suspects = suspects & (own.times < self.limit)
        if self.no_return:
            suspects = suspects & (proposal.tokens != own.left)
        nothing = torch.zeros_like(suspects)
        swap, back = (suspects, nothing) if self.action == "replace" else (nothing, suspects)
        left = torch.where(swap, before.tokens, own.left)
        # The account is a tensor of its own, not the region's: a compiled step notices when two fields are one.
        carry = Editing(spent, region.epoch.clone(), own.times + suspects.long(), left)
        if self.idle:
            return Edit(nothing, nothing, torch.ones_like(found_none), carry)
        filled = full(region, after) & ~back.any(1)
        settled = (found_none & ~suspects.any(1)) | (filled & (spent >= self.max_post_steps))
        return Edit(swap, back, settled, carry)

    def _suspects(self, proposal: Proposal, region: Region, before: State) -> Canvas:
        decided = region.changeable(before)
        if self.suspect == "improbable":
            return decided & (standing(proposal, before.tokens, before) < self.threshold)
        return decided & (proposal.tokens != before.tokens) & (proposal.confidence > self.threshold)


MODES = {"quality": (0.7, 0.5), "speed": (0.5, 0.0)}


@register("decoder", "llada21")
def llada21(
    mode: Literal["quality", "speed"] = "quality",
    block_length: int | None = 32,
    threshold: float | None = None,
    edit_threshold: float | None = None,
    max_post_steps: int = 16,
    minimum: int = 1,
    action: Literal["replace", "remask"] = "replace",
    suspect: Literal["outvoted", "improbable"] = "outvoted",
    limit: int | None = None,
    no_return: bool = False,
    reach: Literal["block", "answer"] = "block",
    temperature: float = 0.0,
) -> BlockDecoder:
    """LLaDA2.1 (arXiv 2602.08676): tokens are committed and edited in the same forwards, for block-causal models with blocks of 32.

    mode: `threshold` and `edit_threshold` of the paper, .7 and .5 for quality, .5 and 0 for speed; either may be set apart. minimum: tokens
    committed in every forward that finds masks. action remask, suspect improbable, edit_threshold .1, limit 3: Targeted Remasking
    (arXiv 2604.18738). reach answer: multi-block editing.
    """
    to_commit, to_edit = MODES[mode]
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length, reach=reach),
        commit=Gate(to_commit if threshold is None else threshold, strict=True, minimum=minimum),
        propose=Sample(temperature=temperature),
        revise=EditTokens(to_edit if edit_threshold is None else edit_threshold, max_post_steps, action, suspect, limit, no_return),
    )
