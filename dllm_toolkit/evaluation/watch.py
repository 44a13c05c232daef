"""`dllm-toolkit watch`: decode one problem with one or several decoders, show every step, and write the traces as a page, a GIF or JSON.

The recipe is one of `compare` (its configurations, one after the other, on problem N of its task) or of `generate` (its prompt). A file
that `--json` wrote is shown again without a model. What is decoded is what those commands decode: same prompt, seed, model and cache.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dllm_toolkit import generate
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.decode import Template
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.drivers.base import Denoise
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import compare, trace, trace_gif, trace_html
from dllm_toolkit.evaluation.ledger import answer_tokens
from dllm_toolkit.evaluation.measure import find_device
from dllm_toolkit.evaluation.pictures import plural
from dllm_toolkit.evaluation.tasks import Problem, Task
from dllm_toolkit.evaluation.trace import DecodeTrace, Frame, TraceError, blank, counted, played
from dllm_toolkit.evaluation.trace_look import pieces_of
from dllm_toolkit.evaluation.trace_terminal import Scene, Screen, screen
from dllm_toolkit.recipe import Recipe
from dllm_toolkit.recipe_hints import COMPONENT

MOST = 8
"""Configurations that are watched without being asked for by name."""


@dataclass(frozen=True)
class WatchOptions:
    """problem: number from 0, or id. decoders: names of configurations; none: all. speed: steps a second on a terminal, 0: no pauses.

    html, gif, json: files to write, if any.
    """

    problem: str = "0"
    decoders: tuple[str, ...] = ()
    speed: float = 5.0
    html: Path | None = None
    gif: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.speed) and self.speed >= 0):
            raise TraceError(f"speed must be 0 or more, got {self.speed}. It counts steps a second. Write --speed 5, or 0 for no pauses.")
        for kind in ("html", "gif", "json"):
            path = getattr(self, kind)
            if path is not None and path.is_dir():
                raise TraceError(f"{path} is a directory. The export is one file. Write --{kind} {path / f'trace.{kind}'}, for instance.")


@dataclass(frozen=True)
class Shot:
    """One decode that can start. prompt: ids. template: the answer's skeleton, or None where `budget` masks are the answer."""

    name: str
    model: Any
    decoder: Decoder
    cache: Cache
    prompt: Sequence[int]
    budget: int
    seed: int
    template: Template | None = None
    about: str = ""
    model_name: str = ""
    problem: str = ""
    question: str = ""
    reference: str = ""
    judge: Callable[[str], bool] | None = None
    cut: Callable[[str], str] = field(default=lambda text: text)


def run_watch(recipe: Recipe, built: Any, options: WatchOptions) -> list[DecodeTrace]:
    """Decode, show and write. Raises ToolkitError or OSError before the first forward for what cannot work."""
    _make_room(options)
    if isinstance(built, compare.CompareRecipe):
        with _threads(built.run.threads):
            return _finish(_decoded(_comparison(recipe, built, options), options), options)
    if isinstance(built, generate.GenerateRecipe):
        return _finish(_decoded(_generation(recipe, built, options), options), options)
    raise TraceError(f"{recipe.path} says neither what to decode nor how. Write a recipe of `compare` or of `generate`.")


def replay(path: Path, options: WatchOptions) -> list[DecodeTrace]:
    """Show what `--json` wrote, and write it in other forms."""
    traces = trace.load(path)
    _make_room(options)
    names = [one.name for one in traces]
    traces = [one for one in traces if one.name in _chosen(names, options.decoders, str(path))]
    with screen(sys.stdout, options.speed) as stage:
        for one in traces:
            _introduce(stage, one.problem, one.prompt, first=one is traces[0])
            _play(stage, one, one.frames)
            stage.say(_verdict(one))
    return _finish(traces, options)


