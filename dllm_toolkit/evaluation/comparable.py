"""What must agree before the numbers of two runs may stand in one table, and which columns a difference spoils.

Answers depend on the problems, the prompts, the length of an answer and the grader; counts on the rules of counting and the tokenizer;
times on the machine and the batch. A difference in what spoils every column cannot be helped; where it spoils some of them the others are
still honest (`--drop-incomparable`), and what a study varies on purpose becomes a column (`--vary`). Models, decoders and caches are what
is compared: they may differ in anything.
"""

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.evaluation.ledger import PRESENTATION, Record
from dllm_toolkit.evaluation.measure import RunOptions
from dllm_toolkit.evaluation.runs import ReportError, Row, Source
from dllm_toolkit.recipe_hints import COMPONENT

GRADED = frozenset({"accuracy", "steps_right", "exact", "diversity", "perplexity"})
COUNTED = frozenset({"tokens_per_forward", "nfe"})
TIMED = frozenset({"tokens_per_second", "latency"})
EVERYTHING = GRADED | COUNTED | TIMED

RULES: Mapping[str, frozenset[str]] = {
    "forwards (nfe)": COUNTED,
    "tokens": frozenset({"tokens_per_forward", "tokens_per_second"}),
    "tokens per forward": frozenset({"tokens_per_forward"}),
    "tokens per second": frozenset({"tokens_per_second"}),
    "latency": frozenset({"latency"}),
    "lanes": frozenset(),
    "peak memory": frozenset(),
    "failed": EVERYTHING,
    "accuracy": frozenset({"accuracy"}),
    "diversity": frozenset({"diversity"}),
    "perplexity": frozenset({"perplexity"}),
    "speed-up": frozenset(),
}
"""Of each rule of counting (ledger.COUNTING, what stands before the colon) the columns that it defines."""
_LATER = frozenset({"peak memory", "failed"})

_COMPARED = frozenset({"models", "configurations", "model", "decoder", "cache", "driver", "baselines", "tasks", "likelihood", "base"})
_WHICH = ("task.size", "task.seed", "task.path", "task.split", "task.examples", "size", "data")
"""Settings that only say which problems are asked: where those are the same ones, they may have been found in different ways."""
_RUN: Mapping[str, frozenset[str]] = {
    "run.batch_size": TIMED,
    "run.compile": TIMED,
    "run.warm_up": TIMED,
    # Another seed is another draw of the same thing. What the run really had of the others stands in `made_on`.
    "run.seed": frozenset(),
    "run.device": frozenset(),
    "run.threads": frozenset(),
    "run.dtype": frozenset(),
}


@dataclass(frozen=True)
class Disagreement:
    """A field that is not the same in all runs. values: of each label. spoils: columns that must not be compared then."""

    field: str
    values: Mapping[str, str]
    spoils: frozenset[str]
    advice: str

    @property
    def variable(self) -> bool:
        """Whether it can be what a study varies: how a run was made, never what was asked or how it was judged."""
        return self.field.startswith(("run.", "made_on."))

    @property
    def droppable(self) -> bool:
        """Whether columns are left to compare."""
        return self.spoils < EVERYTHING

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for label, value in self.values.items():
            groups.setdefault(value, []).append(label)
        said = [f"{value} in {', '.join(labels)}" for value, labels in groups.items()]
        return f"{self.field}: {'; '.join(said)}"


def disagreements(sources: Sequence[Source], rows: Sequence[Row], *, shared: bool = False) -> list[Disagreement]:
    """Everything that keeps the runs from being compared column by column. shared: only problems that all rows hold are compared.

    `rows` hold the records that are compared.
    """
    found = [*_headers(sources, shared), *_problems(rows), *_verdicts(rows), *_tokenizers(rows)]
    return [one for one in found if one.spoils]


def conditions(source: Source) -> dict[str, Any]:
    """How a run was made, field by field, with defaults spelled out; without what is compared and how it is shown."""
    kept = {key: value for key, value in source.header.recipe.items() if key not in PRESENTATION | _COMPARED}
    run = {item.name: item.default for item in dataclasses.fields(RunOptions)}
    kept["run"] = {**run, **kept.get("run", {})}
    if "task" in kept:
        kept["task"] = _task(kept["task"])
    if source.command == "harness":
        from dllm_toolkit.evaluation.harness import HarnessRecipe

        kept = {**{item.name: item.default for item in dataclasses.fields(HarnessRecipe) if _plain(item.default)}, **kept}
    return {**_flat(kept), **{f"made_on.{key}": value for key, value in source.header.made_on.items()}}


