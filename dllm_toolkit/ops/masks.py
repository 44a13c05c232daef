"""Who may look at whom: one formula for training and decoding.

    full              block_causal (blocks 0 0 | 1 1 | 2 2)        causal
    q\\k 0 1 2 3       q\\k 0 1 2 3 4 5                             q\\k 0 1 2 3
    0   x x x x       0   x x . . . .                              0   x . . .
    1   x x x x       1   x x . . . .                              1   x x . .
    2   x x x x       2   x x x x . .                              2   x x x .
    3   x x x x       4   x x x x x x                              3   x x x x

Block 0 is the prompt; answer blocks count from 1 and start at the prompt's end, as in D2F (arXiv 2508.09192). Models trained on multiples
of the block size (SDAR, arXiv 2510.06303) count all blocks from position 0, the prompt's included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit.ops.lanes import SheetLanes
from dllm_toolkit.types import Attention

Lengths = int | tuple[int, ...]
"""One block length, or the lengths of the first blocks; the last one goes on."""


def block_number(offset: Int[Tensor, "*shape"], lengths: Lengths) -> Int[Tensor, "*shape"]:
    """Which block (0, 1, ...) an offset from the first block's start lies in."""
    if isinstance(lengths, int):
        return offset.div(lengths, rounding_mode="floor")
    number, edge = torch.zeros_like(offset), 0
    for one in lengths[:-1]:
        edge += one
        number = number + (offset >= edge)
    return number + (offset - edge).clamp(min=0).div(lengths[-1], rounding_mode="floor")


def answer_blocks(begin: Int[Tensor, "B"], length: int, block_length: Lengths) -> Int[Tensor, "B L"]:
    """Block index of every position: 0 up to each row's `begin`, then 1, 2, ... for each `block_length` positions."""
    offset = torch.arange(length, device=begin.device) - begin.unsqueeze(1)
    return torch.where(offset < 0, 0, block_number(offset, block_length) + 1)


def absolute_blocks(rows: int, length: int, block_length: Lengths, device: torch.device) -> Int[Tensor, "B L"]:
    """Block index of every position when blocks count from position 0: 1, 1, ..., 2, 2, ..., for prompt and answer alike."""
    return (block_number(torch.arange(length, device=device), block_length) + 1).expand(rows, length)


