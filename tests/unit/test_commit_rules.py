"""The published commit rules one step at a time: hand-written probabilities, plain-Python references, sets that grow with their bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_toolkit.decoders.ascending_steps import Ascending, ascending_steps, doublings
from dllm_toolkit.decoders.bacd import BoundedAdaptive
from dllm_toolkit.decoders.base import Commit, DecodeError, Propose
from dllm_toolkit.decoders.credit import Credit
from dllm_toolkit.decoders.entropy_bounded import EntropyBudget
from dllm_toolkit.decoders.eoser import RejectEarly, eoser
from dllm_toolkit.decoders.hierarchy import Hierarchy
from dllm_toolkit.decoders.klass import Stable
from dllm_toolkit.decoders.local_leap import LocalLeap
from dllm_toolkit.decoders.pc_sampler import PositionAndCorpus, pc_sampler, read_counts, save_counts
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.ops import lanes
from dllm_toolkit.state import Answer, Proposal, Region, State, begin_state
from dllm_toolkit.testing.models import EOS, MASK, VOCABULARY, toy_spec

LENGTH = 12  # of the answers; a prompt of 1 (row 0) or 3 (row 1) tokens stands before
PROMPTS = ([1], [1, 2, 3])


def logits_of(sure: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits [B, n, V] whose best token (default: 5) has the given probability, the others but the mask sharing the rest."""
    tokens = torch.full(sure.shape, 5) if tokens is None else tokens
    rest = ((1 - sure) / (VOCABULARY - 2)).clamp(min=1e-300).log()
    logits = rest.unsqueeze(-1).repeat(1, 1, VOCABULARY)
    logits.scatter_(2, tokens.unsqueeze(-1), sure.log().unsqueeze(-1))
    logits[..., MASK] = 3.0  # what the model says of the mask id must not matter
    return logits


class Scene:
    """Two rows with one open span; `decided` positions of the answer hold tokens already."""

    def __init__(self, decided: Tensor | None = None, block_length: int | None = None) -> None:
        rows = [(list(prompt), [None] * LENGTH) for prompt in PROMPTS]
        state = begin_state(toy_spec(), rows, [0, 1], length=LENGTH + 5, device="cpu")
        schedule = SemiAutoregressive(block_length)
        state = state.with_part(schedule=schedule.init(state))
        if decided is not None:
            state = state.write(self.canvas(state, decided), torch.full_like(state.tokens, 7))
        state = state.with_part(schedule=schedule.advance(state)[0])
        self.state, self.region = state, schedule.region(state)

    @staticmethod
    def canvas(state: State, answers: Tensor) -> Tensor:
        """Values for the answers [2, LENGTH] on the canvas; 0 elsewhere."""
        found = torch.zeros(2, state.tokens.shape[1], dtype=answers.dtype)
        for row, prompt in enumerate(PROMPTS):
            found[row, len(prompt) : len(prompt) + LENGTH] = answers[row]
        return found

    def answer(self, logits: Tensor, seen: Tensor | None = None) -> Answer:
        """A model's answer, logits [2, LENGTH, V]; `seen`: the answer positions that were read."""
        wanted = self.region.read if seen is None else self.region.read & self.canvas(self.state, seen)
        positions = lanes.pack(wanted, max(int(wanted.sum(1).max()), 1))
        offset = torch.tensor([[len(prompt)] for prompt in PROMPTS])
        where = (positions - offset).clamp(0, LENGTH - 1).unsqueeze(-1).expand(-1, -1, VOCABULARY)
        return Answer(logits.gather(1, where), positions)

    def proposal(self, logits: Tensor, propose: Propose | None = None, seen: Tensor | None = None) -> Proposal:
        propose = propose or Sample()
        state = self.state if self.state.parts.propose != () else self.state.with_part(propose=propose.init(self.state))
        return propose(self.answer(logits, seen), state)

    def select(self, rule: Commit, proposal: Proposal, own: object = None) -> Tensor:
        """What a rule chooses, on the answers [2, LENGTH]."""
        state = self.state.with_part(commit=rule.init(self.state) if own is None else own)
        chosen = rule.select(proposal, self.region, state) & self.region.eligible
        return self.answers(chosen)

    def carry(self, rule: Commit, proposal: Proposal, own: object = None) -> object:
        return rule.carry(proposal, self.region, self.state.with_part(commit=rule.init(self.state) if own is None else own))

    @staticmethod
    def answers(canvas: Tensor) -> Tensor:
        return torch.stack([canvas[row, len(prompt) : len(prompt) + LENGTH] for row, prompt in enumerate(PROMPTS)])


