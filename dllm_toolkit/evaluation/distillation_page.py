"""The page docs/distillation.md: students trained at equal compute, under one decoder at several thresholds. Nothing on it is by hand.

    python -m dllm_toolkit.evaluation.distillation_page runs/distillation docs/distillation.md runs/distil [runs/distillation_samples]

The first directory holds the ledger of recipes/compare/distillation.yaml, the third a directory for each student, with the card of its
export in `model/card.json`: what it was trained on, how long, and at what cost in lanes. The last one, if it is given, holds the ledger of
recipes/compare/distillation_samples.yaml: several sampled answers to each problem. A configuration `name[threshold=...]` is a point
of the curve `name`; the row that the ledger calls its vanilla baseline is the reference. Sentences are made from numbers: a difference is
called one only where the 95 % interval of the paired differences excludes zero.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dllm_toolkit import registry
from dllm_toolkit.citations import papers_of
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import decoder_page as words
from dllm_toolkit.evaluation.decoder_page import Run, paired
from dllm_toolkit.evaluation.ledger import Record, Summary
from dllm_toolkit.evaluation.metrics import area_under_parallelism
from dllm_toolkit.evaluation.pictures import Curve, machine, plural, sweep_figure
from dllm_toolkit.evaluation.tasks.repeated import original
from dllm_toolkit.recipe_hints import COMPONENT

WITHIN = 1.0
"""Points of accuracy that a student may lose against the reference and still count."""
WORTH = 1.5
"""How many times the teacher's tokens per forward make a student worth its training."""
TEACHER, CONTROL = "teacher", "sft"


@dataclass(frozen=True)
class Student:
    """What a card says of a student.

    arguments: of the objective, without its parts. compute: lanes of gradient steps count three times, those of a teacher's forward once.
    """

    name: str
    objective: str
    arguments: str
    steps: int
    sequences: int
    student_lanes: int
    teacher_lanes: int

    @property
    def compute(self) -> int:
        return 3 * self.student_lanes + self.teacher_lanes

    @classmethod
    def read(cls, card: Path) -> Student:
        """The student whose card this is. Raises ToolkitError for a card of something else."""
        try:
            found = json.loads(card.read_text(encoding="utf-8"))
            training, objective = found["training"], yaml.safe_load(found["recipe"])["objective"]
            objective = dict(objective) if isinstance(objective, Mapping) else {COMPONENT: objective}
            kind, lanes = str(objective.pop(COMPONENT)), training["lanes"]
            given = {name: value for name, value in objective.items() if isinstance(value, bool | int | float | str)}
            return cls(
                name=card.parent.parent.name,
                objective=kind,
                arguments=", ".join(f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()),
                steps=training["steps"],
                sequences=training["sequences"],
                student_lanes=lanes["student"],
                teacher_lanes=lanes["teacher"],
            )
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ToolkitError(
                f"{card} is no card of a student ({error!r}). Train it first: dllm-toolkit train recipes/distil/..."
            ) from error


def curves_of(run: Run) -> dict[str, Curve]:
    """Name -> curve of all configurations `name[...]`, in the order of the ledger."""
    groups: dict[str, list[Summary]] = {}
    for summary in run.summaries:
        name, bracket, _ = summary.name.partition("[")
        if bracket:
            groups.setdefault(name, []).append(summary)
    return {name: Curve(name, tuple(setting(one) for one in members), tuple(members)) for name, members in groups.items()}


def setting(summary: Summary) -> str:
    """`0.9` of d2f[threshold=0.9]."""
    return summary.name.partition("[")[2].rstrip("]").rpartition("=")[2]


def fastest(curve: Curve, reference: Summary) -> Summary | None:
    """The point with the most tokens per forward among those at most `WITHIN` points below the reference's accuracy."""
    kept = [one for one in curve.summaries if 100 * (reference.accuracy - one.accuracy) <= WITHIN + 1e-9]
    return max(kept, key=lambda one: one.tokens_per_forward) if kept else None


def distinct(records: Sequence[Record], size: int = 4) -> float:
    """Different runs of `size` tokens for every 1,000 runs in all answers: what a model that lost its choices has fewer of."""
    runs = [ids[place : place + size] for one in records for ids in (one.output[: one.tokens],) for place in range(len(ids) - size + 1)]
    return 1000 * len(set(runs)) / max(1, len(runs))


def different(records: Sequence[Record]) -> tuple[float, int]:
    """How many of the answers to a problem differ, a mean over problems, and how many answers a problem has."""
    answers: dict[str, list[tuple[int, ...]]] = {}
    for one in records:
        answers.setdefault(original(one.problem), []).append(tuple(one.output[: one.tokens]))
    times = max(map(len, answers.values()))
    return sum(len(set(several)) for several in answers.values()) / len(answers), times