def block_causal(block: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """allow[b, q, k] = block[b, k] <= block[b, q]."""
    return block.unsqueeze(1) <= block.unsqueeze(2)


def lanes_allow(
    attention: Attention,
    visible: Bool[Tensor, "B L"],
    block: Int[Tensor, "B L"],
    positions: Int[Tensor, "B W"],
) -> Bool[Tensor, "B W L"]:
    """What each lane may see of the canvas: everything visible that the model's attention rule lets through.

    positions: canvas position of each lane; L stands for "dead lane" and sees what position L - 1 sees.
    """
    keys = visible.unsqueeze(1)  # [B, 1, L]
    if attention == "full":
        return keys.expand(-1, positions.shape[1], -1)
    length = block.shape[1]
    where = positions.clamp(max=length - 1)
    if attention == "causal":
        return keys & (torch.arange(length, device=block.device) <= where.unsqueeze(2))
    return keys & (block.unsqueeze(1) <= block.gather(1, where).unsqueeze(2))


def sheets_allow(
    attention: Attention,
    visible: Bool[Tensor, "B C L"],
    moved: Bool[Tensor, "B C L"],
    block: Int[Tensor, "B C L"],
    lane: SheetLanes,
    scratch: int,
) -> Bool[Tensor, "B W K"]:
    """What each lane may see when C canvases of a row share its slots, and when shadows ask for tokens anew.

    A canvas is a hypothesis: it sees the slots of the row (what earlier forwards left there) except where it has lanes of its own, whose
    keys stand in scratch slots, and of those only its own. A shadow lane holds the mask token at a position and asks what would stand
    there: it sees its canvas without that position, and the shadows of its canvas (arXiv 2507.18578); canvas lanes see no shadow.

        two canvases a, b of 4 positions, 2 and 3 computed        one canvas, computed in place, shadows of 2 and 3

                     slots      scratch                                        slots      scratch
        lanes        0 1 2 3    a2 a3 b2 b3                        lanes        0 1 2 3    s2 s3
        a2, a3       x x . .    x  x  .  .                         0, 1, 2, 3   x x x x    .  .
        b2, b3       x x . .    .  .  x  x                         s2           x x . x    x  x
                                                                   s3           x x x .    x  x

    visible: what each canvas may see. moved: positions whose keys for that canvas stand in scratch slots. scratch: number of those slots.
    The model's own rule comes on top. Dead lanes see something too; the caller decides what.
    """
    rows, _, length = visible.shape
    sheet = lane.sheet.unsqueeze(2)  # [B, W, 1]
    where = lane.positions.clamp(max=length - 1)  # [B, W]
    keys = (visible & ~moved).gather(1, sheet.expand(-1, -1, length))  # [B, W, L]
    place = torch.arange(length, device=visible.device)
    keys = keys & ~(lane.shadow.unsqueeze(2) & (place == where.unsqueeze(2)))

    def of_slot(values: Tensor, nothing: int) -> Tensor:
        """A lane's value at its scratch slot [B, 1, scratch]; lanes elsewhere fall into one slot more, which is cut off."""
        caught = torch.full((rows, scratch + 1), nothing, dtype=values.dtype, device=values.device)
        return caught.scatter(1, lane.scratch, values)[:, :scratch].unsqueeze(1)

    other, other_shadow, other_where = of_slot(lane.sheet, -1), of_slot(lane.shadow, 0), of_slot(where, 0)
    beside = (other == sheet) & (lane.shadow.unsqueeze(2) | ~other_shadow)
    itself = lane.shadow.unsqueeze(2) & ~other_shadow & (other_where == where.unsqueeze(2))
    beside = beside & ~itself  # [B, W, scratch]
    if attention == "causal":
        keys = keys & (place <= where.unsqueeze(2))
        beside = beside & (other_where <= where.unsqueeze(2))
    elif attention == "block_causal":
        mine = block.flatten(1).gather(1, lane.sheet * length + where)  # [B, W]
        keys = keys & (block.gather(1, sheet.expand(-1, -1, length)) <= mine.unsqueeze(2))
        beside = beside & (of_slot(mine, 0) <= mine.unsqueeze(2))
    return torch.cat((keys, beside), dim=2)


def sees_block_diffusion(q_block: Tensor, q_clean: Tensor, k_block: Tensor, k_clean: Tensor) -> Tensor:
    """The rule of block-diffusion training, for labels of any shapes that broadcast: a lane's block, and whether it is of the clean half.

    A noisy block sees itself and the clean blocks before it; clean blocks see the clean blocks up to themselves, and never noise.

            noisy  clean               block 1 and 2, two tokens each, behind a prompt (block 0, clean only)
            1 1 2 2  0 1 1 2 2
        1   x x . .  x . . . .
        2   . . x x  x x x . .
        0   . . . .  x . . . .
        1   . . . .  x x x . .
        2   . . . .  x x x x x

    Reference: BD3-LM, arXiv 2503.09573.
    """
    itself = ~q_clean & ~k_clean & (q_block == k_block)
    return itself | (~q_clean & k_clean & (k_block < q_block)) | (q_clean & k_clean & (k_block <= q_block))


def block_diffusion(block: Int[Tensor, "B W"], clean: Bool[Tensor, "B W"]) -> Bool[Tensor, "B W W"]:
    """`sees_block_diffusion` of every pair of lanes, dense."""
    return sees_block_diffusion(block.unsqueeze(2), clean.unsqueeze(2), block.unsqueeze(1), clean.unsqueeze(1))


def block_diffusion_mod(block: Int[Tensor, "B W"], clean: Bool[Tensor, "B W"]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a `mask_mod` of flex attention."""

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees_block_diffusion(block[b, q], clean[b, q], block[b, k], clean[b, k])

    return rule


def annealed_causal(length: int, share: float, generator: torch.Generator) -> Bool[Tensor, "L L"]:
    """The past, and each pair of the future with probability `share`: causal at 0, full at 1 (DiffuLLaMA, arXiv 2410.17891)."""
    uniform = torch.rand((length, length), generator=generator, device=generator.device)
    place = torch.arange(length, device=generator.device)
    return (place.unsqueeze(0) <= place.unsqueeze(1)) | (uniform < share)