def places(chosen: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in chosen]


def randomly(number: int) -> tuple[Scene, Tensor]:
    """A scene with some decided positions, and a probability for each position."""
    generator = torch.Generator().manual_seed(number)
    decided = torch.rand(2, LENGTH, generator=generator) < 0.3
    decided[:, int(torch.randint(LENGTH, (1,), generator=generator))] = False
    sure = 0.05 + 0.95 * torch.rand(2, LENGTH, generator=generator, dtype=torch.float64)
    return Scene(decided), sure


def both(*values: float) -> Tensor:
    """The same probabilities for both rows, 0.1 behind those given."""
    return torch.tensor([list(values) + [0.1] * (LENGTH - len(values))] * 2, dtype=torch.float64)


RANDOM = pytest.mark.parametrize("number", range(25))


class TestEntropyBudget:
    @RANDOM
    @pytest.mark.parametrize("order", ["probability", "negative_entropy", "margin"])
    def test_against_the_formula(self, number: int, order: str) -> None:
        scene, sure = randomly(number)
        logits = logits_of(sure) + torch.randn(2, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(number))
        proposal = scene.proposal(logits, Sample(score=order))  # type: ignore[arg-type]
        clean = logits.clone()
        clean[..., MASK] = -math.inf
        p = clean.softmax(-1)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
        score = scene.answers(proposal.score)
        for budget in (0.3, 1.5, 4.0):
            chosen = scene.select(EntropyBudget(budget), proposal)
            for row in range(2):
                free = places(scene.answers(scene.region.eligible))[row]
                ranked = sorted(free, key=lambda place, row=row: (-float(score[row, place]), place))
                best: list[int] = []
                for size in range(1, len(ranked) + 1):
                    values = [float(entropy[row, place]) for place in ranked[:size]]
                    if sum(values) - max(values) <= budget:
                        best = ranked[:size]
                assert places(chosen)[row] == sorted(best)

    def test_certain_positions_are_free(self) -> None:
        """EB1: without a budget, what has no entropy at all, and the best of the others."""
        scene = Scene()
        logits = logits_of(both(0.5, 0.6))
        logits[:, 3:5] = -math.inf
        logits[:, 3:5, 9] = 0.0
        assert places(scene.select(EntropyBudget(0.0), scene.proposal(logits))) == [[1, 3, 4]] * 2
        # A tiny entropy next to a large one is not lost in a difference of sums.
        assert places(scene.select(EntropyBudget(0.0), scene.proposal(logits_of(both(0.999999, 0.5))))) == [[0]] * 2

    def test_no_budget_is_refused_below_zero(self) -> None:
        with pytest.raises(DecodeError, match="budget must be 0 or more"):
            EntropyBudget(-1.0)


class TestLocalLeap:
    def test_the_picture_of_the_docstring(self) -> None:
        scene = Scene()
        proposal = scene.proposal(logits_of(both(0.5, 0.8, 0.95, 0.7, 0.8, 0.6, 0.8, 0.4)))
        assert places(scene.select(LocalLeap(0.9, 0.75, 2), proposal)) == [[1, 2, 4]] * 2

    @RANDOM
    def test_against_the_formula(self, number: int) -> None:
        scene, sure = randomly(number)
        free = scene.answers(scene.region.eligible)
        for distance in (0, 1, 3):
            chosen = scene.select(LocalLeap(0.8, 0.5, distance), scene.proposal(logits_of(sure)))
            for row in range(2):
                anchors = [place for place in range(LENGTH) if free[row, place] and sure[row, place] >= 0.8]
                near = {place for place in range(LENGTH) if any(abs(place - anchor) <= distance for anchor in anchors)}
                pulled = {place for place in near if free[row, place] and sure[row, place] >= 0.5}
                assert set(places(chosen)[row]) == set(anchors) | pulled

    def test_neighbourhoods_end_at_blocks(self) -> None:
        scene = Scene()
        region = replace(scene.region, block=torch.arange(LENGTH + 5).div(4, rounding_mode="floor").expand(2, -1) + 1)
        proposal = scene.proposal(logits_of(both(*[0.8] * 5, 0.95, *[0.8] * 6)))
        for row, canvas in enumerate(LocalLeap(0.9, 0.7, 9).select(proposal, region, scene.state)):
            anchor = len(PROMPTS[row]) + 5
            first = anchor // 4 * 4
            expected = [place for place in range(first, first + 4) if len(PROMPTS[row]) <= place < len(PROMPTS[row]) + LENGTH]
            assert canvas.nonzero().flatten().tolist() == expected

    def test_a_decided_token_is_no_anchor(self) -> None:
        decided = torch.zeros(2, LENGTH, dtype=torch.bool)
        decided[:, 2] = True
        scene = Scene(decided)
        chosen = scene.select(LocalLeap(0.9, 0.7, 3), scene.proposal(logits_of(both(0.8, 0.8, 0.99, 0.8))))
        assert places(chosen) == [[], []]


