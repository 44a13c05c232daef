"""The methods that look back: at the limits of their parameters they are methods that do not, and what each promises holds in every step.

Names are those of the spec's lists: E14, E16, E17 (equal decodes), ED (token editing), SA (Saber), HR (hierarchical remasking).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.cache.delayed import DelayedCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import Decoder, Revise, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.hierarchy import Hierarchy, TakeBackDoubtful, hierarchy
from dllm_toolkit.decoders.pc_sampler import PositionAndCorpus
from dllm_toolkit.decoders.remdm_loop import LookingBack, TakeBackLeast, remdm_loop
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.saber import AboveMean, TakeBackFallen, saber
from dllm_toolkit.decoders.token_editing import EditTokens, llada21
from dllm_toolkit.engine import Engine
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.state import Region, State
from dllm_toolkit.testing import cases_revise, contract
from dllm_toolkit.testing.contract_cache import CACHE_CHECKS
from dllm_toolkit.testing.models import EOS, MASK, VOCABULARY, Oracle, Scripted, tiny_transformer
from dllm_toolkit.testing.pairs import Pair, pair
from dllm_toolkit.testing.record import Batch, Moment, difference, difference_where_both_read, record, unequal
from dllm_toolkit.types import Attention, Canvas, Need, PyTree

BLOCK_CAUSAL = contract.toys()[1]
KINDS: tuple[Attention, ...] = ("full", "block_causal")
GATE = Gate(0.4)


def revises(rule: Revise) -> Decoder:
    return BlockDecoder(SemiAutoregressive(4), GATE, revise=rule)


def pipelines(rule: Revise) -> Decoder:
    return BlockDecoder(Pipelined(4, add_at=0.5, activate_at=0.75), GATE, revise=rule)


def gaps(rule: Revise) -> Decoder:
    return BlockDecoder(SemiAutoregressive(5), Hierarchy(0.3, 0.7), revise=rule)


def means(rule: Revise) -> Decoder:
    return BlockDecoder(SemiAutoregressive(None), AboveMean(2), revise=rule)


def schedules(rule: Schedule) -> Decoder:
    return BlockDecoder(rule, Quota(5))


PAIRS = (
    pair("E14 editing above certainty keeps", revises, EditTokens(1.0), Keep()),
    pair("E14 the same in a pipeline", pipelines, EditTokens(1.0), Keep()),
    pair("editing never keeps", revises, EditTokens(0.0, limit=0), Keep()),
    pair("remasking nothing improbable keeps", revises, EditTokens(0.0, 16, "remask", "improbable", 3), Keep()),
    pair("remasking never keeps", revises, EditTokens(0.0, 16, "remask", limit=0), Keep()),
    pair("a limit that nobody reaches is none", revises, EditTokens(0.2, 3, limit=99), EditTokens(0.2, 3)),
    Pair(
        "E14 as presets: without edits LLaDA2.1 is a strict threshold",
        lambda: llada21(block_length=4, threshold=0.6, edit_threshold=1.0),
        lambda: BlockDecoder(SemiAutoregressive(4), Gate(0.6, strict=True, minimum=1)),
    ),
    pair("E16 taking back nothing doubtful keeps", gaps, TakeBackDoubtful(0.0), Keep()),
    Pair("E16 as presets", lambda: hierarchy(5, 0.3, 0.7, remask_below=0.0), lambda: gaps(Keep())),
    pair("E17 Saber that takes nothing back is its threshold", means, TakeBackFallen(0, None), Keep()),
    Pair(
        "a mean of at least the whole answer is one step",
        lambda: BlockDecoder(SemiAutoregressive(4), AboveMean(99)),
        lambda: BlockDecoder(SemiAutoregressive(4), Gate(0.0)),
    ),
    pair("no loops: the schedule inside", schedules, LookingBack(SemiAutoregressive(4), 0.5, 0), SemiAutoregressive(4)),
    pair("loops that begin when all is decided never do", schedules, LookingBack(SemiAutoregressive(4), 1.0, 9), SemiAutoregressive(4)),
    Pair("no loops, as a preset", lambda: remdm_loop(5, loops=0), lambda: BlockDecoder(SemiAutoregressive(None), Quota(5))),
    Pair(
        "no loops, with another score",
        lambda: BlockDecoder(LookingBack(loops=0), Quota(), PositionAndCorpus(), TakeBackLeast(), WhenFull()),
        lambda: BlockDecoder(SemiAutoregressive(None), Quota(), PositionAndCorpus(), stop=WhenFull()),
    ),
)


def indifferent() -> list[Cache]:
    """Caches that compute the open span whether or not its decided positions are read; a rule that looks back reads them."""
    return [cache for cache in contract.few_caches() if not isinstance(cache, DelayedCache)]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pair(pair: Pair) -> None:
    tried = 0
    for toy in contract.toys():
        for cache in indifferent():
            # Where a position is read from is no business of these rules: a shifted model is met once.
            if contract.fits(pair.one(), cache, toy) is not None or (toy.model.spec.shift == 1 and not isinstance(cache, NoCache)):
                continue
            mine = record(toy.model, pair.one(), cache, unequal())
            theirs = record(toy.model, pair.other(), cache, unequal())
            assert difference_where_both_read(mine, theirs) is None, (toy.name, cache)
            tried += 1
    assert tried


EDITING = {
    "edits": lambda: llada21(**cases_revise.EDITED),
    "remasks": lambda: llada21(**cases_revise.EDITED, **cases_revise.REMASKED),
    "all blocks": lambda: llada21(**cases_revise.EDITED, reach="answer"),
}


def changed(moment: Moment) -> Canvas:
    """Positions of the text that were decided before a step and hold another token, or none, after it."""
    before, after = moment.before, moment.after
    return ~before.masked & ~before.fixed & ((after.tokens != before.tokens) | after.masked) & after.inside


def seeds(attention: Attention, count: int = 4) -> list[Transformer]:
    return [tiny_transformer(2, attention, 0, seed) for seed in range(count)]


@pytest.mark.parametrize("build", EDITING.values(), ids=EDITING.keys())
def test_a_block_closes_when_it_is_full_and_settled(build: Callable[[], BlockDecoder]) -> None:
    """ED2, ED3: the last forward of a block found no mask and changed nothing, or the cap was reached; B + cap forwards at most."""
    capped = calm = 0
    for attention in KINDS:
        for model in seeds(attention):
            decoder = build()
            rule = decoder.revise
            assert isinstance(rule, EditTokens)
            recording = record(model, decoder, NoCache(), unequal())
            for row in range(4):
                moments = [moment for moment in recording.moments if not bool(moment.before.done[row])]
                epochs = [int(moment.asks[0].region.epoch[row]) for moment in moments]
                for epoch in set(epochs):
                    inside = [moment for moment, one in zip(moments, epochs, strict=True) if one == epoch]
                    read = inside[0].asks[0].region.read[row]
                    found_none = [not bool((moment.before.masked[row] & read).any()) for moment in inside]
                    assert sum(found_none) <= rule.max_post_steps
                    if rule.action == "replace":
                        assert len(inside) <= 4 + rule.max_post_steps
                    if sum(found_none) == rule.max_post_steps:
                        capped += 1
                    else:
                        assert found_none[-1] and not bool((changed(inside[-1])[row] & read).any())
                        calm += 1
    assert capped and calm


def test_a_settled_span_stays_settled() -> None:
    """ED2: where the last forward of an answer changed nothing, another one would not either."""
    tried = 0
    decoder = replace(llada21(block_length=None, threshold=0.4, edit_threshold=0.6), stop=WhenFull())
    for model in seeds("full", 6):
        recording = record(model, decoder, NoCache(), unequal())
        for row in range(4):
            moment = [moment for moment in recording.moments if not bool(moment.before.done[row])][-1]
            state, region = moment.before, moment.asks[0].region
            if int(state.parts.revise.spent[row]) + 1 >= 16:
                continue
            with torch.inference_mode():
                answer = Engine(model, NoCache(), state).ask(state, region)
            edit = decoder.revise.edit(decoder.propose(answer, state), region, state, state)
            assert not bool(edit.replace[row].any()) and bool(edit.settled[row])
            tried += 1
    assert tried > 8


def test_edits_stay_in_the_open_block_unless_they_may_reach_further() -> None:
    """ED4, ED5."""
    behind = {"block": 0, "answer": 0}
    for reach in ("block", "answer"):
        for attention in KINDS:
            for model in seeds(attention):
                for moment in record(model, llada21(**cases_revise.EDITED, reach=reach), NoCache(), unequal()).moments:
                    region = moment.asks[0].region
                    edits = changed(moment)
                    assert not bool((edits & (region.block > region.epoch.unsqueeze(1))).any())
                    assert not bool((edits & moment.before.fixed).any())
                    behind[reach] += int((edits & (region.block < region.epoch.unsqueeze(1))).sum())
    assert behind["block"] == 0 and behind["answer"] > 3


def test_the_modes_are_two_pairs_of_thresholds() -> None:
    assert llada21("speed") == llada21("quality", threshold=0.5, edit_threshold=0.0)
    assert llada21("quality") == llada21("speed", threshold=0.7, edit_threshold=0.5)


def sure(tokens: list[int], probability: float = 0.9) -> Tensor:
    """Logits [n, V] with one token of the given probability at each position, the others but the mask sharing the rest."""
    logits = torch.full((len(tokens), VOCABULARY), (1 - probability) / (VOCABULARY - 2), dtype=torch.float64).log()
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = torch.tensor(probability, dtype=torch.float64).log()
    logits[:, MASK] = 5.0
    return logits


@pytest.mark.parametrize(("no_return", "cap", "forwards"), [(False, 16, 17), (False, 2, 3), (False, 0, 1), (True, 16, 3)])
def test_two_tokens_that_replace_each_other_end(no_return: bool, cap: int, forwards: int) -> None:
    """A B A B ...: ended by the cap on forwards of a full block, or at once if a replaced token may not come back."""
    script = [sure([3] * 8) if number % 2 == 0 else sure([4] * 8) for number in range(40)]
    output = decode(Scripted(script), llada21(block_length=4, no_return=no_return, max_post_steps=cap), [[1, 2]], max_new_tokens=4)
    assert output.stats.nfe == [forwards]
    assert output.stats.edits == [4 * min(forwards - 1, 1 if no_return else 99)]


def test_the_default_step_limit_knows_the_cap() -> None:
    """Blocks of one token that are edited up to the cap: 17 forwards a token, more than the driver's four."""
    script = [sure([3] * 40) if number % 2 == 0 else sure([4] * 40) for number in range(400)]
    output = decode(Scripted(script), llada21(block_length=1), [[1, 2]], max_new_tokens=20)
    assert output.stats.nfe == [20 * 17]