def _headers(sources: Sequence[Source], shared: bool) -> Iterator[Disagreement]:
    first = sources[0].label
    same_problems = shared or len({source.header.made_of.get("problems") for source in sources}) == 1
    settings = [conditions(source) for source in sources]
    for field in dict.fromkeys(key for own in settings for key in own):
        if same_problems and any(field == which or field.startswith(f"{which}.") for which in _WHICH):
            continue
        if field == "made_on.kind" and len({own.get("made_on.device") for own in settings}) > 1:
            continue  # another device: said once
        spoils = TIMED if field.startswith("made_on.") else _RUN.get(field, EVERYTHING)
        advice = (
            f"measure both on one machine, with one set-up ({field} as in {first})"
            if field.startswith("made_on.")
            else f"run again with {field}={_text(settings[0].get(field))}"
        )
        yield from _differing(sources, field, lambda source, field=field: _text(conditions(source).get(field, "(absent)")), spoils, advice)
    origin: list[tuple[str, frozenset[str], str]] = [
        ("made_of.harness", GRADED, "run both with the same version of this package"),
        ("made_of.grader", GRADED, "run both with the same version of this package, or of your task"),
    ]
    if not same_problems:  # where files changed under their paths; `joined` looks at which problems there are
        origin.append(("made_of.problems", EVERYTHING, "ask the same problems, or add --shared-problems to compare those that both have"))
    if not shared:
        origin.append(("made_of.asked", EVERYTHING, "ask the same requests"))
    for field, spoils, advice in origin:
        key = field.partition(".")[2]
        holders = [source for source in sources if key in source.header.made_of]  # a ledger from before the fingerprint: see `remarks`
        yield from _differing(holders, field, lambda source, key=key: source.header.made_of[key], spoils, advice)
    advice = "run both with the same version"
    yield from _differing(sources, "versions.lm_eval", lambda source: source.header.versions.get("lm_eval", "none"), GRADED, advice)
    for rule in dict.fromkeys(_name(line) for source in sources for line in source.header.counting):
        # A ledger from before a rule of `_LATER` holds nothing that it is about.
        holders = [source for source in sources if rule not in _LATER or any(_name(line) == rule for line in source.header.counting)]
        yield from _differing(
            holders,
            f"counting of {rule}",
            lambda source, rule=rule: next((f"{line!r}" for line in source.header.counting if _name(line) == rule), "(not counted)"),
            RULES.get(rule, frozenset()),  # a rule of no column here
            "run both with the same version of this package",
        )


def _problems(rows: Sequence[Row]) -> Iterator[Disagreement]:
    """The same id, asked in other words or with another right answer."""
    for field in ("prompt_hash", "reference"):
        clash = next(_clashes(rows, lambda record: record.problem, lambda record, field=field: getattr(record, field)), None)
        if clash is not None:
            (one, first), (other, second) = clash
            values = {one.source.label: _text(getattr(first, field)), other.source.label: _text(getattr(second, field))}
            yield Disagreement(f"{field} of {first.problem}", values, EVERYTHING, "ask the same problems in the same words")


def _verdicts(rows: Sequence[Row]) -> Iterator[Disagreement]:
    """The same text for the same problem, judged otherwise: another grader, unless both say that it is the same one."""
    for (one, first), (other, second) in _clashes(rows, lambda record: (record.problem, record.text), lambda record: record.correct):
        graders = {row.source.header.made_of.get("grader") for row in (one, other)}
        if one.source is not other.source and (None in graders or len(graders) > 1):
            values = {row.source.label: "right" if record.correct else "wrong" for row, record in ((one, first), (other, second))}
            advice = "grade both with the same version of this package and its packages"
            yield Disagreement(f"verdict on one text for {first.problem}", values, GRADED, advice)
            return


def _clashes(
    rows: Sequence[Row], key: Callable[[Record], Any], value: Callable[[Record], Any]
) -> Iterator[tuple[tuple[Row, Record], tuple[Row, Record]]]:
    """Records that agree in `key` and not in `value`, each with the first of its key."""
    seen: dict[Any, tuple[Row, Record]] = {}
    for row in rows:
        for record in row.records:
            first = seen.setdefault(key(record), (row, record))
            if value(first[1]) != value(record):
                yield first, (row, record)


def _tokenizers(rows: Sequence[Row]) -> Iterator[Disagreement]:
    """One prompt, different numbers of tokens: tokens of these runs are of different sizes. Inside one run that is its author's choice."""
    lengths, mixed = _prompt_lengths(rows)
    if len(set().union(*lengths.values())) > 1 and not mixed:
        problem = rows[0].records[0].problem
        values = {
            row.source.label: f"{next(record.prompt_tokens for record in row.records if record.problem == problem)} tokens" for row in rows
        }
        spoils = frozenset({"tokens_per_forward", "tokens_per_second"})
        yield Disagreement(f"tokenizer (prompt of {problem})", values, spoils, "compare forwards and latency instead of tokens")


def _prompt_lengths(rows: Sequence[Row]) -> tuple[dict[str, set[tuple[int, ...]]], bool]:
    """Of each run the lengths of its prompts, one tuple a tokenizer; and whether one run has all the tokenizers that there are."""
    problems = {record.problem for record in rows[0].records}
    lengths: dict[str, set[tuple[int, ...]]] = {}
    for row in rows:
        own = {record.problem: record.prompt_tokens for record in row.records if record.problem in problems}
        lengths.setdefault(row.source.label, set()).add(tuple(own[problem] for problem in sorted(own)))
    union = set().union(*lengths.values())
    return lengths, any(own == union for own in lengths.values())