class TestHierarchy:
    @RANDOM
    def test_against_the_formula(self, number: int) -> None:
        scene, sure = randomly(number)
        free = scene.answers(scene.region.eligible)
        chosen = scene.select(Hierarchy(0.4, 0.8), scene.proposal(logits_of(sure)))
        for row in range(2):
            expected = {place for place in range(LENGTH) if free[row, place] and sure[row, place] >= 0.8}
            run: list[int] = []
            for place in range(LENGTH + 1):
                if place < LENGTH and free[row, place]:
                    run.append(place)
                    continue
                if run:
                    best = max(run, key=lambda one, row=row: float(sure[row, one]))
                    expected |= {best} if sure[row, best] >= 0.4 else set()
                run = []
            assert set(places(chosen)[row]) == expected

    def test_one_a_run(self) -> None:
        decided = torch.zeros(2, LENGTH, dtype=torch.bool)
        decided[:, [4, 8]] = True
        scene = Scene(decided)
        sure = both(0.5, 0.6, 0.5, 0.55, 0.9, 0.3, 0.35, 0.3, 0.9, 0.85, 0.84, 0.5)
        assert places(scene.select(Hierarchy(0.4, 0.8), scene.proposal(logits_of(sure)))) == [[1, 9, 10]] * 2
        assert places(scene.select(Hierarchy(0.7, 0.95), scene.proposal(logits_of(sure)))) == [[9]] * 2


class TestBoundedAdaptive:
    def test_the_threshold_follows_what_was_accepted(self) -> None:
        rule, scene = BoundedAdaptive(0.3, 0.9), Scene()
        first = scene.proposal(logits_of(both(0.7, 0.65, 0.5, 0.4)))
        assert places(scene.select(rule, first)) == [[0]] * 2  # nothing accepted: as sure as the best
        own = scene.carry(rule, first)
        decided = torch.zeros(2, LENGTH, dtype=torch.bool)
        decided[0, 0] = True
        decided[1, [0, 3]] = True
        later = Scene(decided)
        second = later.proposal(logits_of(both(0.99, 0.72, 0.6, 0.8, 0.56)))
        # Row 0 accepted 0.7; row 1 accepted 0.7 and 0.4, mean 0.55.
        assert places(later.select(rule, second, own)) == [[1, 3], [1, 2, 4]]
        assert places(later.select(BoundedAdaptive(0.75, 0.9), second, own)) == [[3], []]
        assert places(later.select(BoundedAdaptive(0.1, 0.5), second, own)) == [[1, 2, 3, 4], [1, 2, 4]]

    def test_blocks_do_not_share_a_history(self) -> None:
        rule, scene = BoundedAdaptive(0.3, 0.9), Scene(block_length=4)
        own = scene.carry(rule, scene.proposal(logits_of(both(*[0.35] * 4))))
        decided = torch.zeros(2, LENGTH, dtype=torch.bool)
        decided[:, :4] = True
        following = Scene(decided, block_length=4)
        assert places(following.answers(following.region.eligible)) == [[4, 5, 6, 7]] * 2
        proposal = following.proposal(logits_of(both(*[0.5] * 5, 0.6)))
        assert places(following.select(rule, proposal, own)) == [[5]] * 2

    def test_order_of_bounds(self) -> None:
        with pytest.raises(DecodeError, match="low must be at most high"):
            BoundedAdaptive(0.9, 0.6)


