"""A decode written down step by step: what changed, how sure the model was, which blocks were open, how many forwards it took.

    frames = record(model, d2f(block_length=16), prompt, max_new_tokens=80, cache=BlockCausalCache())     # one Frame a step, as it happens
    save(Path("trace.json"), [DecodeTrace("d2f", tuple(frames), ...)])

A `Frame` holds the changes of one step, so a trace of T tokens takes room for T changes, not for T canvases; `DecodeTrace.canvas` plays
them back. `record` is `decode.trace` read by a listener: the same steps, tokens and counts as `decode`. Positions are answer-relative
everywhere here, steps count from 1 where people see them.

The confidence of a token is the model's own probability of it (softmax of the logits as they came, in float32) in the last forward of
the step that read its position: before temperature, penalties or whatever else the decoder makes of it. Where one forward looks at
several canvases of the row (engine.py, branches), it is the highest of theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import Template, trace
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.engine import Asked
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.base import Model
from dllm_toolkit.state import State
from dllm_toolkit.types import Result

VERSION = 1
"""Of the file format. A file of another version is refused, not guessed at."""

Kind = Literal["commit", "edit", "confirm", "remask", "fill"]
"""commit: a mask became a token. edit: a decided token became another. confirm: a decided token was decided again, as it was. remask: it
was taken back. fill: end-of-text that no forward chose, behind the end of the row."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_CHUNK = 64  # positions whose distributions over the vocabulary are held in float32 at a time
Runs = tuple[tuple[int, int], ...]
"""Positions as (first, one past the last) of each run."""


class TraceError(ToolkitError):
    """A trace that cannot be read, written or shown."""


@dataclass(frozen=True)
class Change:
    """One position in one step. token: the id that stands there now (the mask's after a remask). born: row-step as in `State.born`.

    confidence: probability of the token, 0..1; None where no forward of the step read the position, and for fill and remask.
    """

    position: int
    kind: Kind
    token: int
    born: int
    confidence: float | None = None


@dataclass(frozen=True)
class Frame:
    """One step. forwards, lanes, forced, edits: totals up to this step, as `decode.Stats` counts them; lanes are query tokens.

    blocks: first position of each block of the answer. open, closed: the open span and the closed positions of the step's last forward.
    end: length of the answer that counts, which stop rules may lower. ended: why the row finished in this step, "" while it goes on.
    """

    forwards: int
    lanes: int
    forced: int
    edits: int
    changes: tuple[Change, ...]
    blocks: tuple[int, ...]
    open: Runs
    closed: Runs
    end: int
    ended: str = ""

    def count(self, kind: Kind) -> int:
        return sum(change.kind == kind for change in self.changes)


@dataclass(frozen=True)
class Cell:
    """One position of the canvas after some step. step: the frame (from 1) that wrote it, 0 for what was pinned; kind: the last change."""

    token: int | None  # None: masked
    step: int = 0
    confidence: float | None = None
    kind: Kind | None = None

    @property
    def filled(self) -> bool:
        return self.kind == "fill"


@dataclass(frozen=True)
class DecodeTrace:
    """A whole decode of one row. name: the configuration; about: decoder and cache in words; prompt, reference: text.

    length: answer positions. pinned: tokens that stood there from the start. pieces: the text that each token id adds. text: the answer.
    correct: the task's verdict, None if nobody judged.
    """

    name: str
    frames: tuple[Frame, ...]
    length: int
    pieces: Mapping[int, str]
    pinned: Mapping[int, int] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    about: str = ""
    model: str = ""
    problem: str = ""
    prompt: str = ""
    reference: str = ""
    text: str = ""
    correct: bool | None = None

    @property
    def result(self) -> str:
        """How the row ended, in words."""
        return (self.frames[-1].ended if self.frames else "") or Result.MAX_STEPS.text

    def canvases(self) -> Iterator[tuple[Cell, ...]]:
        """The canvas before the first step, and after each."""
        cells = blank(self.length, self.pinned)
        yield cells
        for number, frame in enumerate(self.frames, start=1):
            cells = played(cells, frame, number)
            yield cells

    def canvas(self, step: int) -> tuple[Cell, ...]:
        """The canvas after `step` steps, 0 .. len(frames)."""
        if not 0 <= step <= len(self.frames):
            raise TraceError(f"the trace of {self.name} has no step {step}. Write 0 .. {len(self.frames)}.")
        return next(cells for number, cells in enumerate(self.canvases()) if number == step)

    def piece(self, cell: Cell) -> str:
        """The text of a decided position."""
        return "" if cell.token is None else self.pieces.get(cell.token, f"<{cell.token}>")

    def step_at(self, forwards: int) -> int:
        """The last step that was finished within so many forwards."""
        return sum(frame.forwards <= forwards for frame in self.frames)


