"""The core and the methods on it: layouts, noise, terms (T1-T31 of the catalogue of training tests), and reductions to one another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from dllm_toolkit import registry
from dllm_toolkit.decode import trace
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.models.transformer import transformer
from dllm_toolkit.ops import masks
from dllm_toolkit.testing.layouts import read_logits
from dllm_toolkit.training.composed import Composed, Copy, hidden
from dllm_toolkit.training.corruptors import Batch, ExactCount, Monotone
from dllm_toolkit.training.data import DataError
from dllm_toolkit.training.forward import Forward
from dllm_toolkit.training.layouts import Annealed, BlockCausal, Doubled, Full, canvas_blocks
from dllm_toolkit.training.lora import Lora, inject
from dllm_toolkit.training.methods.block_diffusion import BlockDiffusion, cap, fast_dllm_v2, sdar
from dllm_toolkit.training.methods.d3llm import PseudoTrajectory, late
from dllm_toolkit.training.methods.deer import Continuation, deer_refinement
from dllm_toolkit.training.methods.diffullama import Adaptation
from dllm_toolkit.training.methods.dparallel import CertaintyForcing
from dllm_toolkit.training.methods.dscd import DSCD, counts
from dllm_toolkit.training.methods.llada21 import TokenEditing
from dllm_toolkit.training.methods.path import PathDistillation
from dllm_toolkit.training.objectives import Autoregressive, D2FDistillation, MaskedDiffusion, Objective, ObjectiveError, normalise
from dllm_toolkit.training.terms import Certainty, CrossEntropy, ForwardKL, Ramp, Selected, entropy, interpolated, stage

MASK, ANSWER = 10, 12


def tiny(attention: str = "full", shift: int = 0, seed: int = 1):
    return transformer(
        vocab_size=11, mask_id=MASK, eos_ids=[9], pad_id=8, width=16, layers=2, heads=2, mlp_width=32, max_positions=64,
        attention=attention, shift=shift, seed=seed,
    ).double()  # fmt: skip


SPEC = tiny().spec


def rows(seed: int = 0, count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 8, (count, 22), generator=generator)
    prompts = torch.tensor([4, 6, 8, 5] * (count // 4))
    batch = Batch(tokens, prompts, ANSWER)
    steps = torch.full_like(tokens, -1)
    steps[batch.answer] = torch.cat([torch.randperm(ANSWER, generator=generator) % 4 for _ in range(count)])  # three tokens a step
    steps[0, 14:16] = -1  # a fill behind an end
    return batch._replace(step_map=steps)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BUILT: dict[str, Composed] = {
    "bd3lm": BlockDiffusion(4),
    "sdar": sdar(4),
    "fast_dllm_v2": fast_dllm_v2(4),
    "cap": cap(4),
    "dscd": DSCD(),
    "dparallel": CertaintyForcing(4),
    "d3llm": PseudoTrajectory(4),
    "path": PathDistillation(3),
    "llada21": TokenEditing(4, rows=1.0),
    "diffullama": Adaptation(),
    "deer_continuation": Continuation(8),
    "deer_refinement": deer_refinement(8, longest=5),
}


def test_every_method_is_tested_here() -> None:
    assert set(BUILT) == set(registry.names("objective")) - {"autoregressive", "masked_diffusion", "d2f"}


@pytest.mark.parametrize("name", BUILT)
def test_what_every_method_promises(name) -> None:
    """T1, T2, T8, T28: prompt and padding are neither changed nor supervised, one seed is one view, and no selection is no loss."""
    batch, objective = rows(), BUILT[name]
    for copy in objective.noise(batch, SPEC, seeded(), 0.3):
        assert torch.equal(copy.tokens[~batch.answer], batch.tokens[~batch.answer])
        assert not copy.weight[~batch.answer].any() and (copy.weight >= 0).all() and copy.weight.any()
        if name != "llada21":  # what is supervised is hidden
            assert (copy.tokens[copy.weight > 0] == MASK).all()
    one, again = (objective.show(batch, SPEC, seeded(3), 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:5], again[:5], strict=True)) and len(one.tokens) == objective.copies * 4
    assert one.seen.tokens.numel() == 4 * objective.lanes(22, ANSWER)[0]
    teacher, model = tiny(seed=2), tiny()
    loss = objective(model, batch, seeded(3), teacher=teacher, progress=0.3)
    loss.value.backward()
    assert loss.value.isfinite() and model.embed.weight.grad.any() and teacher.embed.weight.grad is None
    nothing = one._replace(weight=one.weight * 0, teacher_weight=one.weight * 0, teacher=torch.zeros(one.tokens.numel(), 11))
    empty = objective.loss(model, batch, nothing)
    empty.value.backward()
    assert float(empty.value.detach()) == 0


# --- views


def test_the_rule_of_block_diffusion_pair_by_pair() -> None:
    """T11, T16: against a loop over the lanes, dense and as flex attention's rule."""
    batch = rows()
    seen = Doubled(4)(batch, batch.tokens, 0, seeded())
    block = [[(j // 4 + 1, False) for j in range(ANSWER)] for _ in range(4)]
    for r, begin in enumerate(batch.prompt_length.tolist()):
        block[r] += [(0 if j < begin else (j - begin) // 4 + 1 if j < begin + ANSWER else 23, True) for j in range(22)]
        for q, (mine, clean) in enumerate(block[r]):
            for k, (theirs, theirs_clean) in enumerate(block[r]):
                expected = (
                    theirs <= mine if clean and theirs_clean else mine == theirs if clean == theirs_clean else theirs < mine and not clean
                )
                assert bool(seen.allow[r, q, k]) == expected, (r, q, k)
    labels = torch.tensor([[one[0] for one in row] for row in block]), torch.tensor([[one[1] for one in row] for row in block])
    from torch.nn.attention.flex_attention import create_mask

    flex = create_mask(masks.block_diffusion_mod(*labels), 4, None, 34, 34, device="cpu")
    assert torch.equal(flex[:, 0], seen.allow)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_annealed_attention_is_causal_at_zero_and_full_at_one(share) -> None:
    """T11; at 0 the logits are those of the causal model."""
    allow = masks.annealed_causal(60, share, seeded())
    future = torch.ones(60, 60, dtype=torch.bool).triu(1)
    assert allow[~future].all()
    density, count = float(allow[future].double().mean()), int(future.sum())
    assert abs(density - share) <= 3 * math.sqrt(share * (1 - share) / count)
    if share == 0:
        batch, model = rows(), tiny("causal", 1)
        seen = Annealed(0.0)(batch, batch.tokens, 1, seeded())
        assert torch.allclose(read_logits(model, seen)[batch.answer], model.logits(batch.tokens)[batch.answer], atol=1e-12)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_doubled_row_is_its_blocks_one_after_another(shift) -> None:
    """T12-T15, I7: block b of the doubled layout equals a row whose earlier blocks are clean, and later ones change nothing."""
    batch, model = rows(), tiny(shift=shift)
    noisy = hidden(batch, SPEC, batch.answer & (torch.rand(batch.tokens.shape, generator=seeded()) < 0.6)).tokens
    seen = Doubled(4)(batch, noisy, shift, seeded())
    assert torch.equal(seen.positions[:, :ANSWER], batch.prompt_length.unsqueeze(1) + torch.arange(ANSWER))
    doubled = read_logits(model, seen)
    block = masks.answer_blocks(batch.prompt_length, 22, 4)
    for number in (1, 2, 3):
        here = (block == number) & batch.answer
        row = torch.where(block < number, batch.tokens, torch.where(here, noisy, 7))
        alone = read_logits(model, BlockCausal(4)(batch, row, shift, seeded()))
        assert torch.allclose(doubled[here], alone[here], atol=1e-12)
    whole = read_logits(model, Doubled(ANSWER)(batch, noisy, shift, seeded()))
    assert torch.allclose(
        whole[batch.answer], read_logits(model, BlockCausal(ANSWER)(batch, noisy, shift, seeded()))[batch.answer], atol=1e-12
    )


def test_a_blocks_first_token_is_read_where_it_is_asked_to() -> None:
    """T14: with a shift, from the clean row before it, or from the noisy one."""
    batch = rows()
    clean, noisy = (Doubled(4, where)(batch, batch.tokens, 1, seeded()).read for where in ("clean", "noisy"))
    for r, begin in enumerate(batch.prompt_length.tolist()):
        for offset in range(ANSWER):
            before = ANSWER + begin + offset - 1
            assert clean[r, begin + offset] == (before if offset % 4 == 0 else offset - 1)
            assert noisy[r, begin + offset] == (before if offset == 0 else offset - 1)


# --- noise


def test_complements_partition_what_they_hide() -> None:
    """T5, T6: before the active block all is clean, after it all is masked, and the two copies supervise each of its tokens once."""
    batch = rows()
    for objective in (fast_dllm_v2(4), cap(4)):
        one, other = objective.noise(batch, SPEC, seeded(), 0.0)
        assert torch.equal(one.weight + other.weight, batch.answer.float())
    block = masks.answer_blocks(batch.prompt_length, 22, 4)
    for objective in (CertaintyForcing(4), PseudoTrajectory(4)):
        one, other = objective.noise(batch, SPEC, seeded(), 0.0)
        active = (one.weight + other.weight) > 0
        assert ((one.weight + other.weight) <= 1).all()
        for r in range(4):
            (number,) = block[r][active[r]].unique().tolist()
            assert torch.equal(active[r], (block[r] == number) & batch.answer[r])
            for copy in (one, other):
                assert torch.equal(copy.tokens[r][block[r] < number], batch.tokens[r][block[r] < number])
                assert (copy.tokens[r][(block[r] > number) & batch.answer[r]] == MASK).all()


def test_dscd_hides_a_part_from_the_teacher_of_what_it_hides_from_the_student() -> None:
    """T4, and the released formula's numbers of hidden tokens."""
    (copy,) = DSCD(revealed="exclude").noise(rows(), SPEC, seeded(), 0.0)
    student, teacher = copy.tokens == MASK, copy.hint == MASK
    assert (student | ~teacher).all() and teacher.any() and (student & ~teacher).any()
    assert torch.equal(copy.teacher_weight > 0, teacher)
    level, part = torch.tensor([0.4, 0.9]), torch.tensor([0.3, 0.7])
    expected = {5: ([2, 2], [1, 1]), 12: ([4, 6], [1, 4]), 50: ([20, 45], [6, 30]), 200: ([80, 180], [24, 120])}
    assert {n: tuple(one.tolist() for one in counts(level, part, n)) for n in expected} == expected


def test_block_levels_are_drawn_for_each_cell_within_their_interval() -> None:
    """T9, T10: a level for each block, in an interval, one in each stratum; SDAR draws one a row."""
    batch = rows(count=8)
    level = BlockDiffusion(4, 0.3, 0.8).levels(batch, seeded(), 4)
    block = masks.answer_blocks(batch.prompt_length, 22, 4)
    cells = torch.stack([level[block == number].view(8, 4)[:, 0] for number in (1, 2, 3)])
    assert torch.equal(((cells.flatten() - 0.3) / 0.5 * 24).long().sort().values, torch.arange(24))
    row = sdar(4).levels(batch, seeded(), 4)
    assert all(len(one[one > 0].unique()) == 1 for one in row)


def test_a_recorded_decode_gives_back_its_states() -> None:
    """T7: masked = step_map >= s at every step s of a decoder that only commits."""
    steps = list(trace(tiny(), fast_dllm(block_length=4, threshold=0.2), [[1, 2, 3], [4, 5]], max_new_tokens=ANSWER))
    born = steps[-1].after.born
    for number, step in enumerate(steps):
        alive = ~step.before.done
        decided = born >= 0
        assert torch.equal((step.before.masked & decided)[alive], ((born >= number) & decided)[alive])


def test_late_positions_are_the_ones_a_teacher_decided_last() -> None:
    """d3LLM: a left-to-right teacher gives a suffix; the number shown is int((1 - ratio) n); what was never decided comes last."""
    active = torch.zeros(3, 14, dtype=torch.bool)
    active[:, 2:12] = True
    steps = torch.arange(14).expand(3, -1).clone()
    hide = late(steps, active, torch.tensor([0.8, 0.5, 1.0]))
    assert [one.nonzero().flatten().tolist() for one in hide] == [list(range(4, 12)), list(range(7, 12)), list(range(2, 12))]
    steps[0, 2] = -1
    assert late(steps, active, torch.tensor([0.1] * 3))[0].nonzero().flatten().tolist() == [2]


def test_a_jump_is_what_was_decided_between_two_steps() -> None:
    batch = rows()
    (copy,) = PathDistillation(jump=2, fill=False).noise(batch, SPEC, seeded(), 0.0)
    assert batch.step_map is not None
    for r in range(4):
        wanted, hid = batch.step_map[r][copy.weight[r] > 0], batch.step_map[r][(copy.tokens[r] == MASK)]
        start = int(hid[hid >= 0].min())
        assert set(wanted.tolist()) in ({start}, {start, start + 1})
        assert torch.equal(hid[hid >= 0], batch.step_map[r][batch.step_map[r] >= start])
    (copy,) = PathDistillation(jump=7).noise(batch, SPEC, seeded(), 0.0)  # the fill goes with the last step
    assert copy.weight[0, 14:16].all()
    with pytest.raises(DataError, match="recorded"):
        PathDistillation().noise(batch._replace(step_map=None), SPEC, seeded(), 0.0)


def test_editing_shows_wrong_tokens_and_asks_for_the_right_ones() -> None:
    batch = rows(count=8)
    (copy,) = TokenEditing(4, rows=1.0, rate=0.5, keep=0.25).noise(batch, SPEC, seeded(), 0.0)
    visible = batch.answer & (copy.tokens != MASK)
    wrong = visible & (copy.tokens != batch.tokens)
    assert wrong.any() and (copy.weight[wrong] == 1).all() and (copy.weight[visible & ~wrong] >= 0.25).all()
    (plain,) = TokenEditing(4, rows=0.0).noise(batch, SPEC, seeded(), 0.0)
    (block,) = BlockDiffusion(4).noise(batch, SPEC, seeded(), 0.0)
    assert torch.equal(plain.tokens, block.tokens) and torch.equal(plain.weight, block.weight)


# --- terms and schedules


def test_certainty_counts_right_answers_alone() -> None:
    """T20, T21 (I8): entropy at T = .5 of (.9, .1); a wrong row has no gradient, and the gate has none."""
    logits = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64).log().requires_grad_()
    values, weight = Certainty(temperature=0.5)(logits, Selected(torch.tensor([[0, 1, 1]]), torch.tensor([[1.0, 1.0, 0.0]])))
    assert float(values[0, 0].detach()) == pytest.approx(0.065861, abs=1e-6) and weight.tolist() == [[1.0, 0.0, 0.0]]
    normalise(values, weight, weight > 0, "masked_count").backward()
    assert logits.grad[0, 0].any() and not logits.grad[0, 1:].any()
    assert entropy(logits.detach().bfloat16()).dtype == torch.float32  # T26


def test_temperature_keeps_the_gradients_size() -> None:
    sizes = []
    for temperature in (1.0, 2.0, 4.0):
        logits = (0.01 * torch.randn(1, 50, 7, generator=seeded(), dtype=torch.float64)).requires_grad_()
        teacher = 0.01 * torch.randn(1, 50, 7, generator=seeded(1), dtype=torch.float64)
        values, _ = ForwardKL(temperature=temperature)(logits, Selected(torch.zeros(1, 50, dtype=torch.long), torch.ones(1, 50), teacher))
        values.sum().backward()
        sizes.append(float(logits.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02) and sizes[2] == pytest.approx(sizes[0], rel=0.02)


def test_schedules_reach_their_ends() -> None:
    """T30, T31."""
    share = DSCD().share
    assert [round(share.at(u), 6) for u in (0.0, 0.1, 0.55, 1.0)] == [0.9, 0.9, 0.7, 0.5]
    assert [Ramp(0.0, 0.8).at(u) for u in (0.0, 0.5, 1.0)] == [0.0, 0.4, 0.8]
    assert [stage((4, 8, 16), u) for u in (0.0, 0.34, 0.67, 1.0)] == [4, 8, 16, 16] and stage(8, 0.5) == 8
    assert [interpolated((16, 24, 32), u) for u in (0.0, 0.25, 0.5, 1.0)] == [16, 20, 24, 32] and interpolated((5,), 0.7) == 5
    assert [sdar((4, 6)).layout(u).length for u in (0.2, 0.8)] == [4, 6]
    assert isinstance(Adaptation(0.1).layout(0.1), Full) and Adaptation(0.5).layout(0.25) == Annealed(0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockDiffusion(5).check_rows([ANSWER]),
        lambda: sdar((4, 5, 4)).check_rows([ANSWER]),
        lambda: BlockDiffusion(0),
        lambda: CertaintyForcing(temperature=0.0),
        lambda: PathDistillation(jump=0),
        lambda: Certainty(temperature=-1.0),
        lambda: CertaintyForcing().check(
            transformer(vocab_size=9, mask_id=9, eos_ids=[1], pad_id=0, width=8, layers=1, heads=1, attention="causal")
        ),
    ],
)
def test_what_does_not_fit_is_refused(make) -> None:
    with pytest.raises(ObjectiveError, match="Write"):
        make()


# --- reductions: one method at a limit of its settings is another


def value(objective: Objective, model, batch: Batch, progress: float = 0.0, teacher=None) -> float:
    return float(objective(model, batch, seeded(), progress=progress, teacher=teacher).value.detach())


def test_blocks_of_one_fully_masked_are_autoregression() -> None:
    """BD3-LM with B = 1 and t = 1: every token from the clean ones before it."""
    batch, model = rows(), tiny()
    loss = value(BlockDiffusion(1, 1.0, 1.0), model, batch)
    total = 0.0
    for r, begin in enumerate(batch.prompt_length.tolist()):
        for place in range(begin, begin + ANSWER):
            row = batch.tokens[r : r + 1].clone()
            row[0, place] = MASK
            one = Batch(row, batch.prompt_length[r : r + 1], ANSWER)
            total -= float(
                read_logits(model, BlockCausal(1)(one, row, 0, seeded())).detach()[0, place].log_softmax(-1)[batch.tokens[r, place]]
            )
    assert loss == pytest.approx(total / (4 * ANSWER), abs=1e-6)


def test_one_block_is_plain_masked_diffusion() -> None:
    """BD3-LM with B = L, on the mask that lets a prompt see itself alone."""

    @dataclass(frozen=True)
    class Plain(BlockDiffusion):
        def layout(self, progress):
            return BlockCausal(self.block_length)

    assert value(BlockDiffusion(ANSWER), tiny(), rows()) == pytest.approx(value(Plain(ANSWER), tiny(), rows()), abs=1e-9)


def test_fast_dllm_v2_is_block_diffusion_with_complements_and_without_weights() -> None:
    batch, model = rows(), tiny(shift=1)
    copies = fast_dllm_v2(4).noise(batch, model.spec, seeded(), 0.0)
    (plain,) = BlockDiffusion(4, 0.0).noise(batch, model.spec, seeded(), 0.0)
    assert torch.equal(copies[0].tokens, plain.tokens) and set(copies[0].weight.unique().tolist()) == {0.0, 1.0}

    parts = []
    for copy in copies:
        logits = read_logits(model, Doubled(4)(batch, copy.tokens, 1, seeded()))
        values, weight = CrossEntropy()(logits, Selected(batch.tokens, copy.weight))
        parts.append(float((values * weight).sum().detach() / weight.sum()))
    assert value(fast_dllm_v2(4), model, batch) == pytest.approx(sum(parts), abs=1e-6)


def test_confidence_aware_training_adds_certainty_forcings_term() -> None:
    batch, model = rows(), tiny()
    without, with_it = value(cap(4, certainty=0.0), model, batch), value(cap(4), model, batch)
    objective, sure = cap(4), 0.0
    for copy in objective.noise(batch, SPEC, seeded(), 0.0):
        logits = read_logits(model, Doubled(4)(batch, copy.tokens, 0, seeded()))
        values, weight = Certainty(temperature=1.0)(logits, Selected(batch.tokens, copy.weight))
        sure += float((values * weight).sum().detach() / weight.sum().clamp(min=1))
    assert sure > 0 and with_it == pytest.approx(without + 2.0 * sure, abs=1e-6)


def test_pseudo_trajectories_at_random_are_a_quarter_of_certainty_forcing() -> None:
    half = PseudoTrajectory(4, Ramp(0.5, 0.5), 0.5, both_certain=True, order="random")
    assert not half.needs_steps and PseudoTrajectory(4).needs_steps
    assert 4 * value(half, tiny(), rows()) == pytest.approx(value(CertaintyForcing(4), tiny(), rows()), abs=1e-6)


def test_dscd_without_its_teacher_is_plain_training_and_agrees_with_itself() -> None:
    batch, model, teacher = rows(), tiny(), tiny(seed=2)
    objective = DSCD(share=Ramp(0.0, 0.0))
    (copy,) = objective.noise(batch, SPEC, seeded(), 0.0)
    values, weight = CrossEntropy()(read_logits(model, Full()(batch, copy.tokens, 0, seeded())), Selected(batch.tokens, copy.weight))
    assert value(objective, model, batch, teacher=teacher) == pytest.approx(
        float((values * weight).sum().detach() / weight.sum()), abs=1e-6
    )
    onehot = DSCD(share=Ramp(1.0, 1.0), temperature=1.0, revealed="onehot")
    known = replace(onehot, share=Ramp(1.0, 1.0))
    view = known.show(batch, SPEC, seeded(), 0.0)
    view = known.teach(teacher, batch, view._replace(hint=batch.tokens))  # everything is revealed: the divergence is a cross-entropy
    assert float(known.loss(model, batch, view).value.detach()) == pytest.approx(value(objective, model, batch, teacher=teacher), abs=1e-6)
    same = DSCD().show(batch, SPEC, seeded(), 0.0)
    same = DSCD().teach(model, batch, same._replace(hint=same.tokens))
    assert float(DSCD().loss(model, batch, same).metrics["kl"]) == pytest.approx(0.0, abs=1e-12)


def test_masked_diffusion_is_a_sum_of_one_term() -> None:
    @dataclass(frozen=True)
    class OnTheCore(Composed):
        terms = (CrossEntropy(normaliser="answer_length"),)

        def noise(self, batch, spec, generator, progress):
            return [hidden(batch, spec, *ExactCount()(batch, generator))]

    assert value(OnTheCore(), tiny(), rows()) == pytest.approx(value(MaskedDiffusion(), tiny(), rows()), abs=1e-6)


def test_d2f_is_a_sum_of_one_term() -> None:
    """Monotone noise, block-causal layout, forward KL."""

    @dataclass(frozen=True)
    class OnTheCore(Composed):
        terms = (ForwardKL(),)

        def layout(self, progress):
            return BlockCausal(4)

        def noise(self, batch, spec, generator, progress):
            masked, weight = Monotone(4)(batch, generator)
            return [Copy(batch.tokens.masked_fill(masked, spec.mask_id), weight)]

    batch, model = rows(), inject(tiny(), Lora(rank=2, alpha=2, targets=("q_proj",))).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    one, other = (objective(model, batch, seeded()) for objective in (OnTheCore(), D2FDistillation(4)))
    assert float(one.value.detach()) == pytest.approx(float(other.value.detach()), abs=1e-6)
    assert float(one.metrics["kl"]) > 0 and float(one.metrics["teacher_agreement"]) == float(other.metrics["teacher_agreement"])


@pytest.mark.parametrize(
    "options", [{}, {"divergence": "reverse_kl", "temperature": 2.0, "weighted": False}, {"self_align": False}], ids=str
)
def test_what_d2f_computes_by_rows_is_what_its_term_says(options) -> None:
    """With the gradient, and a chunk at a time."""

    class ByTerm(D2FDistillation):
        one_head = False
        found = Composed.found

    model = inject(tiny(shift=1), Lora(rank=2, alpha=2, targets=("q_proj",))).double()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.5)
    values, gradients, seen = [], [], []
    for kind in (ByTerm, D2FDistillation):
        loss = kind(4, forward=Forward(chunk=9), **options)(model, rows(), seeded())
        values.append(loss.value.detach())
        gradients.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss.value, trained)]))
        seen.append({name: float(value) for name, value in loss.metrics.items() if "kl" not in name})
    assert (
        torch.allclose(*values, atol=1e-9)
        and torch.allclose(*gradients, atol=1e-9)
        and gradients[0].any()
        and seen[0] == pytest.approx(seen[1])
    )


def test_masked_diffusion_sees_what_its_model_sees() -> None:
    """Blocks from the prompt's end or from the row's start, or the past: as the model decodes."""
    batch = rows()
    for anchor, block in (("prompt", canvas_blocks(batch, 4)), ("absolute", masks.absolute_blocks(4, 22, 4, batch.tokens.device))):
        spec = replace(SPEC, attention="block_causal", block_size=4, block_anchor=anchor)
        allow = MaskedDiffusion().show(batch, spec, seeded(), 0.0).seen.allow
        both = batch.inside.unsqueeze(1) & batch.inside.unsqueeze(2)
        assert torch.equal(allow & both, masks.block_causal(block) & both)
    assert (
        MaskedDiffusion().decodes() is None
        and Autoregressive().show(batch, replace(SPEC, attention="causal"), seeded(), 0.0).seen.allow is None
    )