class TestStable:
    def steps(self, rule: Stable, rounds: list[Tensor], seen: list[Tensor] | None = None) -> list[list[list[int]]]:
        """What is chosen in each round when nothing is ever committed."""
        scene, own, found = Scene(), None, []
        for number, logits in enumerate(rounds):
            proposal = scene.proposal(logits, seen=None if seen is None else seen[number])
            found.append(places(scene.select(rule, proposal, own)))
            own = scene.carry(rule, proposal, own)
        return found

    def test_ready_after_history_plus_one_looks(self) -> None:
        same, moved = logits_of(both(0.9, 0.8)), logits_of(both(0.9, 0.8), torch.full((2, LENGTH), 6))
        rule = Stable(0.7, 0.01, 2, fallback=Quota())
        assert self.steps(rule, [same] * 4) == [[[0]] * 2, [[0]] * 2, [[0, 1]] * 2, [[0, 1]] * 2]
        assert self.steps(rule, [same, same, moved, moved, moved])[2:] == [[[0]] * 2, [[0]] * 2, [[0, 1]] * 2]

    def test_what_was_not_read_is_unknown(self) -> None:
        same = logits_of(both(0.9, 0.8, 0.85))
        everything = torch.ones(2, LENGTH, dtype=torch.bool)
        gap = everything.clone()
        gap[:, 1] = False
        found = self.steps(Stable(0.7, 0.01, 1), [same] * 5, [everything, everything, gap, everything, everything])
        assert found == [[[0]] * 2, [[0, 1, 2]] * 2, [[0, 2]] * 2, [[0, 2]] * 2, [[0, 1, 2]] * 2]

    def test_memory_is_a_bound(self) -> None:
        same = logits_of(both(0.9, 0.8, 0.85))
        rule = Stable(0.7, 0.01, 1, memory=2)
        assert self.steps(rule, [same] * 2)[1] == [[0, 1]] * 2
        scene = Scene()
        assert scene.carry(rule, scene.proposal(same)).belief.shape == (2, 2, VOCABULARY)  # type: ignore[attr-defined]

    def test_the_divergence_is_from_now_to_before(self) -> None:
        sharp, flat = logits_of(both(0.99)), logits_of(both(0.5))

        def divergence(new: Tensor, old: Tensor) -> float:
            new, old = new.clone(), old.clone()
            new[..., MASK] = old[..., MASK] = -math.inf
            p, q = new[0, 0].softmax(-1), old[0, 0].softmax(-1)
            return float((p * ((p + 1e-12).log() - (q + 1e-12).log())).sum())

        moved = divergence(sharp, flat)
        assert abs(moved - divergence(flat, sharp)) > 0.1
        for bound, ready in ((moved * 1.01, True), (moved * 0.99, False)):
            rule = Stable(0.5, bound, 1, fallback=Gate(1.1))
            assert self.steps(rule, [flat, sharp])[1] == [[0] if ready else []] * 2


class TestAscending:
    def test_floor_of_the_logarithm(self) -> None:
        counts = torch.arange(1, 5000)
        assert doublings(counts).tolist() == [max(1, int(count).bit_length() - 1) for count in counts]

    def test_quotas_and_borders(self) -> None:
        scene, own, sizes = Scene(), None, []
        rule = Ascending(2)  # 12 masks: 3 steps of 1, 2, 9; the first two share the first 3 positions
        proposal = scene.proposal(logits_of(both(0.1, 0.2, 0.3, *[0.9] * 9)))
        for _ in range(3):
            sizes.append(places(scene.select(rule, proposal, own))[0])
            own = scene.carry(rule, proposal, own)
        assert sizes == [[2], [1, 2], list(range(12))]  # nothing is committed here, so the last step sees all twelve
        assert places(scene.select(Ascending(1), proposal)) == [[3]] * 2

    def test_refused(self) -> None:
        with pytest.raises(DecodeError, match="stages must be 1 or more"):
            Ascending(0)


class TestRejectEarly:
    tokens = torch.full((2, LENGTH), 5)

    def proposal(self, scene: Scene) -> Proposal:
        tokens = self.tokens.clone()
        tokens[:, 0] = EOS
        return scene.proposal(logits_of(both(0.9, 0.6, 0.5), tokens))

    def test_the_factor_grows_with_the_steps(self) -> None:
        scene = Scene()
        proposal, rule, own, first = self.proposal(scene), RejectEarly(Quota(), 0.4, 1.0, steps=4), None, []
        for _ in range(5):  # 0.9 times 0.4, 0.6, 0.8, 1, 1
            first.append(places(scene.select(rule, proposal, own))[0])
            own = scene.carry(rule, proposal, own)
        assert first == [[1], [1], [0], [0], [0]]

    def test_doubling_time(self) -> None:
        """12 masks, N = 3: gamma is 0.9 times 1/8, 3/8, 7/8 at low 0."""
        scene = Scene()
        proposal, own, passed = self.proposal(scene), None, []
        rule = RejectEarly(Gate(0.9 * 7 / 8 - 1e-9), 0.0, 1.0, "doubling")
        for _ in range(3):
            passed.append(0 in places(scene.select(rule, proposal, own))[0])
            own = scene.carry(rule, proposal, own)
        assert passed == [False, False, True]

    def test_forced_progress_does_not_commit_what_is_held_back(self) -> None:
        scene = Scene()
        assert places(scene.select(RejectEarly(Gate(0.95), 0.1), self.proposal(scene))) == [[1]] * 2

    def test_refused(self) -> None:
        with pytest.raises(DecodeError, match="low and high must satisfy"):
            RejectEarly(low=0.9, high=0.5)
        with pytest.raises(DecodeError, match="steps does not go with ascending"):
            eoser(steps=4, ascending=True)
        with pytest.raises(DecodeError, match="stages goes with ascending"):
            eoser(stages=2)
        assert isinstance(ascending_steps().commit, Ascending)


