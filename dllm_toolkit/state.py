"""Everything that evolves while decoding, and everything one step says about it, as frozen dataclasses of tensors.

`State` holds what the next step needs and nothing else: with it (and no cache) a decode can be resumed anywhere. Rules return
masks; only the methods here turn masks into a new state, so the promises live in one place: fixed positions and finished rows are
never written, a masked position holds the mask id, and whatever lies behind a row's end is end-of-text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.ops import lanes, trees
from dllm_toolkit.types import Canvas, ModelSpec, PyTree, Result, Rows, Scores, Tokens


@dataclass(frozen=True)
class Parts:
    """The private state of each slot of a decoder, and of a decoder whose step is its own; opaque to everybody else.

    Tensors in it have rows first, or 1 there if they hold for every row (see ops/trees.py).
    """

    schedule: PyTree = ()
    propose: PyTree = ()
    commit: PyTree = ()
    revise: PyTree = ()
    stop: PyTree = ()
    decoder: PyTree = ()


@dataclass(frozen=True)
class Edit:
    """What a Revise rule wants: positions to replace by the proposal, positions to mask again, rows with nothing left to revise."""

    replace: Canvas
    remask: Canvas
    settled: Rows
    carry: PyTree = ()


@dataclass(frozen=True)
class Verdict:
    """What a Stop rule says: finished rows, their end (one past the last token that counts), and why (one reason, or one a row).

    fill: positions of rows that go on which become end-of-text now, decided or not; the model sees them from the next step on.
    cut: rows that go on end here from now on; what lies behind becomes end-of-text and is seen no more. A cut never moves an end to the
    right, and never drops a decided token that is not end-of-text, nor a pinned one.
    commit_all: rows whose masks before `end` all take their proposed tokens now, and that finish: with Result.EARLY_COMMIT, or with
    `result` where `done` says so too. A mask that was not read has no proposal and is not written: such a row ends before it. What is
    committed because of Result.MAX_STEPS counts as forced.
    """

    done: Rows
    end: Int[Tensor, "B"]
    result: Result | Int[Tensor, "B"]
    carry: PyTree = ()
    fill: Canvas | None = None
    cut: Int[Tensor, "B"] | None = None
    commit_all: Rows | None = None


@dataclass(frozen=True)
class Region:
    """Where one step may look and act; all [B, L] but `epoch`.

    read: logits wanted; eligible: masked positions that may be committed; group: progress is promised for each group
    (usually the block, numbered 0 .. L); force: positions of groups that must commit in this step; visible: what attention may see;
    closed: positions the schedule promises never to write again; block: block index for block-causal masks; epoch [B]: changes
    when the open span moves, so caches know when to refresh; open: the open span, where it holds more than is read (None: what is read).
    """

    read: Canvas
    eligible: Canvas
    group: Tokens
    force: Canvas
    visible: Canvas
    closed: Canvas
    block: Tokens
    epoch: Int[Tensor, "B"]
    open: Canvas | None = None

    @property
    def span(self) -> Canvas:
        """The open span: what is read, and the decided positions among it that this decoder does not look at."""
        return self.read if self.open is None else self.read | self.open

    def changeable(self, state: State) -> Canvas:
        """Decided positions that a revise rule may change: read, not closed, neither fixed nor end-of-text that a stop rule filled in.

        Where a stop rule has filled a row behind an end-of-text, that token stays too: the fill would have no reason without it.
        """
        filled = state.filled
        ending = filled | (state.is_eos() & filled.any(1, keepdim=True))
        return self.read & ~self.closed & ~state.masked & ~state.fixed & ~ending


@dataclass(frozen=True)
class Shadow:
    """What the model says of positions whose own token it cannot see (position L marks a dead lane)."""

    logits: Float[Tensor, "B Q V"]
    positions: Int[Tensor, "B Q"]


@dataclass(frozen=True)
class Answer:
    """What the model said: logits of the read lanes and where they belong (position L marks a dead lane); shadows if any were asked for."""

    logits: Float[Tensor, "B R V"]
    positions: Int[Tensor, "B R"]
    shadow: Shadow | None = None

    def pick(self, index: Int[Tensor, "N"]) -> Answer:
        """Some rows, in the given order."""
        return trees.pick(self, index, self.positions.shape[0])


@dataclass(frozen=True)
class Proposal:
    """A token and its evidence for every read position; -inf evidence where nothing was read.

    `confidence` is the probability of the proposed token, `score` what positions are ranked by (often the same). `shadow` is the
    probability of the token that stands at a position now when the model cannot see it there; -inf where nobody asked.
    """

    tokens: Tokens
    confidence: Scores
    score: Scores
    logits: Float[Tensor, "B R V"]
    positions: Int[Tensor, "B R"]
    shadow: Scores | None = None

    @property
    def live(self) -> Bool[Tensor, "B R"]:
        return self.positions < self.tokens.shape[1]

    @property
    def read(self) -> Canvas:
        """Positions that have a proposal."""
        return lanes.to_canvas(torch.ones_like(self.positions, dtype=torch.bool), self.positions, self.tokens.shape[1], False)

    def to_canvas(self, values: Float[Tensor, "B R"], fill: float) -> Scores:
        """Spread a value for each read lane over the canvas."""
        return lanes.to_canvas(values, self.positions, self.tokens.shape[1], fill)

    def to_lanes(self, values: Scores, fill: float) -> Float[Tensor, "B R"]:
        """Canvas values at the read lanes."""
        return lanes.to_lanes(values, self.positions, fill)


@dataclass(frozen=True)
class State:
    """One decode of B rows on a canvas of L positions: [prompt | answer | padding]."""

    tokens: Tokens  # mask_id wherever `masked`
    masked: Canvas  # still undecided; the truth, never inferred from the token id
    fixed: Canvas  # prompt, pinned, padding: never written
    begin: Int[Tensor, "B"]  # first answer position
    end: Int[Tensor, "B"]  # one past the last answer position; a stop rule may lower it
    born: Tokens  # row step at which the present token was written; -1 prompt, padding and fill
    step: Int[Tensor, "B"]  # steps this row has taken
    settled: Rows  # nothing left to revise in the open span
    done: Rows
    result: Int[Tensor, "B"]  # Result
    seed: Int[Tensor, "B"]  # key of the stateless noise
    forced: Int[Tensor, "B"]  # positions committed only because progress is promised
    edits: Int[Tensor, "B"]  # decided positions that changed or were taken back
    positions: Int[Tensor, "1 L"]  # 0 .. L - 1, made once
    spec: ModelSpec
    parts: Parts = field(default_factory=Parts)

    @property
    def filled(self) -> Canvas:
        """End-of-text that nobody committed: what a stop rule, or the end of a row, wrote behind its text."""
        return ~self.masked & ~self.fixed & (self.born < 0)

    @property
    def inside(self) -> Canvas:
        """Answer positions of every row, up to its present end."""
        return (self.positions >= self.begin.unsqueeze(1)) & (self.positions < self.end.unsqueeze(1))

    def is_eos(self, tokens: Tokens | None = None) -> Canvas:
        """Which decided answer positions (or which of the given tokens) are end-of-text."""
        seen = self.tokens if tokens is None else tokens
        found = seen == self.spec.eos_ids[0] if self.spec.eos_ids else torch.zeros_like(self.masked)
        for other in self.spec.eos_ids[1:]:
            found = found | (seen == other)
        return found & ~self.masked & ~self.fixed if tokens is None else found

    def with_part(self, **parts: PyTree) -> State:
        return replace(self, parts=replace(self.parts, **parts))

    def pick(self, index: Int[Tensor, "N"]) -> State:
        """Some rows, in the given order, once or several times, with everything that their parts remember."""
        return replace(self, **trees.pick(self._by_row, index, self.tokens.shape[0]))

    @property
    def _by_row(self) -> dict[str, PyTree]:
        """Everything that belongs to single rows."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("positions", "spec")}

    def branch(self, count: int) -> State:
        """Every row `count` times: rows b * count .. b * count + count - 1 are copies of row b."""
        return self.pick(torch.arange(self.tokens.shape[0], device=self.tokens.device).repeat_interleave(count))

    def replace_rows(self, where: Rows, other: State) -> State:
        """Row by row the other state where True, this one elsewhere. Both come from the same decode, or have its shapes."""
        return replace(self, **trees.choose(where, other._by_row, self._by_row))

    @staticmethod
    def interleave(states: Sequence[State]) -> State:
        """K states of B rows as one of B * K rows: row b * K + k is row b of state k."""
        first = states[0]
        return replace(first, **trees.interleave([one._by_row for one in states], first.tokens.shape[0]))

    def write(self, where: Canvas, tokens: Tokens) -> State:
        """Decide positions, or change decided ones. Fixed positions and finished rows are left alone."""
        where = where & ~self.fixed & ~self.done.unsqueeze(1)
        return replace(
            self,
            tokens=torch.where(where, tokens, self.tokens),
            masked=self.masked & ~where,
            born=torch.where(where, self.step.unsqueeze(1), self.born),
        )

    def take_back(self, where: Canvas) -> State:
        """Mask decided positions again."""
        where = where & ~self.fixed & ~self.masked & ~self.done.unsqueeze(1)
        return replace(
            self,
            tokens=self.tokens.masked_fill(where, self.spec.mask_id),
            masked=self.masked | where,
            born=self.born.masked_fill(where, -1),
        )

    def revise(self, edit: Edit, tokens: Tokens) -> State:
        """Apply an Edit: replacements, take-backs, and whether each row has settled."""
        live = ~self.done.unsqueeze(1) & ~self.fixed & ~self.masked
        changed = ((edit.replace & (tokens != self.tokens)) | edit.remask) & live
        after = self.write(edit.replace & ~self.masked, tokens).take_back(edit.remask)
        parts = replace(self.parts, revise=edit.carry)
        return replace(after, settled=edit.settled, edits=self.edits + changed.sum(1), parts=parts)

    def finish(self, verdict: Verdict, proposal: Proposal | None = None) -> State:
        """Rows that a stop rule has ended, in a step that counts for them. `advance` fills what is behind their end.

        proposal: of the same step; `Verdict.commit_all` writes its tokens.
        """
        written, done = self, verdict.done
        result = verdict.result if isinstance(verdict.result, Tensor) else int(verdict.result)
        if verdict.commit_all is not None:
            if proposal is None:
                raise ValueError("a verdict that commits all needs the proposal, got none. Write state.finish(verdict, proposal).")
            rows = verdict.commit_all & ~self.done
            result = torch.where(verdict.commit_all & ~done, int(Result.EARLY_COMMIT), result)
            rest = rows.unsqueeze(1) & self.masked & self.inside & (self.positions < verdict.end.unsqueeze(1)) & proposal.read
            written = self.write(rest, proposal.tokens)
            late = torch.where(result == int(Result.MAX_STEPS), rest.sum(1), 0)
            written = replace(written, forced=self.forced + late)
            done = done | verdict.commit_all
        now = done & ~self.done
        after = replace(
            written,
            done=self.done | now,
            step=self.step + now.long(),  # `advance` counts the step of the rows that go on
            end=torch.where(now, verdict.end, self.end),
            result=torch.where(now, result, self.result),
            parts=replace(self.parts, stop=verdict.carry),
        )
        if verdict.fill is not None:
            after = after._end_text(verdict.fill & ~after.done.unsqueeze(1))
        return after if verdict.cut is None else after._cut(verdict.cut)

    def _cut(self, end: Int[Tensor, "B"]) -> State:
        """Rows that go on end at `end` where that is earlier, but not before the last token that says something."""
        says = self.inside & ~self.masked & ~self.is_eos()  # pinned end-of-text is not `is_eos`
        least = torch.maximum(torch.where(says, self.positions + 1, 0).amax(1), self.begin)
        end = torch.where(self.done, self.end, torch.minimum(self.end, torch.maximum(end, least)))
        behind = self.inside & (self.positions >= end.unsqueeze(1))
        return replace(self._end_text(behind), end=end)

    def fill(self) -> State:
        """Write end-of-text behind the end of finished rows. What a finished row left masked lies behind its end."""
        first_mask = torch.where(self.masked, self.positions, self.masked.shape[1]).amin(1)
        end = torch.where(self.done, torch.minimum(self.end, torch.maximum(first_mask, self.begin)), self.end)
        behind = self.done.unsqueeze(1) & (self.positions >= end.unsqueeze(1))
        return replace(self, end=end)._end_text(behind)

    def _end_text(self, where: Canvas) -> State:
        where = where & ~self.fixed
        filler = self.spec.eos_ids[0] if self.spec.eos_ids else self.spec.pad_id
        return replace(
            self,
            tokens=self.tokens.masked_fill(where, filler),
            masked=self.masked & ~where,
            born=self.born.masked_fill(where, -1),
        )

    def advance(self, schedule: PyTree, nothing_left: Rows) -> State:
        """Close the step: the schedule's new state, rows whose schedule has nothing left, and one more step for live rows."""
        live = ~self.done
        now = nothing_left & live
        after = replace(
            self,
            done=self.done | now,
            result=torch.where(now, int(Result.FULL), self.result),
            step=self.step + live.long(),
            parts=replace(self.parts, schedule=schedule),
        )
        return after.fill()


