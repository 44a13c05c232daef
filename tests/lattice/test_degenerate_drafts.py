"""FreeDave is its reference process in fewer forwards (E18, V1, V2, V4); WINO without doubts is a capped threshold (E15, WI1 to WI4)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import decode, engine_of
from dllm_toolkit.decoders.base import Commit
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.credit import credit
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.dream import dream
from dllm_toolkit.decoders.eoser import eoser
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.freedave import SelfDraft, freedave
from dllm_toolkit.decoders.klass import klass
from dllm_toolkit.decoders.pc_sampler import pc_sampler
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.wino import WideIn, wino
from dllm_toolkit.engine import Engine
from dllm_toolkit.evaluation.tasks import StoryArithmetic
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.state import State
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.models import MASK, Oracle, tiny_transformer
from dllm_toolkit.testing.record import Recording, difference, difference_where_both_read, infill, record, unequal
from dllm_toolkit.testing.rules import Doubt, Rewrite

CACHES: dict[str, Callable[[], Cache]] = {"none": NoCache, "prefix": PrefixCache, "dual": DualCache, "block_causal": BlockCausalCache}
TOYS = {toy.name: toy for toy in contract.toys()}
PLACES = [(toy, cache) for toy in TOYS for cache in CACHES if contract.fits(freedave(4), CACHES[cache](), TOYS[toy]) is None]


def used(recording: Recording, row: int) -> Iterator[tuple[tuple[object, ...], Tensor]]:
    """Every canvas that a row was asked at, with its epoch, and the logits that came back."""
    for ask in recording.asks_of(row):
        first, branches = ask.first(row, recording.first.tokens.shape[0]), ask.state.tokens.shape[0] // recording.first.tokens.shape[0]
        for at in range(first, first + branches):
            if not bool(ask.state.done[at]):
                key = (*ask.state.tokens[at].tolist(), *ask.state.masked[at].tolist(), int(ask.region.epoch[at]))
                yield key, ask.logits[at]


def lossless(reference: Recording, drafting: Recording) -> int:
    """Equal texts, births and states; equal logits at every canvas that both looked at; no more forwards. How many forwards were saved."""
    for name in ("tokens", "masked", "born", "begin", "end", "step", "result", "forced", "edits"):
        assert torch.equal(getattr(reference.last, name), getattr(drafting.last, name)), name
    saved = 0
    for row in range(reference.first.tokens.shape[0]):
        known, seen = dict(used(reference, row)), dict(used(drafting, row))
        both = known.keys() & seen.keys()
        assert both and all(torch.allclose(known[key], seen[key], atol=1e-10, rtol=0) for key in both)
        fewer = len(reference.asks_of(row)) - len(drafting.asks_of(row))
        assert fewer >= 0
        saved += fewer
    return saved


@pytest.mark.parametrize("form", ["batch", "tree"])
@pytest.mark.parametrize(("toy", "cache"), PLACES)
def test_freedave_is_lossless_with_any_number_of_drafts(toy: str, cache: str, form: str) -> None:
    """V1, V2: one token a step, unequal rows and infill, with every cache that accepts it; 1 to 8 drafts with one of them."""
    saved = 0
    for batch in (unequal(), infill()):
        reference = record(TOYS[toy].model, semi_ar(4), CACHES[cache](), batch)
        for drafts in range(1, 9) if (toy, cache) == ("full", "dual") else (2, 5):
            drafting = freedave(4, drafts, form=form)  # type: ignore[arg-type]
            saved += lossless(reference, record(TOYS[toy].model, drafting, CACHES[cache](), batch))
    assert saved > 0, "no draft was ever right: the toys show nothing"


def commits(rule: Commit) -> BlockDecoder:
    return BlockDecoder(SemiAutoregressive(None), rule)


INNER: dict[str, BlockDecoder] = {
    "a quota of several": semi_ar(None, steps=4),
    "a threshold": fast_dllm(None, threshold=0.6),
    "sampled": semi_ar(4, temperature=0.7),
    "independent draws": dream(steps=6, algorithm="origin", temperature=0.7),
    "history of distributions": klass(None, 0.5, 0.5, 2),
    "credit of tokens": credit(None),
    "a discount that fades": eoser(),
    "position and corpus": pc_sampler(None),
    "several blocks": d2f(4, threshold=0.6, add_at=0.5, activate_at=0.75),
    "fill at end-of-text": fast_dllm(4, threshold=0.6, fill_at_eos=True),
    "tokens edited": replace(commits(Gate(0.6)), revise=Rewrite()),
    "tokens taken back": replace(commits(Gate(0.6)), revise=Doubt()),
    "shadows": wino(None, wide=0.3, least=2),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_it_reproduces_any_rule(name: str, eager: bool) -> None:
    """V1 with everything that rules remember, also at a temperature: the noise is the state's own."""
    for toy, cache, form in (("full", "dual", "tree"), ("full", "none", "batch"), ("block_causal", "block_causal", "tree")):
        drafting = SelfDraft(INNER[name], 4, form, eager=eager)  # type: ignore[arg-type]
        reference = record(TOYS[toy].model, INNER[name], CACHES[cache](), unequal())
        lossless(reference, record(TOYS[toy].model, drafting, CACHES[cache](), unequal()))


