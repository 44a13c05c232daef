"""Mistakes that public decoders have made, each with the smallest decode that shows it. Every test is named after its bug.

Left out, because the methods are not here: end-of-text prediction that cuts committed tokens, windows smaller than a step's quota in
Window-Diffusion (the general form, a quota above what may be committed, is here).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.bacd import bacd
from dllm_toolkit.decoders.base import Commit
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.confidence_adaptive import Adaptive, confidence_adaptive
from dllm_toolkit.decoders.dparallel import dparallel
from dllm_toolkit.decoders.dream import dream
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.klass import Stable
from dllm_toolkit.decoders.rules.commit import Factor, Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.saber import AboveMean, saber
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.ops import masks
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.models import EOS, MASK, OTHER_EOS, VOCABULARY, Oracle, Scripted, tiny_transformer, toy_spec
from dllm_toolkit.testing.record import Batch, difference, gaps, record, unequal

PROMPT = [1, 2]
TOYS = {toy.name: toy for toy in contract.toys()}


def says(*answers: tuple[int, float]) -> Tensor:
    """Logits [2 + n, V] of a canvas with a prompt of two: a token and its probability for each answer position."""
    logits = torch.full((2 + len(answers), VOCABULARY), -9.0, dtype=torch.float64)
    for place, (token, probability) in enumerate(answers, start=2):
        logits[place] = torch.tensor((1 - probability) / (VOCABULARY - 2), dtype=torch.float64).log()
        logits[place, token] = torch.tensor(probability, dtype=torch.float64).log()
    logits[:, MASK] = -9.0
    return logits


def born(decoder: BlockDecoder, *script: Tensor) -> list[int]:
    """The step at which each answer position of a scripted row was decided."""
    output = decode(Scripted(script), decoder, [PROMPT], max_new_tokens=script[0].shape[0] - 2)
    return output.born[0, 2:].tolist()


@pytest.mark.parametrize(("probabilities", "steps"), [((0.9, 0.9, 0.9, 0.7), [0, 0, 0, 1]), ((0.9, 0.5), [0, 1]), ((0.3, 0.2), [0, 1])])
def test_factor_accepts_one_too_many(probabilities: tuple[float, ...], steps: list[int]) -> None:
    """Released: when the scan ends at the last candidate, that one is accepted even if it has failed. Here only if asked for."""
    script = says(*((5 + place, probability) for place, probability in enumerate(probabilities)))
    assert born(BlockDecoder(SemiAutoregressive(None), Factor(1.0)), script) == steps
    assert born(BlockDecoder(SemiAutoregressive(None), Factor(1.0, official_tail=True)), script) == [0] * len(steps)


@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(), DualCache()], ids=lambda cache: type(cache).__name__)
@pytest.mark.parametrize("build", [lambda **flags: fast_dllm(4, threshold=0.0, **flags), lambda **flags: dparallel(4, 99.0, **flags)])
def test_trailing_forward_after_a_block_is_full(build: Callable[..., BlockDecoder], cache: Cache) -> None:
    """Released: at least one forward of the crop follows, also when the block's full forward has decided everything."""
    model, length = TOYS["full"].model, 12
    arguments = {"max_new_tokens": length, "cache": cache}
    assert decode(model, build(stop_at_eos=False), [PROMPT], **arguments).stats.nfe == [3]
    assert decode(model, build(stop_at_eos=False, trailing_forward=True), [PROMPT], **arguments).stats.nfe == [6]


def test_cad_leaves_masks_that_its_gate_held_back() -> None:
    """Released: completing a block after its last step skips positions that say end-of-text too early, and leaves their masks."""
    script = says(*((EOS, 0.9) for _ in range(6)))
    decoder = confidence_adaptive(6, eos_share=1.0, max_steps_per_block=1, stop_at_eos=False)
    output = decode(Scripted([script]), decoder, [PROMPT], max_new_tokens=6)
    assert output.tokens == [[EOS] * 6] and output.stats.nfe == [2]