def test_an_end_of_text_that_is_edited_away_ends_nothing() -> None:
    """A row does not stop at an end-of-text token before its block has settled."""
    first, second = [1, 1, 5, EOS, 6, 7], [1, 1, 5, 8, 6, 7]
    output = decode(Scripted([sure(first), sure(second)]), llada21(block_length=4), [[1, 2]], max_new_tokens=4)
    assert output.tokens == [[5, 8, 6, 7]] and output.stats.nfe == [3]
    kept = decode(Scripted([sure(first)]), llada21(block_length=4), [[1, 2]], max_new_tokens=4)
    assert kept.tokens == [[5, EOS, EOS, EOS]] and kept.stats.nfe == [2]


def test_commits_and_edits_happen_together() -> None:
    """The picture of the module: one forward edits C to D and commits B."""
    a, b, c, d, e = 5, 6, 7, 8, 9
    blank = sure([3] * 6, 0.1)

    def looks(*known: tuple[int, int]) -> Tensor:
        logits = blank.clone()
        for place, token in known:
            logits[2 + place] = sure([token])[0]
        return logits

    script = [looks((0, a), (2, c)), looks((0, a), (1, b), (2, d)), looks((0, a), (1, b), (2, d), (3, e))]
    recording = record(Scripted(script), llada21("speed", 4, edit_threshold=0.5), NoCache(), Batch(((1, 2),), ((None,) * 4,), (0,)))
    seen = [moment.after.tokens[0, 2:6].tolist() for moment in recording.moments]
    assert seen == [[a, MASK, c, MASK], [a, b, d, MASK], [a, b, d, e], [a, b, d, e]]