def remarks(sources: Sequence[Source], rows: Sequence[Row]) -> list[str]:
    """What a reader must know though it keeps nothing from being compared."""
    found = []

    def say(words: str, field: str, value: Callable[[Source], object], holders: Sequence[Source] = sources) -> None:
        found.extend(f"{words}: {one}" for one in _differing(holders, field, lambda source: str(value(source)), EVERYTHING, ""))

    say("ledgers of different form", "schema", lambda source: source.header.schema)
    for name in ("dllm-toolkit", "torch", "transformers", "numpy"):
        say("versions differ", name, lambda source, name=name: source.header.versions.get(name, "?"))
    say("made by different code", "commit", lambda source: source.header.commit or "?")
    say("seeds differ", "run.seed", lambda source: conditions(source)["run.seed"])
    for name in sorted({key for source in sources for key in source.header.made_of if key.startswith("weights.")}):
        holders = [source for source in sources if name in source.header.made_of]
        say("not the same weights", name, lambda source, name=name: source.header.made_of[name], holders)
    unknown = [source.label for source in sources if "grader" not in source.header.made_of and source.command == "compare"]
    if unknown and len(sources) > 1:
        found.append(f"{', '.join(unknown)}: the ledger does not say which grader judged it; equal answers have equal verdicts")
    flaky = sum(1 for _ in _clashes(rows, lambda record: (record.problem, record.text), lambda record: record.correct))
    if flaky:
        found.append(f"{flaky} answers were judged otherwise than the same text elsewhere, by one grader: is a time limit close?")
    if len(set().union(*_prompt_lengths(rows)[0].values())) > 1:
        found.append("the rows have different tokenizers: a token is not the same amount of text in all of them")
    for source in sources:
        missing = [name for name in source.header.configurations if all(record.configuration != name for record in source.records)]
        if missing:
            found.append(f"{source.label} is not finished: it has no answers yet of {', '.join(missing)}")
    return found


def _differing(
    sources: Sequence[Source], field: str, value: Callable[[Source], str], spoils: frozenset[str], advice: str
) -> Iterator[Disagreement]:
    values = {source.label: value(source) for source in sources}
    if len(set(values.values())) > 1:
        yield Disagreement(field, values, spoils, advice)


def refuse(sources: Sequence[Source], found: Sequence[Disagreement], titles: Mapping[str, str]) -> ReportError:
    """The error that says which field differs in which run, what it spoils, and what to do. titles: of the columns."""
    lines = ["These runs were counted differently, and one table would compare unlike things:"]
    for one in found:
        spoiled = "every column" if not one.droppable else ", ".join(titles[key] for key in titles if key in one.spoils)
        lines.append(f"  {one}. Spoils {spoiled}. What to do: {one.advice}.")
    first, again = sources[0], []
    for source in sources[1:]:
        own, theirs = conditions(source), conditions(first)
        fields = [one.field for one in found if one.field in own and one.field in theirs and own[one.field] != theirs[one.field]]
        as_run = {field: field.replace("made_on.", "run.") for field in fields if field in ("made_on.dtype", "made_on.threads")}
        settings = [
            f"{as_run.get(field, field)}={_text(theirs[field])}" for field in fields if field in as_run or not field.startswith("made_on.")
        ]
        recipe = source.path.with_name("recipe.yaml")
        if settings and recipe.is_file():
            words = [str(recipe), *settings, f"output={recipe.parent}-again"]
            again.append(f"  dllm-toolkit {source.command} {shlex.join(words)}")
    if again:
        lines += [f"To make them as {first.label} was made:", *again]
    variable = [one.field for one in found if one.variable]
    if variable:
        lines.append(f"If a field is what you study, it becomes a column: --vary {' --vary '.join(variable)}")
    if all(one.droppable for one in found):
        lines.append("To leave those columns out and keep the runs: --drop-incomparable")
    return ReportError("\n".join(lines))


def _task(node: Any) -> Any:
    """A task's settings with its defaults. Only registered names are looked up: a ledger must not make this program import something."""
    name = node[COMPONENT] if isinstance(node, Mapping) else node
    given = dict(node) if isinstance(node, Mapping) else {COMPONENT: node}
    if not isinstance(name, str) or name not in registry.names("task"):
        return given
    entry = registry.lookup("task", name)
    defaults = {item.name: item.default for item in inspect.signature(entry).parameters.values() if item.default is not item.empty}
    return {**{key: value for key, value in defaults.items() if _plain(value)}, **given}


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | tuple | list | None)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: list(node) if isinstance(node, tuple) else node}


def _text(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name(rule: str) -> str:
    return rule.partition(":")[0]