def test_saber_overwrites_committed_tokens() -> None:
    """Released: where fewer masks are left than the minimum, top-k reaches for decided positions and replaces their tokens."""
    first, second = says(*((5, 0.5 + place / 10) for place in range(4))), says(*((6, 0.99) for _ in range(4)))
    decoder = saber(minimum=3)
    recording = record(Scripted([first, second]), decoder, NoCache(), Batch((tuple(PROMPT),), ((None,) * 4,), (0,)))
    assert [moment.after.tokens[0, 2:].tolist() for moment in recording.moments] == [[MASK, MASK, 5, 5], [6, 6, 5, 5]]


@pytest.mark.parametrize("minimum", [2, 3])
def test_saber_never_edits(minimum: int) -> None:
    """The same on context-sensitive toys: a token that stands before and after a step is the same token."""
    backs = 0
    for seed in range(3):
        for moment in record(tiny_transformer(2, "full", 0, seed), saber(None, minimum), NoCache(), unequal()).moments:
            before, after = moment.before, moment.after
            stands = ~before.masked & ~after.masked & after.inside
            assert torch.equal(before.tokens[stands], after.tokens[stands])
            backs += int((after.masked & ~before.masked).sum())
    assert backs


def test_bacd_history_leaks_over_batch_slots() -> None:
    """Released: what a block has accepted is kept by place in the batch, so another row, or the next block, inherits it."""
    batch = unequal()
    for model in (TOYS["full"].model, TOYS["block_causal"].model):
        for others in ([0, 3], [1, 3], [2, 3]):
            together = record(model, bacd(4, 0.2, 0.95), NoCache(), batch.take(others))
            alone = record(model, bacd(4, 0.2, 0.95), NoCache(), batch.take([3]))
            assert difference(together, 1, alone, 0) is None and together.text(1) == alone.text(0)
    # Next block: two sure blocks, then an unsure one, whose bound is its own best and not what the sure ones were accepted at.
    unsure = says(*((5, 0.9) for _ in range(4)), *((6, p) for p in (0.3, 0.3, 0.3, 0.2)))
    assert born(bacd(4, 0.1, 0.95), unsure) == [0, 0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("steps", [3, 4])
def test_dream_counts_are_means_over_the_batch(steps: int) -> None:
    """Released: every row commits the count that falls to the mean number of masks. Rows have their own here."""
    batch = unequal()
    recording = record(TOYS["full"].model, dream(steps, "maskgit_plus"), NoCache(), batch)
    for row, template in enumerate(batch.templates):
        left, counts = len(template), []
        width = (1 - 1e-3) / steps
        for step in range(steps):
            now = 1 - width * step
            count = left if step == steps - 1 else int(left * (1 - (now - width) / now))
            if count == 0 and left:  # here every step commits
                count = 1
            counts.append(count)
            left -= count
        begin, end = len(batch.prompts[row]), len(batch.prompts[row]) + len(template)
        seen = torch.bincount(recording.last.born[row, begin:end], minlength=steps).tolist()
        assert seen == counts
        alone = record(TOYS["full"].model, dream(steps, "maskgit_plus"), NoCache(), batch.take([row]))
        assert difference(recording, row, alone, 0) is None


@pytest.mark.parametrize(
    "decoder",
    [
        dream(4, "entropy"),
        dparallel(None, 0.0),
        BlockDecoder(SemiAutoregressive(None), Quota(), propose=Sample(score="negative_entropy")),
        BlockDecoder(SemiAutoregressive(None), Stable(1.1, 0.0, 1), propose=Sample(score="negative_entropy")),
    ],
)
def test_klass_entropy_has_the_wrong_sign(decoder: BlockDecoder) -> None:
    """Released for LLaDA: ranking by entropy prefers the positions that are least sure."""
    script = says((5, 0.2), (6, 0.9), (7, 0.4), (8, 0.6))
    assert born(decoder, script) == [3, 0, 2, 1]


def test_llada_end_of_text_confidence_by_chained_assignment() -> None:
    """Released: one assignment to two tensors, so one of the two ids keeps its confidence. Both come last here, and stay proposed."""
    script = says((EOS, 0.9), (5, 0.3), (OTHER_EOS, 0.95), (6, 0.4))
    decoder = vanilla(defer=("eos",))
    assert born(decoder, script) == [2, 1, 3, 0]
    assert decode(Scripted([script]), decoder, [PROMPT], max_new_tokens=4).tokens == [[EOS, 5, OTHER_EOS, 6]]


def test_guidance_without_attention_mask() -> None:
    """Released: the doubled batch breaks, or the half without prompt sees padding, if nobody passes a mask. There is none to pass here."""
    batch = unequal()
    for model in (TOYS["full"].model, TOYS["block_causal"].model):
        together = record(Guided(model, 1.0), semi_ar(4), NoCache(), batch)
        for row in range(len(batch)):
            alone = record(Guided(model, 1.0), semi_ar(4), NoCache(), batch.take([row]))
            assert difference(together, row, alone, 0) is None


@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(), DualCache(), BlockCausalCache()], ids=lambda cache: type(cache).__name__)
def test_duplicated_first_row_under_shift(cache: Cache) -> None:
    """Ad-hoc ports give the first position of a crop its own row of logits, because its predecessor's is not in the crop.

    The model is block-causal, so a dense forward over the same canvas says what the right row is.
    """
    toy = TOYS["block_causal_shifted"]
    told = 0
    for ask in record(toy.model, semi_ar(4), cache, unequal()).asks:
        state, block = ask.state, ask.region.block
        inside = state.positions < state.end.unsqueeze(1)
        with torch.inference_mode():
            raw = toy.model.logits(state.tokens, masks.block_causal(block) & inside.unsqueeze(1))  # row i as the model gives it, aligned
        alive = ask.read & ~state.done.unsqueeze(1)
        assert bool((gaps(ask.logits, raw)[alive] < 1e-9).all())
        first = alive & ~torch.cat((torch.zeros_like(alive[:, :1]), alive[:, :-1]), dim=1)
        own = torch.cat((raw[:, 1:], raw[:, -1:]), dim=1)  # what position i would get if the row were its own
        told += int((gaps(ask.logits, own)[first] > 1e-3).sum())
    assert told > 10