@pytest.mark.parametrize(("toy", "cache"), PLACES)
def test_an_eager_draft_opens_the_next_block(toy: str, cache: str) -> None:
    """Still lossless, and fewer forwards: a right guess saves the first forward of a block."""
    model = TOYS[toy].model
    reference = record(model, semi_ar(2), CACHES[cache](), unequal())
    plain, eager = (record(model, freedave(2, 4, eager=one), CACHES[cache](), unequal()) for one in (False, True))
    assert lossless(reference, eager) > lossless(reference, plain)


@pytest.mark.parametrize(("toy", "cache"), PLACES)
@pytest.mark.parametrize("inner", ["one token a step", "a threshold"])
def test_e18_one_draft_is_the_reference_itself(toy: str, cache: str, inner: str) -> None:
    reference = INNER.get(inner, semi_ar(4))
    one = record(TOYS[toy].model, reference, CACHES[cache](), unequal())
    for form in ("batch", "tree"):
        other = record(TOYS[toy].model, SelfDraft(reference, 1, form), CACHES[cache](), unequal())  # type: ignore[arg-type]
        assert one.fingerprint() == other.fingerprint()
        assert [difference(one, row, other, row) for row in range(4)] == [None] * 4


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_both_forms_look_at_the_same_canvases(cache: str) -> None:
    model = TOYS["full"].model
    rows, shared = (record(model, freedave(8, 4, 0.5, form), CACHES[cache](), unequal()) for form in ("batch", "tree"))  # type: ignore[arg-type]
    assert rows.fingerprint()[:-1] == shared.fingerprint()[:-1]
    assert [difference(rows, row, shared, row) for row in range(4)] == [None] * 4
    if cache == "dual":
        assert shared.slots < rows.slots


def test_freedave_plus_plus_goes_its_own_way() -> None:
    """A draft that the next step contains is not on the reference's way. With one token a step it is contained only if it is equal."""
    ways = []
    for match in ("exact", "subset"):
        decoder = freedave(None, 4, 0.5, match=match)  # type: ignore[arg-type]
        recordings = [record(tiny_transformer(2, "full", 0, seed), decoder, NoCache(), unequal()) for seed in range(4)]
        ways.append([recording.last.born.tolist() for recording in recordings])
    assert ways[0] != ways[1]
    one, other = (record(TOYS["full"].model, freedave(4, 4, match=match), NoCache(), unequal()) for match in ("exact", "subset"))  # type: ignore[arg-type]
    assert one.fingerprint() == other.fingerprint()


def drafts_of(state: State, count: int, order: list[int]) -> State:
    """`count` canvases of every row: branch k has its first k masks decided, in the given order of branches."""
    place = state.masked.cumsum(1)
    several = []
    for branch in order:
        where = state.masked & (place <= branch)
        several.append(state.write(where, (7 * state.positions + branch) % 20))
    return State.interleave(several)


