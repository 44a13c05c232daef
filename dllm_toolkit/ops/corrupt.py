"""Forward masking processes: how a clean answer becomes a partly masked one, as pure functions of given random numbers.

Three kinds of function, so that a training objective is a sentence made of them:

    levels     how much is masked       uniform_levels [B]      monotone_levels, independent_levels, pipelined_levels [B, N]
    masks      which positions          bernoulli, exact_count [B, L]
    geometry   what is where            answer_region, spread (and answer_blocks in ops/masks.py)

Levels t lie in [0, 1]: 0 is clean, 1 is fully masked. Every draw takes an explicit `torch.Generator`; nothing touches the global one,
so a training step can be replayed from (seed, step). Only positions in `candidates` are ever masked: the prompt is not among them.

References: LLaDA (arXiv 2502.09992) for uniform levels and the exact-count estimator; D2F (arXiv 2508.09192) for monotone block levels,
as its code draws them (D2F-train/utils/util.py at 771f745).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.errors import ToolkitError


class CorruptionError(ToolkitError):
    """A masking process whose parameters make no sense."""


def check_interval(minimum: float, maximum: float) -> None:
    """Raise CorruptionError unless 0 <= minimum <= maximum <= 1."""
    if not 0.0 <= minimum <= maximum <= 1.0:
        raise CorruptionError(
            f"noise levels must satisfy 0 <= minimum <= maximum <= 1, got minimum={minimum} and maximum={maximum}. "
            "A level is the share of a block that is masked. Write minimum: 0.2 and maximum: 0.7 for D2F's own interval."
        )


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Uniform numbers in [0, 1), float32, on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def answer_region(prompt_length: Int[Tensor, "B"], answer_length: int, length: int) -> Bool[Tensor, "B L"]:
    """The answer positions of each row: `answer_length` of them from the end of the prompt, padding to the right excluded."""
    offset = torch.arange(length, device=prompt_length.device) - prompt_length.unsqueeze(1)
    return (offset >= 0) & (offset < answer_length)


def uniform_levels(rows: int, generator: torch.Generator, *, stratified: bool = True) -> Float[Tensor, "B"]:
    """t ~ U[0, 1) for each row. Stratified: one draw in each of B equal strata, in random order, which lowers the loss's variance."""
    uniform = draw((rows,), generator)
    if not stratified:
        return uniform
    return (torch.randperm(rows, generator=generator, device=generator.device) + uniform) / rows


def monotone_levels(
    rows: int, blocks: int, generator: torch.Generator, *, minimum: float = 0.2, maximum: float = 0.7
) -> Float[Tensor, "B N"]:
    """D2F's schedule: t_1 ~ U[minimum, maximum], then increments u (maximum - t_1) / (N - 1), so t never falls and never passes maximum."""
    check_interval(minimum, maximum)
    first = minimum + (maximum - minimum) * draw((rows, 1), generator)
    if blocks == 1:
        return first
    steps = draw((rows, blocks - 1), generator) * (maximum - first) / (blocks - 1)
    return torch.cat((first, first + steps.cumsum(1)), dim=1)


def independent_levels(
    rows: int, blocks: int, generator: torch.Generator, *, minimum: float = 0.2, maximum: float = 0.7
) -> Float[Tensor, "B N"]:
    """D2F's ablation: every block draws its own level in [minimum, maximum]."""
    check_interval(minimum, maximum)
    return minimum + (maximum - minimum) * draw((rows, blocks), generator)


def pipelined_levels(rows: int, blocks: int, generator: torch.Generator, *, span: int = 3, minimum: float = 0.0) -> Float[Tensor, "B N"]:
    """The states that a pipelined decoder passes through: blocks before a random front are clean, then noise rises to full.

    The front a ~ U{0..N-1}; t_a ~ U[minimum, 1]; after it the level rises by uniform parts of the rest, reaching 1 within about
    `span` blocks. Blocks before the front have level 0.
    """
    check_interval(minimum, 1.0)
    uniform = draw((rows, blocks), generator)
    front = (draw((rows, 1), generator) * blocks).long()
    after = torch.arange(blocks, device=generator.device) - front  # [B, N]
    # 1 - t shrinks by a uniform factor in each block past the front, and is gone after `span` of them.
    kept = torch.where(after >= 0, uniform, torch.ones_like(uniform))
    clean = kept.cumprod(1) * (1.0 - minimum)
    level = torch.where(after >= span, torch.ones_like(clean), 1.0 - clean)
    return torch.where(after < 0, torch.zeros_like(level), level)


def spread(levels: Float[Tensor, "B N"], block: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """The level of each position from the level of its block (blocks count from 1; block 0, the prompt, and overhang get 0)."""
    inside = (block >= 1) & (block <= levels.shape[1])
    return levels.gather(1, (block - 1).clamp(0, levels.shape[1] - 1)) * inside


def bernoulli(level: Float[Tensor, "B #L"], candidates: Bool[Tensor, "B L"], generator: torch.Generator) -> Bool[Tensor, "B L"]:
    """Mask each candidate independently with its level's probability. Level 1 masks for certain, level 0 never does."""
    return (draw(tuple(candidates.shape), generator) < level) & candidates


def exact_count(count: Int[Tensor, "B"], candidates: Bool[Tensor, "B L"], generator: torch.Generator) -> Bool[Tensor, "B L"]:
    """Mask exactly `count` of the candidates of each row, all subsets equally likely (all candidates if there are fewer)."""
    noise = draw(tuple(candidates.shape), generator).masked_fill(~candidates, 2.0)
    rank = noise.argsort(dim=1).argsort(dim=1)
    return (rank < count.unsqueeze(1)) & candidates


def nested_counts(
    counts: Sequence[Int[Tensor, "B"]], candidates: Bool[Tensor, "B L"], generator: torch.Generator
) -> tuple[Bool[Tensor, "B L"], ...]:
    """Masks of several sizes from one random order of the candidates: a smaller one lies inside a larger one."""
    rank = draw(tuple(candidates.shape), generator).masked_fill(~candidates, 2.0).argsort(dim=1).argsort(dim=1)
    return tuple((rank < count.unsqueeze(1)) & candidates for count in counts)


def count_from_level(level: Float[Tensor, "B"], available: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """k = 1 + floor(t n), so that t ~ U[0, 1) gives k ~ U{1..n}; 0 where nothing is available."""
    count = (level * available).long() + 1
    return torch.minimum(count, available)


def pick(uniform: Float[Tensor, "B"], shares: Sequence[float]) -> Int[Tensor, "B"]:
    """Which of len(shares) alternatives each row takes, with probability proportional to its share. No copy from the host."""
    total, bound = sum(shares), 0.0
    taken = torch.zeros_like(uniform, dtype=torch.long)
    for share in shares[:-1]:
        bound += share / total
        taken += uniform >= bound
    return taken
