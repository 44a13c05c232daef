"""FreeDave: verify several steps of a decode in one forward, and end with the very text of the slower decode.

The reference process is any decoder of the template: at a canvas it asks the model, decides, and arrives at the next canvas. What the
model said at one canvas is also a good guess of what it will say at the next ones, so

    s        the present canvas;  e: what the model said before the last decision
    d_0 = s, d_(j+1) = the step from d_j, decided with e instead of a forward         drafts, until the open span moves
    one forward over all drafts: every d_j gets its own answer
    best = 0, g = the step from d_0, decided with its own answer                     the true successor of s
    while a later draft d_j is g: best = j, g = the step from d_j with its own answer
    s = g,  e = the answer of d_best

Every accepted step is a step of the reference process, with everything that its rules remember, so tokens, the step at which each was
written, and random choices are the same; there is always at least one, so it never needs more forwards. `match: "subset"` also accepts a
draft whose tokens are all in g while g has more, and goes on from it (FreeDave++): the text is then its own.

Reference: Wu and Zhang, FreeDave: free draft-and-verification, arXiv 2510.00294.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Decoder, Schedule
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.ops import lanes, trees
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Region, State
from dllm_toolkit.types import Rows

if TYPE_CHECKING:
    from dllm_toolkit.engine import Engine

ONE_BY_ONE = Gate(2.0, minimum=1, maximum=1)


@dataclass(frozen=True)
class Evidence:
    """What SelfDraft remembers: the answer that the last step was decided with, its epoch, and (official_loop) whether it was decided."""

    answer: Answer
    epoch: Int[Tensor, "B"]
    decided: Rows


@register("decoder", "self_draft")
@dataclass(frozen=True)
class SelfDraft(Decoder):
    """FreeDave around any decoder of the template: the same text, decided in fewer forwards, each of up to `drafts` canvases.

    form: `batch` gives every draft its own row of keys and values, `tree` lets the drafts of a row share them and needs less memory;
    results are equal. match `exact` is lossless; `subset` accepts drafts that the next step contains (FreeDave++). eager: the last draft
    may be a full block with the next one opened; its forward is wider, and if it is right that block's first forward is saved.
    official_loop repeats the released code's account: what is decided waits for the forward that verifies it, a draft that fills the
    block is verified too, drafts grow by one token.

    Steps of the state are steps of the reference process. In half precision a wider forward may round a near-tie to the other side.

    Reference: FreeDave, arXiv 2510.00294.
    """

    cite = ("2510.00294",)
    leaps = True

    inner: BlockDecoder
    drafts: int = 4
    form: Literal["batch", "tree"] = "tree"
    match: Literal["exact", "subset"] = "exact"
    eager: bool = False
    official_loop: bool = False

    @property
    def lossless(self) -> bool:
        """Is the text that of the decoder inside?"""
        return self.match == "exact" and not self.official_loop

    def __post_init__(self) -> None:
        if self.drafts < 1:
            raise DecodeError(f"drafts must be 1 or more, got {self.drafts}. It counts canvases of one forward. Write drafts: 4.")
        for name, allowed in (("form", ("batch", "tree")), ("match", ("exact", "subset"))):
            if getattr(self, name) not in allowed:
                raise DecodeError(
                    f"{name} must be {allowed[0]} or {allowed[1]}, got {getattr(self, name)!r}. See SelfDraft. Write {name}: {allowed[0]}."
                )
        if self.eager and self.official_loop:
            raise DecodeError(
                "eager and official_loop exclude each other, got both. The released code's eager mode commits drafts that nothing has "
                "verified. Write official_loop: false."
            )

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    @property
    def branches(self) -> int:
        return self.drafts

    @property
    def branch_form(self) -> Literal["rows", "lanes"]:
        return "rows" if self.form == "batch" else "lanes"

    def init(self, state: State) -> State:
        return self.inner.init(state)

    def step(self, engine: Engine, state: State) -> State:
        evidence: Evidence | None = state.parts.decoder or None
        state = state.with_part(decoder=())
        drafts, used = self._drafts(engine, state, evidence)
        every = State.interleave(drafts)
        canvases = replace(every, done=~used.flatten())
        if self.official_loop:  # every draft is looked at where the present canvas is, also when it would have moved on
            canvases = replace(state.branch(self.drafts), tokens=every.tokens, masked=every.masked, done=canvases.done)
        regions = self.inner.region(canvases)
        answers = engine.ask(canvases, regions, self.inner.revise.shadows(regions, canvases))
        best, now, after = self._verify(engine, used, every, regions, answers)
        engine.keep(best)
        source = self._source(best)
        region = trees.pick(regions, source, every.tokens.shape[0])
        decided = torch.ones_like(state.done)
        if self.official_loop:
            decided = (now.masked & region.read).sum(1) == 1
            if state.spec.shift:
                decided = decided | (region.epoch != (-1 if evidence is None else evidence.epoch))
            after = now.replace_rows(decided, after)
        return after.with_part(decoder=Evidence(answers.pick(source), region.epoch.clone(), decided))

    def _drafts(self, engine: Engine, state: State, evidence: Evidence | None) -> tuple[list[State], Bool[Tensor, "B K"]]:
        """The present canvas and the steps from it that the last answer foretells, and which of them are worth a look."""
        alive = ~state.done
        if evidence is None:
            return [state] * self.drafts, torch.stack([alive, *[torch.zeros_like(alive)] * (self.drafts - 1)], dim=1)
        region = self._region(state)
        known = alive & (region.epoch == evidence.epoch)
        decide = engine.unit(self.inner.decide)
        if self.official_loop:
            masks = (region.read & state.masked).sum(1)
            first = decide(evidence.answer, region, state)
            chain, used = [state.replace_rows(known & ~evidence.decided, first)], [alive]
            decide = engine.unit(replace(self.inner, commit=ONE_BY_ONE).decide)
            for number in range(1, self.drafts):
                chain.append(decide(evidence.answer, self._here(region, chain[-1]), chain[-1]))
                used.append(known & (number < masks))
            return chain, torch.stack(used, dim=1)
        positions = evidence.answer.positions
        read = lanes.to_canvas(torch.ones_like(positions, dtype=torch.bool), positions, state.tokens.shape[1], False)
        chain, used = [state], [alive]
        for _ in range(1, self.drafts):
            last = chain[-1]
            after = decide(evidence.answer, region, last)
            region = self._region(after)
            changed = (after.tokens != last.tokens) | (after.masked != last.masked)
            guessed = changed & ~read  # nothing foretells what was not read
            known = known & ~after.done & changed.any(1) & ~guessed.any(1)
            # The keys of a new epoch are those of its first canvas, so a draft may open one but not go on in it.
            stays = region.epoch == evidence.epoch
            chain.append(after)
            used.append(known if self.eager else known & stays)
            known = known & stays
        return chain, torch.stack(used, dim=1)

    def _region(self, state: State) -> Region:
        """The region of a state, in tensors of its own: `decide` is one graph, also for regions that were picked among branches."""
        return trees.over(torch.clone, self.inner.region(state))

    @staticmethod
    def _here(region: Region, state: State) -> Region:
        """The region of a canvas that has gone on since."""
        return replace(region, eligible=region.eligible & state.masked)

    def _verify(
        self, engine: Engine, used: Bool[Tensor, "B K"], every: State, regions: Region, answers: Answer
    ) -> tuple[Int[Tensor, "B"], State, State]:
        """Follow the reference process as far as it runs over drafts: the last draft on its way, its state, and the step from it."""
        count, total = self.drafts, every.tokens.shape[0]
        decide = engine.unit(self.inner.decide)
        best = torch.zeros(total // count, dtype=torch.long, device=used.device)
        now, number = every.pick(self._source(best)), torch.arange(count, device=used.device)
        tokens, masked = (one.view(-1, count, one.shape[1]) for one in (every.tokens, every.masked))
        for left in range(count - 1, -1, -1):
            source = self._source(best)
            after = decide(answers.pick(source), trees.pick(regions, source, total), now)
            if left == 0:
                break
            same = (tokens == after.tokens.unsqueeze(1)) & (masked == after.masked.unsqueeze(1))
            same = same.all(2)
            if not self.official_loop:
                same = same & self._same(regions, self.inner.region(after)) & ~after.done.unsqueeze(1)
            fits = same
            if self.match == "subset":
                fits = (masked | ((tokens == after.tokens.unsqueeze(1)) & ~after.masked.unsqueeze(1))).all(2)
            place = torch.where(fits & used & (number > best.unsqueeze(1)), number, -1).amax(1)
            moved = place > best
            best = torch.where(moved, place, best)
            if self.match == "subset":
                exact = same.gather(1, best.unsqueeze(1)).squeeze(1)
                after = every.pick(self._source(best)).replace_rows(exact, after)
            now = now.replace_rows(moved, after)
        return best, now, after

    def _same(self, regions: Region, region: Region) -> Bool[Tensor, "B K"]:
        """Was a draft looked at as the reference process looks at the canvas that is the same?"""
        found = regions.epoch.view(-1, self.drafts) == region.epoch.unsqueeze(1)
        for name in (one.name for one in fields(region) if one.name != "epoch"):
            theirs, mine = getattr(regions, name), getattr(region, name)
            if mine is not None:
                found = found & (theirs.view(-1, self.drafts, mine.shape[1]) == mine.unsqueeze(1)).all(2)
        return found

    def _source(self, branch: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """The rows among B * K that are these branches."""
        return torch.arange(branch.shape[0], device=branch.device) * self.drafts + branch


@register("decoder", "freedave")
def freedave(
    block_length: int | None = 32,
    drafts: int = 4,
    threshold: float | None = None,
    form: Literal["batch", "tree"] = "tree",
    match: Literal["exact", "subset"] = "exact",
    eager: bool = False,
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> SelfDraft:
    """FreeDave (arXiv 2510.00294) around semi-autoregressive decoding of one token a step, or around a `threshold`.

    The published settings: 4 drafts for LLaDA, 8 for Dream and TraDo; FreeDave++ is threshold 0.95 (TraDo 0.9) with match `subset`.
    """
    inner = BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Quota() if threshold is None else Gate(threshold),
        propose=Sample(temperature=temperature),
        stop=AtEos() if stop_at_eos else WhenFull(),
    )
    return SelfDraft(inner, drafts, form, match, eager)
