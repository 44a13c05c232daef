"""How likely was a sampled answer? What stands for its likelihood in a policy gradient, as views and weights.

A diffusion model has no cheap likelihood of a sampled answer o, so every method puts a score s_i in its place, a weighted sum over views
(partly masked copies of the row) of the token's log-probability in each:

    s_i = sum_v w_vi log p(o_i | view v)

    one_step     d1           one view, the whole answer masked and a few prompt tokens too                    arXiv 2504.12216
    coupled      DiffuCoder   the whole answer masked; a random half of it; the other half                     arXiv 2506.20639
    trajectory   CJ-GRPO      the states that the decoder itself went through, each token where it was born    arXiv 2509.23924
    rounds       TraceRL      the same for block-causal models, one step of every block in one row             arXiv 2509.06949

All policies (the present one, the one that sampled, the reference) score the very same `Views`, which are drawn once. Log-probabilities
are those of the model at temperature 1, without the mask token, whatever the temperature of the rollouts.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import corrupt
from dllm_toolkit.ops.masks import block_diffusion
from dllm_toolkit.registry import declare, register
from dllm_toolkit.training.layouts import Own, model_blocks
from dllm_toolkit.training.losses import wide
from dllm_toolkit.training.rollouts import Rollouts
from dllm_toolkit.types import ModelSpec


class PolicyError(ToolkitError):
    """A policy gradient that the model or the decoder cannot serve."""


class Views(NamedTuple):
    """What the model is shown of each row, and how much a token's log-probability in each view counts (0: not asked there).

    doubled: the model reads `[view | clean row]`, and a block of the view sees the clean blocks before it.
    """

    tokens: Int[Tensor, "N B L"]
    weight: Float[Tensor, "N B L"]
    doubled: bool = False


class Estimator(abc.ABC):
    """Which views stand for the likelihood of an answer.

    random: drawn anew for each update. needs_trace: reads the step at which each token was born, so the decoder must not change its mind.
    """

    random: ClassVar[bool] = False
    needs_trace: ClassVar[bool] = False

    def check(self, spec: ModelSpec) -> None:  # noqa: B027 - most estimators take every model
        """Raise PolicyError if the model cannot be asked this way."""

    @abc.abstractmethod
    def views(self, rollouts: Rollouts, spec: ModelSpec, generator: torch.Generator) -> Views:
        """The views of every row. `generator` lives on the rollouts' device; what it draws is the only randomness."""


declare("estimator", Estimator)


@register("estimator", "one_step")
@dataclass(frozen=True)
class OneStep(Estimator):
    """d1: log p(o_i | the whole answer masked), in one forward; prompt tokens are masked with probability `prompt_masking`.

    Reference: d1 (diffu-GRPO), arXiv 2504.12216. The product of these marginals is not the likelihood of the answer.
    """

    random = True
    prompt_masking: float = 0.15

    def __post_init__(self) -> None:
        corrupt.check_interval(self.prompt_masking, 1.0)

    def views(self, rollouts: Rollouts, spec: ModelSpec, generator: torch.Generator) -> Views:
        batch = rollouts.batch
        hidden = corrupt.draw(tuple(batch.tokens.shape), generator) < self.prompt_masking
        masked = torch.where(batch.inside & ~batch.answer, hidden, batch.answer)
        return Views(batch.tokens.masked_fill(masked, spec.mask_id)[None], rollouts.counted.float()[None])


@register("estimator", "coupled")
@dataclass(frozen=True)
class Coupled(Estimator):
    """Three views a pair: all masked, a random set M of level t ~ U[minimum, maximum], and the rest of the answer.

        s_i = (l_i(all) + sum over pairs u_i) / (pairs + 1),   u_i = l_i(M) / t if i in M, else l_i(not M) / (1 - t)

    Every token is in exactly one half of a pair, so the halves' errors cancel in part. `weighted` false drops 1/t and 1/(1-t), whose
    expectation makes the score 1.5 times a log-probability.

    Reference: coupled-GRPO of DiffuCoder, arXiv 2506.20639.
    """

    random = True
    pairs: int = 1
    minimum: float = 0.2
    maximum: float = 0.8
    weighted: bool = True

    def __post_init__(self) -> None:
        corrupt.check_interval(self.minimum, self.maximum)
        if self.pairs < 1:
            raise PolicyError(f"pairs must be at least 1, got {self.pairs}. It counts pairs of complementary masks. Write pairs: 1.")

    def views(self, rollouts: Rollouts, spec: ModelSpec, generator: torch.Generator) -> Views:
        batch = rollouts.batch
        rows = batch.tokens.shape[0]
        masks, weights = [batch.answer], [torch.ones_like(rollouts.counted, dtype=torch.float32)]
        for _ in range(self.pairs):
            level = self.minimum + (self.maximum - self.minimum) * corrupt.draw((rows, 1), generator)
            half = corrupt.bernoulli(level, batch.answer, generator)
            for mask, share in ((half, level), (batch.answer & ~half, 1.0 - level)):
                masks.append(mask)
                weights.append(mask / torch.where(share > 0, share, 1.0) if self.weighted else mask.float())
        weight = torch.stack(weights) * rollouts.counted / (self.pairs + 1)
        return Views(torch.stack([batch.tokens.masked_fill(mask, spec.mask_id) for mask in masks]), weight)