def page(run: Run, students: Sequence[Student], picture: str, samples: Run | None = None) -> str:
    """The page as Markdown."""
    reference = next((one for one in run.summaries if one.name == run.header.baselines.get("vanilla")), None)
    curves = curves_of(run)
    if reference is None or TEACHER not in curves:
        raise ToolkitError(
            f"the comparison has no reference or no curve of the teacher, got baselines {dict(run.header.baselines)} and curves "
            f"{list(curves)}. Students are measured against both. Write baselines: {{vanilla: ...}} and a configuration {TEACHER}."
        )
    return (
        "\n\n".join(
            (
                "# Distillation\n\nMade by `python -m dllm_toolkit.evaluation.distillation_page` from cards and a ledger; do not edit. "
                "The methods: `dllm_toolkit/training/methods`, D2F in `dllm_toolkit/training/objectives.py`; recipes: `recipes/distil`.",
                _students(students),
                _verdict(run, curves, reference),
                _points(run, curves, reference, picture),
                *(() if samples is None else (_samples(samples),)),
            )
        )
        + "\n"
    )


def _students(students: Sequence[Student]) -> str:
    control = next((one for one in students if one.name == CONTROL), None)
    rows = []
    for one in students:
        entry = registry.lookup("objective", one.objective)
        relative = "" if control is None else f"{one.compute / control.compute:.2f}"
        rows.append(
            (
                f"`{one.name}`",
                words._first_line(entry) + (f"<br>`{one.arguments}`" if one.arguments else ""),
                words._links(papers_of(entry)),
                f"{one.steps:,}",
                f"{one.sequences:,}",
                f"{one.student_lanes / 1e6:.1f} M",
                f"{one.teacher_lanes / 1e6:.1f} M" if one.teacher_lanes else "",
                relative,
            )
        )
    head = ("student", "objective", "paper", "steps", "rows seen", "student lanes", "teacher lanes", "compute")
    return "\n\n".join(
        (
            "## Students",
            "Equal compute: a lane is a query token of a training forward; a student's counts three times (forward and backward), a frozen "
            f"teacher's once. `compute` is relative to the control, `{CONTROL}`: plain training on the same answers. At equal compute "
            "methods with two copies of a row or a doubled layout see less data; `rows seen` says how much.",
            words._table(head, rows),
        )
    )


def _verdict(run: Run, curves: Mapping[str, Curve], reference: Summary) -> str:
    """The fastest point of each curve that keeps accuracy, against the teacher's own and the control's."""
    own = fastest(curves[TEACHER], reference)
    rate = own.tokens_per_forward if own is not None else reference.tokens_per_forward
    control = fastest(curves[CONTROL], reference) if CONTROL in curves else None
    theirs = run.rows(reference.name)
    rows, lines, worth = [], [], []
    for name, curve in curves.items():
        best = fastest(curve, reference)
        if best is None:
            top = max(curve.summaries, key=lambda one: one.accuracy)
            lines.append(f"- `{name}` has no point within {WITHIN:.0f} point of the reference; its best is {_at(top)}.")
            continue
        mine = run.rows(best.name)
        common = [problem for problem in theirs if problem in mine]
        accuracy = paired([mine[one].correct for one in common], [theirs[one].correct for one in common])
        exact = paired([mine[one].exact for one in common], [theirs[one].exact for one in common])
        times = best.tokens_per_forward / rate
        if name != TEACHER and times >= WORTH:
            worth.append(f"`{name}`")
        rows.append(
            (
                f"`{name}`",
                setting(best),
                f"{best.tokens_per_forward:.2f}",
                f"{times:.2f}",
                words._percent(best.accuracy),
                words._percent(best.exact),
                f"{best.nfe:.1f}",
                f"{best.lanes:.0f}",
            )
        )
        sentence = f"- `{name}` {words._clause(accuracy, 'accuracy')} and {words._clause(exact, 'exact solutions')} at {setting(best)}"
        if control is not None and name not in (CONTROL, TEACHER):
            other = run.rows(control.name)
            both = [problem for problem in other if problem in mine]
            fewer = paired([other[one].nfe for one in both], [mine[one].nfe for one in both])
            sure = "" if fewer.verdict != "keeps" else ", which is not significant"
            sentence += f"; {fewer.mean:+.1f} forwards saved against `{CONTROL}` ({fewer.low:+.1f} to {fewer.high:+.1f}){sure}"
        lines.append(sentence + ".")
    rows.sort(key=lambda row: -float(row[2]))
    head = ("curve", "setting", "tokens/forward", "x teacher", "accuracy", "exact", "forwards", "lanes")
    reached = f"{', '.join(worth)} reach" if len(worth) > 1 else f"{worth[0]} reaches" if worth else "No student reaches"
    return "\n\n".join(
        (
            "## What each is worth",
            f"{reached} {WORTH} times the teacher's tokens per forward ({rate:.2f}) at an accuracy within {WITHIN:.0f} point of the "
            f"reference, `{reference.name}`: {_at(reference)}. The table has the fastest such point of each curve.",
            words._table(head, rows),
            f"Paired with `{reference.name}`, problem by problem:",
            "\n".join(lines),
        )
    )


