"""Everything that evolves while decoding, and everything one step says about it, as frozen dataclasses of tensors.

`State` holds what the next step needs and nothing else: with it (and no cache) a decode can be resumed anywhere. Rules return
masks; only the methods here turn masks into a new state, so the promises live in one place: fixed positions and finished rows are
never written, a masked position holds the mask id, and whatever lies behind a row's end is end-of-text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.ops import lanes
from dllm_toolkit.types import Canvas, ModelSpec, PyTree, Result, Rows, Scores, Tokens


@dataclass(frozen=True)
class Parts:
    """The private state of each slot of a decoder; opaque to everybody else."""

    schedule: PyTree = ()
    propose: PyTree = ()
    commit: PyTree = ()
    revise: PyTree = ()
    stop: PyTree = ()


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
    """

    done: Rows
    end: Int[Tensor, "B"]
    result: Result | Int[Tensor, "B"]
    carry: PyTree = ()
    fill: Canvas | None = None


@dataclass(frozen=True)
class Region:
    """Where one step may look and act; all [B, L] but `epoch`.

    read: logits wanted; eligible: masked positions that may be committed; group: progress is promised for each group
    (usually the block, numbered 0 .. L); force: positions of groups that must commit in this step; visible: what attention may see;
    closed: positions the schedule promises never to write again; block: block index for block-causal masks; epoch [B]: changes
    when the open span moves, so caches know when to refresh.
    """

    read: Canvas
    eligible: Canvas
    group: Tokens
    force: Canvas
    visible: Canvas
    closed: Canvas
    block: Tokens
    epoch: Int[Tensor, "B"]


@dataclass(frozen=True)
class Answer:
    """What the model said: logits of the read lanes and where they belong (position L marks a dead lane)."""

    logits: Float[Tensor, "B R V"]
    positions: Int[Tensor, "B R"]


@dataclass(frozen=True)
class Proposal:
    """A token and its evidence for every read position; -inf evidence where nothing was read.

    `confidence` is the probability of the proposed token, `score` what positions are ranked by (often the same).
    """

    tokens: Tokens
    confidence: Scores
    score: Scores
    logits: Float[Tensor, "B R V"]
    positions: Int[Tensor, "B R"]

    @property
    def live(self) -> Bool[Tensor, "B R"]:
        return self.positions < self.tokens.shape[1]

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

    def finish(self, verdict: Verdict) -> State:
        """Rows that a stop rule has ended, in a step that counts for them. `advance` fills what is behind their end."""
        result = verdict.result if isinstance(verdict.result, Tensor) else int(verdict.result)
        now = verdict.done & ~self.done
        after = replace(
            self,
            done=self.done | now,
            step=self.step + now.long(),  # `advance` counts the step of the rows that go on
            end=torch.where(now, verdict.end, self.end),
            result=torch.where(now, result, self.result),
            parts=replace(self.parts, stop=verdict.carry),
        )
        return after if verdict.fill is None else after._end_text(verdict.fill & ~after.done.unsqueeze(1))

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