@pytest.mark.parametrize("build", [lambda: semi_ar(4), lambda: fast_dllm(4, threshold=0.5), lambda: saber(4)])
@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(), DualCache()], ids=lambda cache: type(cache).__name__)
def test_shift_changes_nothing_but_where_logits_are_read(build: Callable[..., BlockDecoder], cache: Cache) -> None:
    """A1: a model that gives every row one position earlier decodes the same, in the same steps, under every cache."""
    shifted, plain = (record(Oracle(toy_spec("full", shift)), build(), cache, unequal()) for shift in (1, 0))  # type: ignore[arg-type]
    assert shifted.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    "rule", [Gate(1.1, minimum=99), Adaptive(1.1, 99, 99, 0.0), AboveMean(99), Quota(1)], ids=lambda rule: type(rule).__name__
)
@pytest.mark.parametrize("schedule", [SemiAutoregressive(4), Pipelined(4, add_at=0.5, activate_at=0.75)], ids=["blocks", "pipeline"])
def test_a_quota_above_what_may_be_committed(rule: Commit, schedule: SemiAutoregressive) -> None:
    """Released: top-k over scores padded with -inf returns positions outside of the window. Quotas are clipped here."""
    for toy in contract.toys()[:2]:
        mine = record(toy.model, BlockDecoder(schedule, rule), NoCache(), unequal())
        theirs = record(toy.model, BlockDecoder(schedule, Gate(0.0)), NoCache(), unequal())
        for moment in mine.moments:
            chosen = moment.before.masked & ~moment.after.masked & ~moment.after.filled & moment.after.inside
            assert not bool((chosen & ~moment.asks[0].region.eligible).any())
        if rule != Quota(1) or isinstance(schedule, SemiAutoregressive):
            assert mine.fingerprint() == theirs.fingerprint()