def test_a_token_to_mask_is_decided_anew() -> None:
    """Its position is masked when the model sees it again; no position is taken back more often than the limit."""
    back = 0
    for model in seeds("block_causal"):
        recording = record(model, llada21(**cases_revise.EDITED, action="remask", limit=2), NoCache(), unequal())
        times = torch.zeros_like(recording.first.tokens)
        for moment in recording.moments:
            taken = changed(moment)
            assert bool(moment.after.masked[taken].all())
            times = times + taken
        assert int(times.max()) <= 2
        back += int(times.sum())
    assert back > 3


@pytest.mark.parametrize("build", [*EDITING.values(), lambda: llada21(**cases_revise.EDITED, **cases_revise.REMASKED, reach="answer")])
@pytest.mark.parametrize("cache", [PrefixCache(), DualCache(), BlockCausalCache()], ids=lambda cache: type(cache).__name__)
def test_no_cache_keeps_what_may_still_be_edited(build: Callable[[], Decoder], cache: Cache) -> None:
    """C1 to C5 on logits, for every reach, also where keys of finished blocks are not final."""
    for toy in contract.toys()[:2]:
        if contract.fits(build(), cache, toy) is None:
            place = contract.bench(build(), cache, toy)
            assert [str(result) for result in contract.run_checks(place, CACHE_CHECKS) if not result.passed] == []