def _make_room(options: WatchOptions) -> None:
    """Make the folders of the exports. What cannot be written is said before anything is decoded."""
    for path in (options.html, options.gif, options.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise TraceError(f"cannot write {path}. Its folder, or the file that is there, may not be changed. Write another path.")


def _finish(traces: list[DecodeTrace], options: WatchOptions) -> list[DecodeTrace]:
    """Write the exports: first the one from which the others can be made again."""
    if options.json is not None:
        trace.save(options.json, traces)
    if options.html is not None:
        options.html.write_text(trace_html.trace_page(traces), encoding="utf-8")
    if options.gif is not None:
        trace_gif.write_gif(options.gif, traces)
    for path in (options.json, options.html, options.gif):
        if path is not None:
            print(f"Written: {path} ({max(1, path.stat().st_size // 1000)} kB)", file=sys.stderr)
    return traces


def _decoded(shots: Sequence[Shot], options: WatchOptions) -> list[DecodeTrace]:
    traces = []
    with screen(sys.stdout, options.speed) as stage:
        for shot in shots:
            _introduce(stage, shot.problem, shot.question, first=shot is shots[0])
            traces.append(_watched(shot, stage))
            stage.say(_verdict(traces[-1]))
    return traces


def _introduce(stage: Screen, problem: str, question: str, *, first: bool) -> None:
    if first:
        stage.say(f"{problem}\n{question.strip()}\n" if problem else f"{question.strip()}\n")


def _watched(shot: Shot, stage: Screen) -> DecodeTrace:
    spec = shot.model.spec
    tokenizer = getattr(shot.model, "tokenizer", None)
    piece = pieces_of(tokenizer, shot.prompt[-1])
    length = shot.budget if shot.template is None else len(shot.template)
    pinned = {position: token for position, token in enumerate(shot.template or ()) if token is not None}
    frames = trace.record(
        shot.model,
        shot.decoder,
        shot.prompt,
        max_new_tokens=shot.budget if shot.template is None else None,
        template=shot.template,
        cache=shot.cache,
        seed=shot.seed,
    )
    begun = DecodeTrace(
        name=shot.name,
        frames=(),
        length=length,
        pieces={},
        pinned=pinned,
        eos_ids=tuple(spec.eos_ids),
        about=shot.about,
        model=shot.model_name,
        problem=shot.problem,
        prompt=shot.question,
        reference=shot.reference,
    )
    seen = _play(stage, begun, frames, piece)
    done = replace(begun, frames=tuple(seen))
    ids = []
    for cell in done.canvas(len(seen)):
        if cell.token is None:  # the step limit came first; the text ends here
            break
        ids.append(cell.token)
    body = ids[: answer_tokens(ids, spec.eos_ids)]
    if body and body[-1] in spec.eos_ids:
        body = body[:-1]
    text = shot.cut(str(body) if tokenizer is None else tokenizer.decode(body, skip_special_tokens=True))
    used = {change.token for frame in seen for change in frame.changes if change.kind != "remask"} | set(pinned.values())
    return replace(
        done,
        pieces={token: piece(token) for token in sorted(used)},
        text=text,
        correct=None if shot.judge is None else shot.judge(text),
    )


def _play(stage: Screen, one: DecodeTrace, frames: Any, piece: Callable[[int], str] | None = None) -> list[Frame]:
    """Show frames as they come; returns them. piece: text of a token; None: what the trace holds."""
    known = piece or (lambda token: one.pieces.get(token, f"<{token}>"))
    cells, seen = blank(one.length, one.pinned), []
    for number, frame in enumerate(frames, start=1):
        cells = played(cells, frame, number)
        seen.append(frame)
        stage.show(Scene(one.name, cells, frame, number, one.eos_ids, known))
    return seen


def _verdict(one: DecodeTrace) -> str:
    tokens = counted(one.canvas(len(one.frames)), one.eos_ids)
    forwards = one.frames[-1].forwards if one.frames else 0
    judged = "" if one.correct is None else "right, " if one.correct else "wrong, "
    rate = tokens / max(1, forwards)
    counts = f"{plural(tokens, 'token')} in {plural(forwards, 'forward')}, {rate:.2f} a forward; {one.result}"
    return f"{one.name}: {judged}{counts}\n"


def _comparison(recipe: Recipe, built: compare.CompareRecipe, options: WatchOptions) -> list[Shot]:
    names = _chosen(list(built.configurations), options.decoders, str(recipe.path))
    kept = {name: built.configurations[name] for name in names}
    other = [name for name, one in kept.items() if not isinstance(one.driver, Denoise)]
    for name in other:
        _refuse_driver(recipe, ("configurations", name, "driver"), kept.pop(name).driver, skip=not options.decoders and len(kept) > 0)
    device = find_device(built.run.device)
    number, problem = _problem(built.task, options.problem)
    judge = _judge(built.task, problem)
    one = replace(built, configurations=kept, baselines=compare.Baselines())
    shots = []
    for row in compare._rows(recipe, one, [problem]):
        model = row.model.to(device=device, dtype=getattr(torch, built.run.dtype))
        tree = recipe.tree["configurations"][row.name]
        shots.append(
            Shot(
                name=row.name,
                model=model,
                decoder=row.decoder,
                cache=row.cache,
                prompt=row.prompts[0],
                budget=built.run.max_new_tokens,
                seed=built.run.seed + number,
                template=None if row.templates is None else row.templates[0],
                about=f"{words(tree['decoder'])}, cache {words(tree.get('cache', 'none'))}",
                model_name=built.configurations[row.name].model,
                problem=problem.id,
                question=problem.prompt,
                reference=problem.reference,
                judge=judge,
                cut=built.task.cut,
            )
        )
    return shots


def _generation(recipe: Recipe, built: generate.GenerateRecipe, options: WatchOptions) -> list[Shot]:
    if options.decoders:
        raise TraceError(
            f"{recipe.path} has one decoder, got --decoder {options.decoders[0]}. The option chooses a configuration of a comparison. "
            f"Write decoder={options.decoders[0]} instead."
        )
    if not isinstance(built.driver, Denoise):
        _refuse_driver(recipe, ("driver",), built.driver)
    ready = generate.prepare(recipe, built)
    number = _number(options.problem, len(ready.encoded), "prompts")
    question = ready.texts[number] if number < len(ready.texts) else str(ready.encoded[number])
    return [
        Shot(
            name=words(recipe.tree["decoder"]).partition("(")[0],
            model=ready.model,
            decoder=built.decoder,
            cache=built.cache,
            prompt=ready.encoded[number],
            budget=built.run.max_new_tokens,
            seed=built.run.seed + number,
            about=f"{words(recipe.tree['decoder'])}, cache {words(recipe.tree.get('cache', 'none'))}",
            question=question,
        )
    ]


def _chosen(names: Sequence[str], wanted: Sequence[str], where: str) -> list[str]:
    """The configurations to watch, in the order of the recipe."""
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise TraceError(f"{where} has no configuration {unknown[0]!r}. Write --decoder with one of {', '.join(names)}.")
    if not wanted and len(names) > MOST:
        raise TraceError(
            f"{where} has {len(names)} configurations, too many to watch at once. Choose with --decoder NAME, once or several times, from "
            f"{', '.join(names)}."
        )
    return [name for name in names if not wanted or name in wanted]


def _refuse_driver(recipe: Recipe, keys: Sequence[str], driver: Any, *, skip: bool = False) -> None:
    """Drivers compose decodes, or let another model decide; their steps are not those of one decoder on one canvas."""
    message = f"a trace shows the steps of a decoder, got the driver {type(driver).__name__}, which does more than step one."
    if not skip:
        raise TraceError(recipe.at(keys, f"{message} Watch a configuration without a driver."))
    print(f"note: {'.'.join(keys)} is left out: {message}", file=sys.stderr)


def _problem(task: Task, wanted: str) -> tuple[int, Problem]:
    problems = task.problems()
    for number, problem in enumerate(problems):
        if problem.id == wanted:
            return number, problem
    number = _number(wanted, len(problems), "problems", f", or an id such as {problems[0].id}" if problems else "")
    return number, problems[number]


def _number(wanted: str, count: int, what: str, other: str = "") -> int:
    if not wanted.isdecimal() or int(wanted) >= count:
        raise TraceError(f"there is no problem {wanted!r} among {count} {what}. Write --problem 0 .. {count - 1}{other}.")
    return int(wanted)


def _judge(task: Task, problem: Problem) -> Callable[[str], bool] | None:
    """The task's verdict, or None where it cannot be had here (a package is missing, code may not be run)."""
    try:
        task.ready()
    except ToolkitError:
        return None
    return lambda text: bool(task.grade(problem, text).correct)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def words(node: Any) -> str:
    """A component of a recipe on one line: `d2f(block_length=16, threshold=0.9)`."""
    if not isinstance(node, Mapping):
        return str(node)
    arguments = ", ".join(f"{key}={words(value)}" for key, value in node.items() if key != COMPONENT)
    return f"{node.get(COMPONENT, '')}({arguments})" if arguments else str(node.get(COMPONENT, ""))