class TestPositionAndCorpus:
    def test_against_the_formula(self, tmp_path: Path) -> None:
        save_counts(tmp_path / "counts.safetensors", [[5] * 90, [6] * 9, [7]], VOCABULARY)
        counts = str(tmp_path / "counts.safetensors")
        tokens = torch.tensor([[5, 6, 7, 8] * 3] * 2)
        scene, sure = Scene(), both(*[0.9, 0.8, 0.5, 0.4] * 3)
        proposal = scene.proposal(logits_of(sure, tokens), PositionAndCorpus(0.25, 2.0, counts))
        frequency = {5: 0.9, 6: 0.09, 7: 0.01, 8: 0.01}
        found = scene.answers(proposal.score)
        for place in range(LENGTH):
            said = float(sure[0, place]) * -math.log(frequency[int(tokens[0, place])])
            expected = math.log(min(said, 2.0)) - 0.25 * place
            assert found[:, place].tolist() == pytest.approx([expected] * 2, abs=1e-5)
        assert torch.equal(proposal.confidence.isinf(), proposal.score.isinf())

    def test_tables(self, tmp_path: Path) -> None:
        table = tmp_path / "counts.json"
        table.write_text(json.dumps({"5": 90, "6": 10}))
        assert read_counts(table, VOCABULARY).nonzero().flatten().tolist() == [5, 6]
        for content, message in (
            ({"99": 1}, "another tokenizer"),
            ({"5": -1}, "0 or more"),
            ({}, "not all 0"),
            ([1, 2], "no table of counts"),
            ({"word": 1}, "no table of counts"),
        ):
            table.write_text(json.dumps(content))
            with pytest.raises(DecodeError, match=message):
                read_counts(table, VOCABULARY)
        with pytest.raises(DecodeError, match="cannot find the counts"):
            pc_sampler(counts=str(tmp_path / "missing.json"))
        with pytest.raises(DecodeError, match="must be a .json or .safetensors"):
            pc_sampler(counts=str(tmp_path / "counts.pt"))


class TestCredit:
    def looks(self, rule: Credit, rounds: list[Tensor]) -> list[Proposal]:
        scene, found = Scene(), []
        state = scene.state.with_part(propose=rule.init(scene.state))
        for logits in rounds:
            proposal = rule(scene.answer(logits), state)
            found.append(proposal)
            state = state.with_part(propose=rule.carry(proposal, scene.region, state))
        return found

    @pytest.mark.parametrize("memory", [1, 2, 8])
    def test_against_a_full_table(self, memory: int) -> None:
        """Exact as long as no position names more tokens than it has places; these name two."""
        weight, decay, power = 0.7, 0.8, 0.5
        named = [5, 5, 6, 5, 6, 6]
        sure = [0.5, 0.6, 0.7, 0.4, 0.9, 0.3]
        rounds = [logits_of(both(*[p] * LENGTH), torch.full((2, LENGTH), token)) for p, token in zip(sure, named, strict=True)]
        table = {5: 0.0, 6: 0.0}
        for number, proposal in enumerate(self.looks(Credit(weight, decay, power, memory), rounds)):
            table = {token: decay * credit for token, credit in table.items()}
            table[named[number]] += sure[number] ** power
            fused = rounds[number][0, 0].clone()
            fused[MASK] = -math.inf
            for token, credit in table.items():
                fused[token] += weight * math.log1p(credit)
            p = fused.softmax(-1)
            if memory > 1 or number < 2:
                found = Scene.answers(proposal.confidence)
                assert found.flatten().tolist() == pytest.approx([float(p.max())] * 2 * LENGTH, abs=1e-6)
                assert set(Scene.answers(proposal.tokens).flatten().tolist()) == {int(p.argmax())}

    def test_the_proposal_keeps_the_logits(self) -> None:
        logits = logits_of(both(*[0.5] * LENGTH))
        for proposal in self.looks(Credit(), [logits] * 3):
            assert torch.equal(proposal.logits, Scene().answer(logits).logits)

    def test_decided_positions_have_no_credit(self) -> None:
        decided = torch.zeros(2, LENGTH, dtype=torch.bool)
        decided[:, 4] = True
        rule, scene = Credit(), Scene(decided)
        state = scene.state.with_part(propose=rule.init(scene.state))
        proposal = rule(scene.answer(logits_of(both(*[0.5] * LENGTH))), state)
        earned = Scene.answers(rule.carry(proposal, scene.region, state).earned.sum(-1))
        assert places(earned == 0) == [[4]] * 2

    def test_refused(self) -> None:
        for arguments in ({"weight": -1.0}, {"decay": 1.5}, {"memory": 0}):
            with pytest.raises(DecodeError):
                Credit(**arguments)  # type: ignore[arg-type]