@pytest.mark.parametrize("form", ["rows", "lanes"])
@pytest.mark.parametrize(("toy", "cache"), PLACES)
def test_v4_the_order_of_branches_does_not_matter(toy: str, cache: str, form: str) -> None:
    """Equal logits in any order of branches, also in the forward after one of them was kept; and none depends on its neighbours."""
    model = Guided(TOYS[toy].model, 0.5) if toy == "full" else TOYS[toy].model
    decoder, batch = semi_ar(4), unequal()
    first = record(model, decoder, NoCache(), batch).first
    heard = []
    for order in ([0, 1, 2], [2, 0, 1]):
        engine = Engine(model, CACHES[cache](), first, branches=3, form=form)  # type: ignore[arg-type]
        alone = State.interleave([first] * 3)
        only = replace(alone, done=torch.arange(12) % 3 > 0)
        engine.ask(only, decoder.region(only))
        engine.keep(torch.zeros(4, dtype=torch.long))
        every = drafts_of(first, 3, order)
        place = torch.arange(4) * 3
        told = engine.ask(every, decoder.region(every))
        engine.keep(torch.full((4,), order.index(1)))
        kept = first.replace_rows(torch.ones(4, dtype=torch.bool), every.pick(place + order.index(1)))
        again = replace(kept.branch(3), done=torch.arange(12) % 3 > 0)
        after = engine.ask(again, decoder.region(again))
        heard.append([told.pick(place + order.index(branch)) for branch in range(3)] + [after.pick(place)])
        if cache == "none":  # a branch says what it would say by itself
            for branch in range(3):
                itself = every.pick(place + branch)
                single = Engine(model, NoCache(), itself).ask(itself, decoder.region(itself))
                mine = told.pick(place + branch)
                live = mine.positions < first.tokens.shape[1]
                width = single.logits.shape[1]
                assert torch.allclose(mine.logits[:, :width][live[:, :width]], single.logits[live[:, :width]], atol=1e-10, rtol=0)
    for one, other in zip(*heard, strict=True):
        live = one.positions < first.tokens.shape[1]
        assert torch.equal(one.positions, other.positions)
        assert torch.allclose(one.logits[live], other.logits[live], atol=1e-10, rtol=0)


def test_guidance_drafts_too() -> None:
    """Doubled rows and branches at once."""
    model = Guided(TOYS["full"].model, 0.7)
    reference = record(model, semi_ar(4), DualCache(), unequal())
    for form in ("batch", "tree"):
        assert lossless(reference, record(model, freedave(4, 4, form=form), DualCache(), unequal())) >= 0  # type: ignore[arg-type]