def blank(length: int, pinned: Mapping[int, int]) -> tuple[Cell, ...]:
    """The canvas before the first step."""
    return tuple(Cell(pinned.get(position)) for position in range(length))


def played(cells: tuple[Cell, ...], frame: Frame, number: int) -> tuple[Cell, ...]:
    """The canvas after frame `number` (from 1)."""
    after = list(cells)
    for change in frame.changes:
        token = None if change.kind == "remask" else change.token
        after[change.position] = Cell(token, number, change.confidence, change.kind)
    return tuple(after)


def counted(cells: Sequence[Cell], eos_ids: Sequence[int]) -> int:
    """Tokens that count so far: decided and not pinned, none behind the first end-of-text. At the end this is the ledger's number."""
    total = 0
    for cell in cells:
        total += cell.token is not None and cell.step > 0 and not cell.filled
        if cell.token is not None and cell.token in eos_ids:
            break
    return total


def record(
    model: Model,
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None = None,
    template: Template | None = None,
    cache: Cache | None = None,
    seed: int = 0,
    max_steps: int | None = None,
) -> Iterator[Frame]:
    """Decode one prompt, one frame a step, as it happens. Arguments and errors are those of `decode`; ends at `max_steps` without one."""
    asked: list[Asked] = []
    steps = trace(
        model,
        decoder,
        [prompt],
        max_new_tokens=max_new_tokens,
        templates=None if template is None else [template],
        cache=cache,
        seed=seed,
        max_steps=max_steps,
        listen=asked.append,
    )
    forwards = lanes = 0
    for step in steps:
        begin = int(step.before.begin)
        length = len(template) if template is not None else int(max_new_tokens or 0)
        for one in asked:
            forwards += 1
            lanes += int(one.plan.compute.sum())
            if one.answer.shadow is not None:
                lanes += int((one.answer.shadow.positions < step.before.tokens.shape[1]).sum())
        here = slice(begin, begin + length)
        region = asked[-1].region if asked else step.asked.region
        block = region.block[0, here].tolist()
        yield Frame(
            forwards=forwards,
            lanes=lanes,
            forced=int(step.after.forced),
            edits=int(step.after.edits),
            changes=_changes(step.before, step.after, here, asked),
            blocks=tuple(position for position in range(length) if position == 0 or block[position] != block[position - 1]),
            open=_runs(region.span[0, here].tolist()),
            closed=_runs(region.closed[0, here].tolist()),
            end=int(step.after.end) - begin,
            ended=Result(int(step.after.result)).text if bool(step.after.done) else "",
        )
        asked.clear()


def _changes(before: State, after: State, here: slice, asked: Sequence[Asked]) -> tuple[Change, ...]:
    hidden, masked = before.masked[0, here], after.masked[0, here]
    old, tokens = before.tokens[0, here], after.tokens[0, here]
    born, filled = after.born[0, here], after.filled[0, here]
    changed = (hidden != masked) | (old != tokens) | (before.born[0, here] != born)
    places = changed.nonzero().flatten()
    sure = _confidence(asked, places + here.start, tokens[places]).tolist()
    rows = zip(*(one[places].tolist() for one in (hidden, masked, old, tokens, born, filled)), sure, strict=True)
    found = []
    for position, (was_hidden, is_hidden, was, token, step, fill, probability) in zip(places.tolist(), rows, strict=True):
        kind: Kind = "remask" if is_hidden else "fill" if fill else "commit" if was_hidden else "confirm" if was == token else "edit"
        known = kind in ("commit", "edit", "confirm") and not math.isnan(probability)
        found.append(Change(position, kind, token, step, round(probability, 6) if known else None))
    return tuple(found)