def begin_state(
    spec: ModelSpec,
    rows: list[tuple[list[int], list[int | None]]],
    seeds: list[int],
    *,
    length: int,
    device: torch.device | str,
) -> State:
    """The first state: each row is (prompt ids, answer template), where None in a template is a mask and an id is pinned."""
    tokens = torch.full((len(rows), length), spec.pad_id)
    masked = torch.zeros(len(rows), length, dtype=torch.bool)
    begin, end = [], []
    for row, (prompt, template) in enumerate(rows):
        answer = [spec.mask_id if token is None else token for token in template]
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        masked[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor([token is None for token in template])
        begin.append(len(prompt))
        end.append(len(prompt) + len(template))
    count = len(rows)

    def zeros() -> Int[Tensor, "B"]:
        # A tensor of its own for each field: a compiled step notices when two fields stop being the same object.
        return torch.zeros(count, dtype=torch.long, device=device)

    tokens, masked = tokens.to(device), masked.to(device)
    return State(
        tokens=tokens,
        masked=masked,
        fixed=~masked,
        begin=torch.tensor(begin, device=device),
        end=torch.tensor(end, device=device),
        born=torch.full_like(tokens, -1),
        step=zeros(),
        settled=torch.ones(count, dtype=torch.bool, device=device),
        done=torch.zeros(count, dtype=torch.bool, device=device),
        result=zeros(),
        seed=torch.tensor(seeds, device=device),
        forced=zeros(),
        edits=zeros(),
        positions=torch.arange(length, device=device).unsqueeze(0),
        spec=spec,
    )