def test_the_oracle_is_answered_in_a_forward_for_several_tokens() -> None:
    """A model that ignores its context makes every draft right: ceil(tokens of a block / drafts) + 1 forwards a block at most."""
    oracle, prompt = Oracle(), [3, 1, 4]
    for drafts in (1, 2, 4, 8):
        output = decode(oracle, freedave(8, drafts, stop_at_eos=False), [prompt], max_new_tokens=16)
        assert output.tokens[0] == oracle.answer(3, 16)
        # A block's first forward has nothing to go by and decides one token; each later one decides as many as it has drafts.
        assert output.stats.nfe[0] == 2 * (1 + -(-7 // drafts))


def test_texts_of_the_shipped_teacher() -> None:
    """FreeDave says on story problems what its references say, in fewer forwards."""
    model = load("asset:teacher")
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in StoryArithmetic(size=4, seed=11).problems()]
    for reference in (semi_ar(16), fast_dllm(16, threshold=0.99999)):
        slow = decode(model, reference, prompts, max_new_tokens=48, cache=DualCache())
        fast = decode(model, SelfDraft(reference, 4), prompts, max_new_tokens=48, cache=DualCache())
        assert fast.tokens == slow.tokens and torch.equal(fast.born, slow.born)
        assert sum(fast.stats.nfe) < sum(slow.stats.nfe)


# WINO


@pytest.mark.parametrize(("toy", "cache"), [place for place in PLACES if TOYS[place[0]].model.spec.shift == 0])
def test_e15_without_doubts_wino_is_a_capped_threshold(toy: str, cache: str) -> None:
    for size in (4, None):
        one = record(TOYS[toy].model, wino(size, 0.4, 0.0, least=2, stop_at_eos=False), CACHES[cache](), unequal())
        plain = BlockDecoder(SemiAutoregressive(size), WideIn(0.4, least=2), stop=WhenFull())
        other = record(TOYS[toy].model, plain, CACHES[cache](), unequal())
        assert difference_where_both_read(one, other) is None


@pytest.mark.parametrize("seed", range(4))
def test_wi2_takes_back_less_than_was_committed_and_ends(seed: int) -> None:
    """Even if everything is doubted: no more steps than positions, and a step takes back less than the one before gave."""
    model, batch = tiny_transformer(2, "full", 0, seed), unequal()
    for narrow in (0.5, 0.9, 1.0):
        recording = record(model, wino(None, 0.2, narrow, least=3), NoCache(), batch)
        accepted = torch.zeros(4, dtype=torch.long)
        for moment in recording.moments:
            before, after = moment.before, moment.after
            taken = (~before.masked & after.masked).sum(1)
            given = (before.masked & ~after.masked & (after.born >= 0)).sum(1)
            assert bool((taken <= (accepted - 1).clamp(min=0)).all())
            assert not bool((taken[given <= 1] > 0).any())
            accepted = given
        for row, template in enumerate(batch.templates):
            assert int(recording.last.step[row]) <= len(template)
        assert bool(recording.last.done.all())
    assert int(recording.last.edits.sum()) > 0


@pytest.mark.parametrize(("toy", "cache"), [place for place in PLACES if TOYS[place[0]].model.spec.shift == 0])
def test_wi3_the_canvas_does_not_notice_its_shadow(toy: str, cache: str) -> None:
    decoder, model = wino(8, 0.3, least=2), TOYS[toy].model
    recording = record(model, decoder, CACHES[cache](), unequal())
    with_shadow, without = (engine_of(model, decoder, CACHES[cache](), recording.first, 11) for _ in range(2))
    for ask in recording.asks:
        one = with_shadow.ask(ask.state, ask.region, ask.region.read)
        other = without.ask(ask.state, ask.region)
        assert one.shadow is not None and other.shadow is None
        live = one.positions < ask.state.tokens.shape[1]
        assert torch.equal(one.positions, other.positions)
        assert torch.allclose(one.logits[live], other.logits[live], atol=1e-10, rtol=0)
    assert bool((with_shadow.lanes > without.lanes).all()) and torch.equal(with_shadow.nfe, without.nfe)


def reference_shadow(model: Transformer, tokens: Tensor, block: Tensor, end: int) -> Tensor:
    """What the paper does, slowly, for one row: canvas [L] with the block's masks appended, and the whole mask written out."""
    length, size = len(tokens), len(block)
    allow = torch.zeros(1, length + size, length + size, dtype=torch.bool)
    allow[0, :, :end] = True
    allow[0, length:, length:] = True
    for place, position in enumerate(block.tolist()):
        allow[0, length + place, position] = False
    both = torch.cat((tokens, torch.full_like(block, MASK)))
    positions = torch.cat((torch.arange(length), block))
    return model(Query(both[None], positions[None], None, allow, None))[0, length:]


def test_shadows_are_those_of_the_paper() -> None:
    model, decoder = TOYS["full"].model, wino(8, 0.3, least=2)
    recording = record(model, decoder, NoCache(), unequal())
    for ask in recording.asks:
        assert ask.shadow is not None and ask.shaded is not None
        for row in (~ask.state.done).nonzero().flatten().tolist():
            block = ask.region.read[row].nonzero().flatten()
            assert ask.shaded[row].nonzero().flatten().tolist() == block.tolist()
            slow = reference_shadow(model, ask.state.tokens[row], block, int(ask.state.end[row]))
            assert torch.allclose(ask.shadow[row, block], slow, atol=1e-10, rtol=0)


def test_wi4_on_one_layer_a_shadow_does_not_know_its_token() -> None:
    model, decoder, draw = TOYS["full"].shallow, wino(8, 0.3, least=2), random.Random(0)
    recording = record(model, decoder, NoCache(), unequal())
    asked = 0
    for ask in recording.asks:
        decided = ask.region.read & ~ask.state.masked & ~ask.state.done.unsqueeze(1)
        if not bool(decided.any()):
            continue
        place = decided.double().argmax(1)  # of each row one decided position, where there is one
        other = ask.state.tokens.scatter(1, place[:, None], draw.randrange(20))
        changed = replace(ask.state, tokens=torch.where(decided, other, ask.state.tokens))
        answers = [Engine(model, NoCache(), state).ask(state, ask.region, ask.region.read) for state in (ask.state, changed)]
        for row in decided.any(1).nonzero().flatten().tolist():
            one, two = ((answer.shadow.logits[row], answer.shadow.positions[row]) for answer in answers)  # type: ignore[union-attr]
            assert torch.equal(one[1], two[1])
            at = one[1] == place[row]
            assert torch.allclose(one[0][at], two[0][at], atol=1e-12, rtol=0)
            asked += 1
    assert asked > 3


def test_wi1_nothing_is_taken_back_below_a_bound_of_0() -> None:
    recording = record(TOYS["full"].model, wino(None, 0.3, 0.0, least=3), NoCache(), unequal())
    assert int(recording.last.edits.sum()) == 0