@dataclass(frozen=True)
class StoresWhenFull(Cache):
    """Keeps a block's keys as soon as it holds no mask, whether or not the schedule has closed it."""

    exact = True
    needs = frozenset({Need.BLOCK_CAUSAL})

    def init(self, state: State) -> PyTree:
        return torch.zeros_like(state.masked)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible & ~own | region.read, region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        first = torch.where(state.masked, region.block, state.masked.shape[1] + 1).amin(1, keepdim=True)
        return own | (plan.compute & (region.block < first) & ~state.done.unsqueeze(1))


def test_keys_that_are_stored_before_a_block_has_settled_are_stale() -> None:
    """The check is sharp: a cache that does not wait for `closed` keeps the keys of tokens that were edited afterwards."""
    place = contract.bench(llada21(**cases_revise.EDITED), StoresWhenFull(), BLOCK_CAUSAL)
    found = {result.name[:3] for result in contract.run_checks(place, CACHE_CHECKS) if not result.passed}
    assert found & {"C01", "C02"}


def test_multi_block_editing_costs_lanes_and_no_exactness() -> None:
    """With reach answer only the prompt's keys are kept; the answer is computed in every forward, and logits are those of no cache."""
    decoder = llada21(**cases_revise.EDITED, reach="answer")
    plain = record(BLOCK_CAUSAL.model, decoder, NoCache(), unequal())
    kept = record(BLOCK_CAUSAL.model, decoder, BlockCausalCache(), unequal())
    for row in range(4):
        assert difference(plain, row, kept, row) is None
    for ask in kept.asks[1:]:
        alive = ~ask.state.done.unsqueeze(1)
        answer = ask.region.visible & ask.state.inside & alive
        assert torch.equal(ask.computed & alive, answer)


def current(logits: Tensor, token: int) -> float:
    logits = logits.clone()
    logits[MASK] = float("-inf")
    return float(logits.softmax(-1)[token])