def _confidence(asked: Sequence[Asked], positions: Tensor, tokens: Tensor) -> Tensor:
    """Probability of each token at its canvas position [N]; nan where no forward of the step read it."""
    found = torch.full(positions.shape, math.nan, dtype=torch.float32, device=positions.device)
    for one in reversed(asked):  # the last forward that read a position has the say
        for some in found.isnan().nonzero().flatten().split(_CHUNK):
            best = torch.full(some.shape, -1.0, device=found.device)
            for lanes, logits in zip(one.answer.positions, one.answer.logits, strict=True):  # branches; [R], [R, V]
                match = lanes == positions[some].unsqueeze(1)  # [N, R]
                read, lane = match.any(1), match.long().argmax(1)
                said = logits[lane].float()  # [N, V]
                probability = (said.gather(1, tokens[some].unsqueeze(1)).squeeze(1) - said.logsumexp(1)).exp()
                best = torch.where(read, torch.maximum(best, probability), best)
            found[some] = torch.where(best >= 0, best, math.nan)
    return found


def _runs(flags: Sequence[bool]) -> Runs:
    runs: list[tuple[int, int]] = []
    for position, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        elif flag:
            runs.append((position, position + 1))
    return tuple(runs)


def to_plain(one: DecodeTrace) -> dict[str, Any]:
    """A trace as plain data for JSON. A change is a list: position, index into KINDS, token, born, confidence."""
    plain = {each.name: getattr(one, each.name) for each in fields(DecodeTrace)}
    plain["frames"] = [
        {
            **{each.name: getattr(frame, each.name) for each in fields(Frame)},
            "changes": [[c.position, KINDS.index(c.kind), c.token, c.born, c.confidence] for c in frame.changes],
        }
        for frame in one.frames
    ]
    for name in ("pieces", "pinned"):
        plain[name] = {str(key): value for key, value in plain[name].items()}
    return plain


def from_plain(plain: Mapping[str, Any]) -> DecodeTrace:
    """The trace that `to_plain` wrote. Raises KeyError, TypeError, ValueError or IndexError for anything else."""
    length = int(plain["length"])
    content = {each.name: plain[each.name] for each in fields(DecodeTrace)}
    content["frames"] = tuple(_frame(frame, length) for frame in plain["frames"])
    content["eos_ids"] = tuple(int(token) for token in plain["eos_ids"])
    content["pieces"] = {int(token): str(piece) for token, piece in plain["pieces"].items()}
    content["pinned"] = {_position(int(place), length): int(token) for place, token in plain["pinned"].items()}
    for name in ("name", "about", "model", "problem", "prompt", "reference", "text"):
        if not isinstance(content[name], str):
            raise TypeError(f"{name} is no text")
    return DecodeTrace(**content)


def _frame(plain: Mapping[str, Any], length: int) -> Frame:
    changes = []
    for position, kind, token, born, confidence in plain["changes"]:
        if kind < 0:
            raise ValueError(f"there is no kind {kind}")
        sure = None if confidence is None else float(confidence)
        changes.append(Change(_position(position, length), KINDS[kind], int(token), int(born), sure))
    return Frame(
        **{name: int(plain[name]) for name in ("forwards", "lanes", "forced", "edits", "end")},
        changes=tuple(changes),
        blocks=tuple(int(first) for first in plain["blocks"]),
        open=_read_runs(plain["open"]),
        closed=_read_runs(plain["closed"]),
        ended=str(plain["ended"]),
    )


def _position(place: int, length: int) -> int:
    if not 0 <= place < length:
        raise ValueError(f"position {place} of an answer of {length}")
    return place


def _read_runs(plain: Sequence[Sequence[int]]) -> Runs:
    return tuple((int(first), int(stop)) for first, stop in plain)


def save(path: Path, traces: Sequence[DecodeTrace]) -> None:
    """Write traces of one or several decoders as one JSON file. Raises OSError where it cannot be written."""
    content = {"kind": "dllm_toolkit trace", "version": VERSION, "traces": [to_plain(one) for one in traces]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def load(path: Path) -> list[DecodeTrace]:
    """The traces in a file that `save` wrote. Raises TraceError for anything else, OSError where it cannot be read."""
    advice = "Write the file that `dllm-toolkit watch RECIPE --json FILE` made."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("kind") != "dllm_toolkit trace":
            raise TraceError(f"{path} is no trace of a decode. {advice}")
        if content["version"] != VERSION:
            raise TraceError(f"{path} is a trace of another version, got {content['version']}. This code reads {VERSION}. Record it again.")
        traces = [from_plain(one) for one in content["traces"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TraceError(f"{path} is no trace of a decode, or a damaged one ({type(error).__name__}: {error}). {advice}") from error
    if not traces:
        raise TraceError(f"{path} holds no trace. {advice}")
    return traces