def _at(one: Summary) -> str:
    return f"{one.tokens_per_forward:.2f} tokens per forward at {words._percent(one.accuracy)} accuracy, {words._percent(one.exact)} exact"


def _points(run: Run, curves: Mapping[str, Curve], reference: Summary, picture: str) -> str:
    best = {what: max(100 * getattr(one, what) for one in run.summaries) for what in ("accuracy", "exact")}
    rows = []
    for name, curve in curves.items():
        areas = [
            area_under_parallelism([(one.tokens_per_forward, 100 * getattr(one, what)) for one in curve.summaries], best=best[what])
            for what in best
        ]
        points = ", ".join(
            f"{value}: {one.tokens_per_forward:.2f} at {words._percent(one.accuracy)} ({words._percent(one.exact)})"
            for value, one in zip(curve.settings, curve.summaries, strict=True)
        )
        variety = distinct(list(run.rows(curve.summaries[0].name).values()))
        rows.append((f"`{name}`", points, *(f"{area:.0f}" for area in areas), f"{variety:.0f}"))
    rows.sort(key=lambda row: -float(row[2]))
    count = max(summary.problems for summary in run.summaries)
    variety = distinct(list(run.rows(reference.name).values()))
    version = f", commit {run.header.commit}" if run.header.commit else ""
    return "\n\n".join(
        (
            "## All points",
            f"{plural(count, 'problem')} of {words._component(run.header.recipe['task'])}, batch {run.header.batch_size}, "
            f"{machine(run.header)}; recipe {run.header.recipe_hash}{version}. A point is tokens per forward at accuracy (exact "
            f"solutions). AUP: area under parallelism ({words._links(('2601.07568',))}), alpha 3, points more than 5 below a curve's "
            f"first one left out, y_max the best of this pool: {best['accuracy']:.1f} % and {best['exact']:.1f} %. variety: different "
            f"runs of four tokens for every 1,000 in the answers at the first setting; the reference has {variety:.0f}.",
            words._table(("curve", "points", "AUP, accuracy", "AUP, exact", "variety"), rows),
            f"![Accuracy and exact solutions against tokens per forward, a line for each student]({picture})",
        )
    )


def _samples(run: Run) -> str:
    rows, times = [], 1
    for one in run.summaries:
        records = list(run.rows(one.name).values())
        count, times = different(records)
        numbers = (f"{one.tokens_per_forward:.2f}", words._percent(one.accuracy), words._percent(one.exact))
        rows.append((f"`{one.name}`", *numbers, f"{count:.2f}", f"{distinct(records):.0f}"))
    rows.sort(key=lambda row: -float(row[4]))
    first = run.summaries[0]
    decoder = words._component(run.header.recipe["configurations"][first.name]["decoder"])
    head = ("student", "tokens/forward", "accuracy", "exact", f"different of {times}", "variety")
    return "\n\n".join(
        (
            "## Samples",
            f"{times} answers to each of {plural(first.problems // times, 'problem')}, sampled: {decoder} for `{first.name}`, and "
            "alike for all. `different`: how many of the answers to a problem differ, token by token; a student that lost its choices "
            "repeats itself. variety: as above.",
            words._table(head, rows),
        )
    )


def main(arguments: Sequence[str]) -> int:
    """Write the page, and its picture beside it."""
    if len(arguments) not in (3, 4):
        print("usage: python -m dllm_toolkit.evaluation.distillation_page RUN PAGE.md STUDENTS [SAMPLES]", file=sys.stderr)
        return 2
    target, home = Path(arguments[1]), Path(arguments[2])
    try:
        run = Run.read(Path(arguments[0]))
        cards = sorted(home.glob("*/model/card.json"))
        if not cards:
            raise ToolkitError(f"there is no student in {home} (no */model/card.json). Train some first: recipes/distil.")
        students = sorted((Student.read(card) for card in cards), key=lambda one: (one.name != CONTROL, one.name))
        samples = Run.read(Path(arguments[3])) if len(arguments) == 4 else None
        text = page(run, students, f"{target.stem}.png", samples)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    figure = sweep_figure(list(curves_of(run).values()), run.summaries)
    figure.savefig(target.with_suffix(".png"), dpi=150, metadata={"Software": None})
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
