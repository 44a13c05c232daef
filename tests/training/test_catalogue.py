"""The catalogue of training tests: every number in CATALOGUE.md has tests that exist, or a reason; and those that stand nowhere else."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.ascending_steps import Ascending, ascending_steps
from dllm_toolkit.decoders.base import Commit
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.eoser import RejectEarly
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.evaluation.order import commits_per_step
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.transformer import transformer
from dllm_toolkit.ops import corrupt, masks
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.testing.layouts import read_logits
from dllm_toolkit.testing.models import EOS, VOCABULARY, Oracle, Scripted, tiny_transformer, toy_spec
from dllm_toolkit.training.composed import Copy, hidden
from dllm_toolkit.training.corruptors import Batch, ExactCount, Uniform
from dllm_toolkit.training.estimators import Coupled, OneStep, score
from dllm_toolkit.training.filter import filter_loss
from dllm_toolkit.training.layouts import Annealed, BlockCausal, Doubled, Full, Layout
from dllm_toolkit.training.methods.block_diffusion import BlockDiffusion, sdar
from dllm_toolkit.training.methods.dparallel import CertaintyForcing
from dllm_toolkit.training.objectives import (
    MaskedDiffusion,
    Objective,
    cross_entropy,
    full_allow,
    reverse_kl,
    soft_cross_entropy,
)
from dllm_toolkit.training.oracle import Examples
from dllm_toolkit.training.rollouts import Rollouts
from dllm_toolkit.training.run import TrainRecipe, run_training
from dllm_toolkit.training.terms import entropy
from dllm_toolkit.types import Canvas

TESTS = Path(__file__).parents[1]
ENTRIES = [f"T{n}" for n in range(1, 41)] + [f"I{n}" for n in range(1, 17)] + [f"R{n}" for n in range(1, 14)]
MASK, ANSWER = 10, 12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(attention: Any = "full", shift: Any = 0, block_size: int | None = None):
    return transformer(
        vocab_size=11, mask_id=MASK, eos_ids=[9], pad_id=8, width=16, layers=2, heads=2, mlp_width=32, max_positions=64,
        attention=attention, shift=shift, block_size=block_size, seed=1,
    ).double()  # fmt: skip


def rows(count: int = 4) -> Batch:
    return Batch(torch.randint(0, 8, (count, 22), generator=seeded()), torch.tensor([4, 6, 8, 5] * (count // 4)), ANSWER)


def value(objective: Objective, model: Any, batch: Batch) -> float:
    return float(objective(model, batch, seeded(), progress=0.0).value.detach())


# --- the table


def test_every_number_of_the_catalogue_has_tests_that_exist_or_a_reason() -> None:
    table = {}
    for line in (TESTS / "training" / "CATALOGUE.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| ([TIR]\d+) \|", line):
            assert found[1] not in table, f"{found[1]} stands there twice"
            table[found[1]] = line
    assert list(table) == ENTRIES
    sources: dict[str, str] = {}
    for number, line in table.items():
        named = re.findall(r"`(\w+/\w+\.py)::(\w+)`", line)
        assert named or re.search(r"left out: |see [TIR]\d+", line), f"{number} has neither a test nor a reason"
        for file, name in named:
            text = sources.setdefault(file, (TESTS / file).read_text(encoding="utf-8"))
            assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE), f"{number}: there is no {name} in {file}"


# --- the bound, by enumeration


V, L = 3, 3
JOINT = torch.rand((V,) * L, generator=seeded(5), dtype=torch.float64)
JOINT = JOINT / JOINT.sum()
SUBSETS = [bits for bits in itertools.product((False, True), repeat=L) if any(bits)]
X = (2, 0, 1)


class Knows:
    """A model that knows the joint distribution of three tokens behind a prompt of one."""

    spec = SimpleNamespace(attention="full", shift=0, mask_id=V, block_size=None, vocab_size=V + 1)
    layers = ()
    norm = lm_head = torch.nn.Identity()

    def lanes(self, query: Query, kv: None) -> None:
        return None

    def enter(self, query: Query) -> Tensor:
        return self.logits(query.tokens)

    def logits(self, tokens: Tensor, allow: Tensor | None = None) -> Tensor:
        (row,) = tokens[:, 1:].tolist()
        left = JOINT[tuple(slice(None) if token == V else slice(token, token + 1) for token in row)]
        out = torch.full((1, L + 1, V + 1), 1e-300, dtype=torch.float64)
        for place, token in enumerate(row):
            odds = left.sum([axis for axis in range(L) if axis != place]) / left.sum()
            out[0, place + 1, slice(V) if token == V else token] = odds
        return out.log()


def loss_of(counted: tuple[bool, ...], also: tuple[bool, ...] = (False,) * L) -> float:
    """What the objective says where `counted` is masked and counts once, and `also` is masked and does not count."""
    batch = Batch(torch.tensor([[0, *X]]), torch.tensor([1]), L)
    weight = torch.tensor([[0.0, *counted]], dtype=torch.float64)
    masked = (weight > 0) | torch.tensor([[False, *also]])
    objective, model = MaskedDiffusion(normaliser="none"), cast(Any, Knows())
    view = objective.shown(batch, [Copy(batch.tokens.masked_fill(masked, V), weight)], model.spec, seeded(), 1.0)
    return float(objective.loss(model, batch, view).value)


ALPHA: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 1 - torch.cos(math.pi / 2 * (1 - t)),
    "quadratic": lambda t: (1 - t) ** 2,
}


@pytest.mark.parametrize("name", ALPHA)
def test_the_bound_does_not_depend_on_the_schedule(name: str) -> None:
    """I5: weight -alpha' / (1 - alpha), rate 1 - alpha, integrated over t; whatever alpha, the loss is -log p(x)."""
    edges = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    t = ((edges[1:] + edges[:-1]) / 2).requires_grad_()
    alpha = ALPHA[name](t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    rate = 1 - alpha.detach()
    share = [float((-slope / rate * rate**k * (1 - rate) ** (L - k)).mean()) for k in range(1, L + 1)]
    assert share == pytest.approx([1 / (k * math.comb(L, k)) for k in range(1, L + 1)], abs=1e-7)
    assert sum(share[sum(subset) - 1] * loss_of(subset) for subset in SUBSETS) == pytest.approx(-math.log(JOINT[X]), abs=1e-5)


def test_a_floor_under_the_rate_shifts_the_bound_by_about_the_floor() -> None:
    """I3: p = (1 - eps) t + eps and weight 1/p, integrated; the loss is off by less than L eps."""
    eps = 1e-3
    rate = eps + (1 - eps) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    share = [float((rate ** (k - 1) * (1 - rate) ** (L - k)).mean()) for k in range(1, L + 1)]
    assert share == pytest.approx([0.332667, 0.166833, 0.333667], abs=5e-7)
    exact, found = -math.log(JOINT[X]), sum(share[sum(subset) - 1] * loss_of(subset) for subset in SUBSETS)
    assert 0 < abs(found - exact) < L * eps


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_block_bound_by_enumeration(size: int) -> None:
    """I6: clean blocks before, masks behind; with exact conditionals the sum over blocks is -log p(x) for every block length."""
    total = 0.0
    for start in range(0, L, size):
        inside = range(start, min(L, start + size))
        behind = tuple(place >= start + size for place in range(L))
        for subset in SUBSETS:
            if all(place in inside for place in range(L) if subset[place]):
                total += loss_of(subset, behind) / (sum(subset) * math.comb(len(inside), sum(subset)))
    assert total == pytest.approx(-math.log(JOINT[X]), abs=1e-12)


def test_an_exact_count_has_no_variance_of_weights() -> None:
    """I2: where all tokens are equally hard, its loss is the same for every draw; that of independent masks is not."""
    batch = rows(400)
    exact, drawn = (noise(batch, seeded()).weight.double().sum(1) for noise in (ExactCount(), Uniform()))
    assert torch.allclose(exact, torch.full_like(exact, ANSWER), atol=1e-4) and drawn.std() > 1


def test_stratified_levels_leave_no_gap() -> None:
    """T9: neighbours in order are less than 2/n apart."""
    levels = corrupt.uniform_levels(64, seeded()).sort().values
    assert float(levels.diff().max()) < 2 / 64


# --- views


@pytest.mark.parametrize("layout", [Full(), BlockCausal(4), Annealed(0.0), Annealed(0.5), Annealed(1.0)], ids=str)
def test_who_sees_whom_by_a_loop_over_pairs(layout: Layout) -> None:
    """T11: whole rows, blocks, the past, the past and a part of the future. What is padding nobody sees."""
    batch = rows()
    allow, future = layout(batch, batch.tokens, 0, seeded()).allow, []
    for r, begin in enumerate(batch.prompt_length.tolist()):
        for q, k in itertools.product(range(begin + ANSWER), range(22)):
            if k >= begin + ANSWER:
                expected = False
            elif isinstance(layout, BlockCausal):
                expected = (-1 if k < begin else (k - begin) // 4) <= (-1 if q < begin else (q - begin) // 4)
            elif isinstance(layout, Annealed) and k > q:
                future.append(bool(allow[r, q, k]))
                expected = future[-1] if 0 < layout.share < 1 else layout.share == 1
            else:
                expected = True
            assert bool(allow[r, q, k]) == expected, (r, q, k)
    if isinstance(layout, Annealed):
        assert abs(sum(future) / len(future) - layout.share) < 0.1


@pytest.mark.parametrize("shift", [0, 1])
def test_no_noisy_block_hears_of_what_it_must_not(shift: int) -> None:
    """T12, I7: neither its own clean tokens or later ones, nor the noisy ones of other blocks; earlier clean ones it does hear of."""
    batch, model = rows(), tiny(shift=shift)
    noisy = hidden(batch, model.spec, batch.answer & (torch.rand(batch.tokens.shape, generator=seeded()) < 0.6)).tokens
    block = masks.answer_blocks(batch.prompt_length, 22, 4)

    def logits(clean: Tensor, seen: Tensor) -> Tensor:
        return read_logits(model, Doubled(4)(batch._replace(tokens=clean), seen, shift, seeded())).detach()

    before = logits(batch.tokens, noisy)
    for number in (1, 2, 3):
        here = batch.answer & (block == number)
        other = (batch.tokens + 1) % 8
        after = logits(torch.where(block >= number, other, batch.tokens), torch.where(here, noisy, other))
        assert torch.allclose(after[here], before[here], atol=1e-12)
        moved = logits(torch.where(block == number - 1, other, batch.tokens), noisy)
        assert float((moved - before)[here].abs().max()) > 1e-3


class Echo:
    """The output row of a lane is the token in it."""

    def __call__(self, query: Query) -> Tensor:
        assert query.read is not None
        return F.one_hot(query.tokens.gather(1, query.read), 200)


@pytest.mark.parametrize("shift", [0, 1])
def test_positions_are_read_where_the_shift_says(shift: int) -> None:
    """T14: clean tokens are 0 .. 21, noisy ones 100 .. 121, each at its place, and the model repeats what it reads."""
    place = torch.arange(22).expand(4, 22)
    batch = rows()._replace(tokens=place)
    offset = (place - batch.prompt_length.unsqueeze(1))[batch.answer]
    wanted = place[batch.answer] - shift
    for layout in (Full(), BlockCausal(4)):
        assert torch.equal(read_logits(Echo(), layout(batch, place, shift, seeded())).argmax(-1)[batch.answer], wanted)  # type: ignore[arg-type]
    for first in ("clean", "noisy"):
        found = read_logits(Echo(), Doubled(4, first)(batch, place + 100, shift, seeded())).argmax(-1)[batch.answer]  # type: ignore[arg-type]
        clean = (offset % 4 == 0) if first == "clean" else (offset == 0)
        assert torch.equal(found, torch.where(clean & bool(shift), wanted, wanted + 100))


# --- losses


def test_losses_are_float32_under_autocast() -> None:
    """T26: the product is bf16, what is measured of it is not."""
    states, weight, target = torch.randn(2, 3, 8), torch.randn(50, 8), torch.randint(0, 50, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(states, weight)
        assert logits.dtype == torch.bfloat16
        found = [cross_entropy(logits, target), soft_cross_entropy(logits, logits), reverse_kl(logits, -logits), entropy(logits)]
    exact = logits.float()
    wanted = [cross_entropy(exact, target), soft_cross_entropy(exact, exact), reverse_kl(exact, -exact), entropy(exact)]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_a_filter_of_right_answers_alone_learns_to_say_yes() -> None:
    """T25: all labels 1. The loss is log(1 + exp(-z)): it falls with every logit, to 0."""
    examples = Examples(torch.rand(5, 4), torch.ones(5, 4, dtype=torch.bool), torch.ones(5, 4, dtype=torch.bool))
    logits = torch.randn(5, 4, generator=seeded()).requires_grad_()
    loss = filter_loss(logits, examples, False)
    loss.backward()
    assert torch.isclose(loss, F.softplus(-logits).mean()) and (logits.grad < 0).all()  # type: ignore[operator]
    assert float(filter_loss(torch.full((5, 4), 90.0), examples, False)) < 1e-30


def test_coupled_scores_are_one_and_a_half_times_a_log_probability() -> None:
    """I9, T23: for a model that ignores its context; at level 1/2 with certainty. One-step scores are the log-probability itself."""
    spec = tiny_transformer(1).spec
    table = torch.randn(VOCABULARY, generator=seeded(), dtype=torch.float64)

    class Deaf:
        def logits(self, tokens: Tensor, allow: Tensor) -> Tensor:
            return table.expand(*tokens.shape, -1)

    model = Deaf()
    model.spec = spec  # type: ignore[attr-defined]
    batch = rows()
    rollouts = Rollouts(batch.tokens, batch.prompt_length, ANSWER, batch.tokens, batch.tokens, batch.answer, torch.ones(4))
    odds = table.clone()
    odds[spec.mask_id] = -math.inf
    wanted = torch.where(batch.answer, odds.log_softmax(-1)[batch.tokens], 0.0)
    cases = ((OneStep(0.3), 1.0), (Coupled(2, weighted=False), 1.0), (Coupled(minimum=0.5, maximum=0.5), 1.5))
    for estimator, factor in cases:
        found = score(model, rollouts, estimator.views(rollouts, spec, seeded()))  # type: ignore[arg-type]
        assert torch.allclose(found, factor * wanted, atol=1e-6), estimator


# --- the sampler of CJ-GRPO's rollouts


def test_ascending_steps_of_published_lengths() -> None:
    """I13."""
    for length, sizes in ((128, [1, 2, 4, 8, 16, 32, 65]), (100, [1, 2, 4, 8, 16, 69])):
        model = Oracle(replace(toy_spec(), max_positions=256))
        output = decode(model, ascending_steps(stop_at_eos=False), [[1, 2]], max_new_tokens=length)
        assert commits_per_step(output.born[0, 2:].tolist()) == sizes


@dataclass(frozen=True)
class Listening(Commit):
    """Remembers the best score of each step of the rule inside."""

    inner: Commit = field(default_factory=Ascending)
    heard: list[float] = field(default_factory=list)

    def init(self, state: State) -> Any:
        return self.inner.init(state)

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        self.heard.append(float(proposal.score[region.eligible].max()))
        return self.inner.select(proposal, region, state)

    def carry(self, proposal: Proposal, region: Region, state: State) -> Any:
        return self.inner.carry(proposal, region, state)


def test_end_of_text_is_held_back_by_the_published_factors() -> None:
    """I13: four steps, linear from .4 and in doubling time from 0."""
    logits = torch.zeros(20, VOCABULARY, dtype=torch.float64)
    logits[:, EOS] = 3.0
    for pace, low, factors in (("linear", 0.4, [0.4, 0.6, 0.8, 1.0]), ("doubling", 0.0, [0.0625, 0.1875, 0.4375, 0.9375])):
        rule = Listening()
        hold = RejectEarly(rule, low, 1.0, pace, steps=4 if pace == "linear" else None)  # type: ignore[arg-type]
        decode(Scripted([logits]), BlockDecoder(SemiAutoregressive(None), hold, Sample(), stop=WhenFull()), [[1]], max_new_tokens=16)
        sure = rule.heard[-1] / factors[-1]
        assert rule.heard == pytest.approx([factor * sure for factor in factors], rel=1e-6)


# --- reductions of one method to another


def test_llada_is_mdlm_is_block_diffusion_with_one_block() -> None:
    """LLaDA's p = (1 - eps) t + eps is MDLM's t in [eps, 1]; nothing counts where a token is revealed, which is all that SUBS adds."""
    batch, model = rows(), tiny("block_causal", block_size=ANSWER)
    llada = MaskedDiffusion(Uniform(floor=1e-3))
    assert value(llada, model, batch) == pytest.approx(value(BlockDiffusion(ANSWER), model, batch), abs=1e-6)
    view = llada.show(batch, model.spec, seeded(), 0.0)
    assert torch.equal(view.weight > 0, view.tokens == MASK)


def test_sdar_is_block_diffusion_with_one_level_a_row() -> None:
    class OneLevel(BlockDiffusion):
        def levels(self, batch: Batch, generator: torch.Generator, block_length: int) -> Tensor:
            t = corrupt.uniform_levels(len(batch.tokens), generator).unsqueeze(1)
            return (self.minimum + (self.maximum - self.minimum) * t) * batch.answer

    batch, model = rows(), tiny()
    assert value(sdar(4), model, batch) == pytest.approx(value(OneLevel(4), model, batch), abs=1e-9)
    assert value(sdar(ANSWER), model, batch) == pytest.approx(value(BlockDiffusion(ANSWER), model, batch), abs=1e-9)
    assert value(sdar(4), model, batch) != pytest.approx(value(BlockDiffusion(4), model, batch), abs=1e-3)


def test_fast_dllm_v2_is_sdar_with_complements_a_shift_and_no_weights() -> None:
    """With one level a row for both: the copies are SDAR's mask and its complement, each a plain mean."""
    batch, model = rows(), tiny(shift=1)
    both = BlockDiffusion(4, complementary=True, weight="one", normaliser="masked_count", level="row")
    (mask,) = sdar(4).noise(batch, model.spec, seeded(), 0.0)
    total = 0.0
    for masked in (mask.weight > 0, batch.answer & ~(mask.weight > 0)):
        seen = Doubled(4)(batch, hidden(batch, model.spec, masked).tokens, 1, seeded())
        total += float(cross_entropy(read_logits(model, seen).detach(), batch.tokens)[masked].mean())
    assert value(both, model, batch) == pytest.approx(total, abs=1e-6)


def test_certainty_forcing_without_certainty_is_plain_training_on_a_block_and_its_complement() -> None:
    """dParallel with beta = 0: cross-entropy at a fixed rate inside one block, plain means, both copies."""
    batch, model, objective = rows(), tiny(), CertaintyForcing(4, beta=0.0)
    total = 0.0
    for copy in objective.noise(batch, model.spec, seeded(), 0.0):
        logits = model.logits(copy.tokens, full_allow(batch)).detach()
        total += float(cross_entropy(logits, batch.tokens)[copy.weight > 0].mean())
    assert value(objective, model, batch) == pytest.approx(total, abs=1e-6)
    assert value(replace(objective, beta=2.0), model, batch) > total


# --- steps of several batches


@pytest.mark.parametrize("normaliser", ["masked_count", "sum_of_weights", "answer_length", "none"])
def test_accumulated_batches_are_one_larger_batch(normaliser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T29: the gradient is that of both batches' rows under one normaliser, not the mean of two means."""
    seen: list[tuple[Batch, Copy]] = []
    original = MaskedDiffusion.shown

    def listening(self: MaskedDiffusion, batch: Batch, copies: list[Copy], *others: Any) -> Any:
        seen.append((batch, copies[0]))
        return original(self, batch, copies, *others)

    monkeypatch.setattr(MaskedDiffusion, "shown", listening)
    shape = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_positions": 192}
    tree = {
        "model": {"_component_": "fresh", **shape},
        "data": {"_component_": "stories", "size": 8, "heldout": 2, "batch_size": 2},
        "objective": {"_component_": "masked_diffusion", "noise": "uniform", "normaliser": normaliser},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "accumulate": 2, "validate_every": 0, "gradient_clip": None},
        "output": str(tmp_path / "out"),
    }
    recipe = Recipe.from_tree(tree)
    module = run_training(recipe, recipe.build(TrainRecipe))
    (one, first), (other, second) = seen[:2]
    batch = Batch(torch.cat((one.tokens, other.tokens)), torch.cat((one.prompt_length, other.prompt_length)), one.answer_length)
    copy = Copy(*(torch.cat(both) for both in zip(first[:2], second[:2], strict=True)))
    model: Any = recipe.build(TrainRecipe).model.build()
    objective = MaskedDiffusion(Uniform(), normaliser)
    objective.loss(model, batch, original(objective, batch, [copy], model.spec, seeded(), 1.0)).value.backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]).norm()
    assert module.gradient_norm is not None and float(module.gradient_norm) == pytest.approx(float(wanted), rel=1e-4)
    sizes = [float((one.weight > 0).sum()) for one in (first, second)]
    assert sizes[0] != sizes[1]