GROWING: dict[str, list[Callable[[], Commit]]] = {
    "budget": [lambda bound=bound: EntropyBudget(bound) for bound in (0.0, 0.5, 2.0, 8.0)],
    "distance": [lambda bound=bound: LocalLeap(0.8, 0.4, bound) for bound in (0, 1, 2, 9)],
    "relaxed": [lambda bound=bound: LocalLeap(0.8, bound, 2) for bound in (0.8, 0.6, 0.3)],
    "anchor": [lambda bound=bound: LocalLeap(bound, 0.3, 2) for bound in (0.95, 0.8, 0.5)],
    "low": [lambda bound=bound: Hierarchy(bound, 0.8) for bound in (0.8, 0.5, 0.1)],
    "high": [lambda bound=bound: Hierarchy(0.4, bound) for bound in (0.95, 0.8, 0.5)],
    "bounds": [lambda bound=bound: BoundedAdaptive(bound, bound) for bound in (0.9, 0.6, 0.2)],
    "history": [lambda bound=bound: Stable(0.4, 0.02, bound, fallback=Gate(1.1)) for bound in (3, 1, 0)],
    "divergence": [lambda bound=bound: Stable(0.4, bound, 1, fallback=Gate(1.1)) for bound in (0.0, 0.005, 0.05, 9.0)],
    "sure": [lambda bound=bound: Stable(bound, 9.0, 1, fallback=Gate(1.1)) for bound in (0.9, 0.5, 0.1)],
    "quota": [lambda bound=bound: RejectEarly(Quota(bound), 0.3) for bound in (12, 4, 2, 1)],
}


@pytest.mark.parametrize("rules", GROWING.values(), ids=GROWING.keys())
def test_a_step_commits_more_as_its_bound_is_relaxed(rules: list[Callable[[], Commit]]) -> None:
    """Per step only: on the canvas of another step the sets need not be nested."""
    sizes = [0] * len(rules)
    for number in range(8):
        (scene, sure), (_, other) = randomly(number), randomly(number + 100)
        last = torch.zeros(2, LENGTH, dtype=torch.bool)
        for place, make in enumerate(rules):
            rule = make()
            own = scene.carry(rule, scene.proposal(logits_of(other * 0.3 + sure * 0.7)))
            chosen = scene.select(rule, scene.proposal(logits_of(sure)), None if isinstance(rule, RejectEarly) else own)
            assert not bool((last & ~chosen).any())
            last = chosen
            sizes[place] += int(chosen.sum())
    assert sizes == sorted(set(sizes)), sizes


def test_regions_are_respected() -> None:
    """Nothing outside the eligible positions, whatever the evidence: rules are asked with all of the canvas sure."""
    scene = Scene(block_length=4)
    region: Region = scene.region
    proposal = scene.proposal(logits_of(both(*[0.99] * LENGTH)))
    sure = replace(proposal, confidence=torch.ones_like(proposal.confidence), score=torch.ones_like(proposal.score))
    for rule in (EntropyBudget(9.0), LocalLeap(0.5, 0.1), Hierarchy(0.1, 0.5), BoundedAdaptive(0.1, 0.2), Ascending(), Stable(0.1, 9.0, 0)):
        state = scene.state.with_part(commit=rule.init(scene.state))
        assert not bool((rule.select(sure, region, state) & ~region.eligible).any()), rule