@pytest.mark.parametrize(("minimum", "one_in"), [(2, 8), (3, 2), (1, 8), (5, 1)])
def test_saber_against_the_formula(minimum: int, one_in: int) -> None:
    """SA1, SA2: a plain loop over rows and positions commits and takes back the same, in every step of a decode."""
    took = 0
    for model in seeds("full", 3):
        decoder = BlockDecoder(SemiAutoregressive(7), AboveMean(minimum), revise=TakeBackFallen(minimum // 2, one_in), stop=WhenFull())
        recording = record(model, decoder, NoCache(), unequal())
        for row in range(4):
            accepted: dict[int, float] = {}
            remembered: dict[int, float] = {}
            for moment in recording.moments:
                if bool(moment.before.done[row]):
                    break
                ask, before = moment.asks[0], moment.before
                logits = ask.logits[row].clone()
                logits[:, MASK] = float("-inf")
                best, read = logits.argmax(-1), ask.region.read[row].nonzero().flatten().tolist()
                now = {i: current(logits[i], int(best[i]) if bool(before.masked[row, i]) else int(before.tokens[row, i])) for i in read}
                masked = [i for i in read if bool(before.masked[row, i])]
                bound = sum(accepted.values()) / len(accepted) if accepted else 1.0
                ranked = sorted(masked, key=lambda i: (-now[i], i))
                count = max(minimum, sum(now[i] >= bound for i in masked))
                commits = ranked[:count]
                accepted.update({i: now[i] for i in commits})
                back: list[int] = []
                if len(commits) < len(masked):
                    decided = [i for i in read if i in commits or not bool(before.masked[row, i])]
                    limit = min(len(commits) - 1, max(minimum // 2, ceil(len(commits) / one_in)))
                    back = sorted(decided, key=lambda i: (now[i] - remembered.get(i, 0.0), i))[:limit]
                for i in back:
                    del accepted[i]
                took += len(back)
                remembered.update(now)
                after = moment.after.masked[row].nonzero().flatten().tolist()
                assert [i for i in read if i in after] == sorted({*masked} - {*commits} | {*back})
                assert len(after) < int(before.masked[row].sum())
    assert took or minimum == 1


@pytest.mark.parametrize("below", [0.3, 0.6, 1.1])
def test_hierarchy_takes_back_what_has_become_doubtful(below: float) -> None:
    """HR1, against a plain loop: which tokens were up again, and that one more is committed than was taken back."""
    reopened = overwritten = 0
    for attention in KINDS:
        for model in seeds(attention, 3):
            recording = record(model, hierarchy(5, 0.3, 0.7, remask_below=below), NoCache(), unequal())
            for moment in recording.moments:
                ask, before, after = moment.asks[0], moment.before, moment.after
                for row in range(4):
                    if bool(before.done[row]) or bool(after.done[row]):
                        continue
                    assert int(after.masked[row].sum()) < int(before.masked[row].sum())
                    for i in (ask.region.read[row] & ~before.masked[row]).nonzero().flatten().tolist():
                        doubtful = current(ask.logits[row, i], int(before.tokens[row, i])) < below
                        rewritten = bool(after.masked[row, i]) or int(after.born[row, i]) == int(before.step[row])
                        assert doubtful == rewritten
                        reopened += doubtful
                        overwritten += doubtful and not bool(after.masked[row, i])
    assert reopened and overwritten


@pytest.mark.parametrize(("count", "loops"), [(1, 3), (2, 2), (1, 32)])
def test_the_finishing_loop(count: int, loops: int) -> None:
    """Seven eighths, then pairs of a look back and a commit, then the rest; what is taken back is what is least probable at that look."""
    batch = Batch(((3, 1), (5,)), ((None,) * 16, (None,) * 8), (0, 1))
    for model in seeds("full", 2):
        decoder = BlockDecoder(LookingBack(loops=loops), Quota(), revise=TakeBackLeast(count), stop=WhenFull())
        recording = record(model, decoder, NoCache(), batch, max_steps=200)
        for row, length in enumerate((16, 8)):
            far = length * 7 // 8
            expected = list(range(1, far + 1))
            for _ in range(loops):
                expected += range(far - count, far + 1)
            expected += range(far + 1, length + 1)
            seen = []
            for moment in recording.moments:
                if bool(moment.before.done[row]):
                    break
                seen.append(int((moment.after.inside & ~moment.after.masked)[row].sum()))
                taken = (moment.after.masked & ~moment.before.masked)[row].nonzero().flatten().tolist()
                if taken:
                    decided = (moment.before.inside & ~moment.before.masked)[row].nonzero().flatten().tolist()
                    odds = {i: current(moment.asks[0].logits[row, i], int(moment.before.tokens[row, i])) for i in decided}
                    assert sorted(taken) == sorted(sorted(decided, key=lambda i: (odds[i], i))[:count])
            assert seen == expected


@pytest.mark.parametrize(
    "decoder",
    [llada21(block_length=4), llada21("speed", 4, reach="answer"), saber(), hierarchy(4, remask_below=0.4), remdm_loop(loops=3)],
)
def test_the_oracle_is_answered_whatever_is_looked_at_again(decoder: Decoder) -> None:
    """A model that ignores its context is decoded to the same known answer by every greedy decoder."""
    oracle, batch = Oracle(), unequal()
    recording = record(oracle, decoder, NoCache(), batch)
    for row, prompt in enumerate(batch.prompts):
        text = recording.text(row)
        assert text == oracle.answer(len(prompt), len(text))


def test_reading_all_blocks_changes_nothing_by_itself() -> None:
    """Without a rule that edits, `reach: answer` decodes the same tokens in the same steps."""
    for toy in contract.toys()[:4]:
        decoders = [BlockDecoder(SemiAutoregressive(4, reach="block"), GATE), BlockDecoder(SemiAutoregressive(4, reach="answer"), GATE)]
        states = [record(toy.model, decoder, NoCache(), unequal()).last for decoder in decoders]
        for name in ("tokens", "born", "step", "end"):
            assert torch.equal(getattr(states[0], name), getattr(states[1], name))


def test_sampled_methods_look_back_too() -> None:
    """A take-back at temperature 1 draws anew: the noise of a position depends on the row's step."""
    edits = 0
    for model in seeds("full", 2):
        decoder = BlockDecoder(SemiAutoregressive(4), GATE, Sample(temperature=1.0), EditTokens(0.1, 4, "remask", limit=2))
        edits += int(record(model, decoder, NoCache(), unequal()).last.edits.sum())
    assert edits > 3