def groups_of_steps(born: Int[Tensor, "B L"], counted: Bool[Tensor, "B L"], shrink: int) -> Int[Tensor, "B L"]:
    """Number the steps of each row in which tokens were born, 0, 1, ..., and merge every `shrink` of them; -1 where nothing counts."""
    rows, length = born.shape
    used = torch.zeros((rows, int(born.max()) + 2), dtype=torch.long, device=born.device)
    used = used.scatter(1, torch.where(counted, born, used.shape[1] - 1), 1)
    rank = used[:, :-1].cumsum(1) - 1  # of each step among the used ones
    return torch.where(counted, rank.gather(1, born.clamp(min=0)).div(shrink, rounding_mode="floor"), -1)


@dataclass(frozen=True)
class _Steps(Estimator):
    """The decoder's own states, `shrink` consecutive steps in each."""

    needs_trace = True
    shrink: int = 1

    def __post_init__(self) -> None:
        if self.shrink < 1:
            raise PolicyError(f"shrink must be at least 1, got {self.shrink}. So many steps become one view. Write shrink: 1.")

    def states(self, rollouts: Rollouts, group: Int[Tensor, "B L"], spec: ModelSpec, doubled: bool = False) -> Views:
        """View v is what stood before group v was decided, and asks for it. What nobody decided (-1, fill) was masked throughout."""
        number = torch.arange(int(group.max()) + 1, device=group.device).view(-1, 1, 1)
        masked = rollouts.batch.answer & ((group >= number) | (group < 0))
        return Views(rollouts.decided.masked_fill(masked, spec.mask_id), (rollouts.counted & (group == number)).float(), doubled)


@register("estimator", "trajectory")
@dataclass(frozen=True)
class Trajectory(_Steps):
    """The decoder's own states: view s has masks where it had them before step s, and scores the tokens that were born in it.

    With shrink 1 these are the conditionals that the answer was sampled from, at one forward a step; `shrink` consecutive steps share a
    view otherwise, as TraceRL does for models with full attention.

    References: CJ-GRPO, arXiv 2509.23924; TraceRL, arXiv 2509.06949.
    """

    def views(self, rollouts: Rollouts, spec: ModelSpec, generator: torch.Generator) -> Views:
        # Steps are numbered over all that was decided, also behind the end of text: the model saw those tokens.
        decided = rollouts.batch.answer & (rollouts.born >= 0)
        return self.states(rollouts, groups_of_steps(rollouts.born, decided, self.shrink), spec)


@register("estimator", "rounds")
@dataclass(frozen=True)
class Rounds(_Steps):
    """The decoder's own states of a block-causal model: in view j every block stands before its j-th step, behind clean blocks.

    As exact as `trajectory` for decoders that finish a block before they begin the next, with at most block_size / shrink views.

    Reference: TraceRL, arXiv 2509.06949.
    """

    def check(self, spec: ModelSpec) -> None:
        if spec.attention != "block_causal" or spec.shift:
            raise PolicyError(
                f"rounds need a block-causal model with shift 0, got attention {spec.attention!r} and shift {spec.shift}. Blocks of one "
                "view must not see each other's masks. Write estimator: trajectory."
            )

    def views(self, rollouts: Rollouts, spec: ModelSpec, generator: torch.Generator) -> Views:
        answer, block = rollouts.batch.answer, model_blocks(rollouts.batch, spec)
        group = torch.full_like(rollouts.born, -1)
        for one in range(int(block.min()), int(block[answer].max()) + 1):
            here = answer & (block == one) & (rollouts.born >= 0)
            group = torch.where(here, groups_of_steps(rollouts.born, here, self.shrink), group)
        return self.states(rollouts, group, spec, doubled=True)


def view_logits(model: Transformer, seen: Int[Tensor, "B L"], rollouts: Rollouts, doubled: bool) -> Float[Tensor, "B L V"]:
    """Logits of views, one for each row of `rollouts`, under the model's own attention rule."""
    spec, batch = model.spec, rollouts.batch
    if not doubled:
        return model.logits(seen, Own(spec)(batch, seen, spec.shift).allow)
    length = seen.shape[1]
    block, place = model_blocks(batch, spec), torch.arange(length, device=seen.device)
    both, places = torch.cat((seen, rollouts.tokens), dim=1), torch.cat((place, place))
    allow = block_diffusion(torch.cat((block, block), dim=1), (torch.arange(2 * length, device=seen.device) >= length).expand_as(both))
    return model.logits(both, allow, places.expand_as(both))[:, :length]


def score(model: Transformer, rollouts: Rollouts, views: Views, rows: slice = slice(None)) -> Float[Tensor, "B L"]:
    """s_i of the chosen rows under `model`: sum over views of weight times log-probability, float32 or wider; 0 where nothing is asked."""
    weight, chosen = views.weight[:, rows], rollouts.pick(rows)
    view, row = (weight != 0).any(-1).nonzero(as_tuple=True)  # views without a question are not run
    part, spec = chosen.pick(row), model.spec
    logits = wide(view_logits(model, views.tokens[:, rows][view, row], part, views.doubled))  # [P, L, V]
    if spec.mask_id < spec.vocab_size:
        logits = logits.index_fill(-1, torch.tensor([spec.mask_id], device=logits.device), float("-inf"))
    found = logits.log_softmax(-1).gather(-1, part.tokens.unsqueeze(-1)).squeeze(-1)
    asked = weight[view, row]
    found = torch.where(asked != 0, found * asked, 0.0)
    return torch.zeros_like(chosen.tokens, dtype=found.dtype).index_add(0, row, found)


def packed(views: Views, limit: int) -> Iterator[slice]:
    """Consecutive rows whose views together are at most `limit` sequences (one row at least)."""
    sizes = (views.weight != 0).any(-1).sum(0).tolist()
    first, total = 0, 0
    for row, size in enumerate(sizes):
        if row > first and total + size > limit:
            yield slice(first, row)
            first, total = row, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))
