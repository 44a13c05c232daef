"""`dllm-toolkit compare`: a grid of (model, decoder, cache, driver) on the same problems, into one ledger.

Everything that can be wrong is found before the first forward and before anything is written: names, baselines, the fit of decoder,
cache and model, prompts against the model's positions, a ledger of another recipe. Each model is loaded once. Configurations run one
after the other in the order of the recipe, each with its own warm-up that no clock sees. A run that was killed continues where its
ledger ends when the same command is given again. Processes that torchrun starts share the batches (processes.py, shards.py).
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dllm_toolkit import sweep
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import check_prompts
from dllm_toolkit.decoders.base import Decoder, check
from dllm_toolkit.drivers.base import Denoise, Driver, with_loaded
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import cost, ledger, provenance, report, shards
from dllm_toolkit.evaluation.ledger import Event, Header, Record, Summary
from dllm_toolkit.evaluation.measure import CompareError, Row, RunOptions, Templates, fill, find_device
from dllm_toolkit.evaluation.processes import Processes, joined
from dllm_toolkit.evaluation.report import ReportOptions
from dllm_toolkit.evaluation.tasks import Gap, Problem, Task
from dllm_toolkit.models.base import Model
from dllm_toolkit.recipe import Lazy, Recipe

__all__ = ["Baselines", "CompareError", "CompareRecipe", "Configuration", "ReportOptions", "RunOptions", "run_comparison"]


@dataclass(frozen=True)
class Configuration:
    """One row of the comparison. model: a name under `models`; so may the other models of a driver be."""

    model: str
    decoder: Decoder
    cache: Cache = field(default_factory=NoCache)
    driver: Driver = field(default_factory=Denoise)


@dataclass(frozen=True)
class Baselines:
    """Rows that speed-ups are measured against; null: no such column."""

    autoregressive: str | None = None
    vanilla: str | None = None


@dataclass(frozen=True)
class SweepOptions:
    """largest: configurations that the recipe's sweeps may make."""

    largest: int = sweep.LARGEST

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise CompareError(f"largest must be at least 1, got {self.largest}. Write largest: {sweep.LARGEST}, or leave it out.")


@dataclass(frozen=True)
class CompareRecipe:
    """Root of a comparison recipe: the task, the models, the rows, and how they are run."""

    task: Task
    models: dict[str, Lazy[Model]]
    configurations: dict[str, Configuration]
    baselines: Baselines = field(default_factory=Baselines)
    run: RunOptions = field(default_factory=RunOptions)
    sweep: SweepOptions = field(default_factory=SweepOptions)
    output: Path = Path("runs/compare")
    report: ReportOptions = field(default_factory=ReportOptions)

    def __post_init__(self) -> None:
        if not self.configurations:
            raise CompareError("configurations is empty. A comparison needs rows. Write at least one configuration.")
        for name, configuration in self.configurations.items():
            # The name becomes a folder of the TensorBoard log.
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*(\[[\w.+,=-]+\])?", name):
                raise CompareError(f"configurations: a name is letters, digits and _ . + -, got {name!r}. Write one without the rest.")
            if name == "comparison":
                raise CompareError("configurations.comparison: this name is taken. TensorBoard's overview has it. Write another.")
            if configuration.model not in self.models:
                raise CompareError(
                    f"configurations.{name}.model names no model, got {configuration.model!r}. Write one of {sorted(self.models)}."
                )
            for argument, other in configuration.driver.others.items():
                if isinstance(other, str) and other not in self.models:
                    raise CompareError(
                        f"configurations.{name}.driver.{argument} names no model, got {other!r}. Write one of {sorted(self.models)}, or a "
                        "model of its own: {_component_: load, path: ...}."
                    )
        for slot in ("autoregressive", "vanilla"):
            baseline = getattr(self.baselines, slot)
            if baseline is not None and baseline not in self.configurations:
                raise CompareError(
                    f"baselines.{slot} names no configuration, got {baseline!r}. Write one of {sorted(self.configurations)} or null."
                )


def run_comparison(recipe: Recipe, built: CompareRecipe, *, dry_run: bool = False) -> list[Summary]:
    """Run or continue a comparison; table and JSON line on stdout, progress on stderr, files into `built.output`.

    dry_run: check everything, print what it would cost on stdout, and stop: no summaries, and nothing is written. A sweep's cost is printed
    before it starts in any case. Of several processes (torchrun) each measures its share, and the first reports; the others return nothing.
    Errors: ToolkitError before the first forward; nothing is written then.
    """
    with joined() as here:
        return _compare(recipe, built, here, dry_run)


def _compare(recipe: Recipe, built: CompareRecipe, here: Processes, dry_run: bool) -> list[Summary]:
    threads = torch.get_num_threads()
    path = built.output / "ledger.jsonl"
    try:
        with here.together():
            _require_different(recipe, built)
            with _placed(recipe, "run", "device"):
                device = find_device(built.run.device, here)
            if built.run.threads is not None:
                torch.set_num_threads(built.run.threads)
            with _placed(recipe, "task"):
                built.task.ready()
                problems = _problems(built.task)
            rows = _rows(recipe, built, problems)
            own = _header(recipe, built, rows, problems, device)
        header = here.share(own)
        with here.together():
            ledger.require_same(path, header, own)  # another machine's code or GPU would make another ledger
            if dry_run and here.first:
                plan = (rows, recipe.tree["configurations"], _held(path, header), len(problems), built.run, device)
                cost.print_costs(cost.estimate(*plan), sys.stdout)
        if dry_run:
            return []
        with shards.open_shared(path, header, here, [problem.id for problem in problems]) as (book, there):
            with here.together():
                if here.first:
                    with ledger.written(built.output / "recipe.yaml"):
                        (built.output / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
                    if any(sweep.is_cell(row.name) for row in rows) and len(there) < len(rows) * len(problems):
                        plan = (rows, recipe.tree["configurations"], there, len(problems), built.run, device)
                        cost.print_costs(cost.estimate(*plan))
            done = here.share({(record.configuration, record.problem) for record in there})
            seconds = 0.0
            with here.together():
                seconds = fill(book, rows, problems, built.task, built.run, device, done=done, here=here)
            took = here.gather(seconds)
            with here.together():
                if here.first and (answers := len(rows) * len(problems) - len(done)):
                    book.note(_measured(answers, max(took), here))
    finally:
        torch.set_num_threads(threads)
    return _report(built, path) if here.first else []


def _measured(answers: int, seconds: float, here: Processes) -> Event:
    by = "" if here.count == 1 else f" by {here.count} processes"
    text = f"{answers} answers were decoded and graded in {seconds:.1f} s{by}, loading and warm-up excluded"
    return Event("measured", text, values={"answers": answers, "processes": here.count, "seconds": seconds}, date=provenance.now())


def _report(built: CompareRecipe, path: Path) -> list[Summary]:
    header, records = ledger.read(path)
    with ledger.written(built.output):
        summaries = report.write_reports(built.output, header, records, built.report)
    report.print_table(header, summaries)
    for summary in summaries:
        if summary.failed:
            lacking = f"{summary.failed} of {summary.problems} problems have no answer, for want of memory, and count as wrong"
            print(f"note: {summary.name}: {lacking}", file=sys.stderr)
    print(
        f"Written to {built.output}: {', '.join(sorted(item.name for item in built.output.iterdir()))}",
        file=sys.stderr,
    )
    print(report.json_line(header, summaries, output=str(built.output)))
    return summaries


def _held(path: Path, header: Header) -> list[Record]:
    """What a ledger holds of the run that `header` describes; a note if it is of another."""
    if not path.exists():
        return []
    old, records = shards.held(path)
    if (old.recipe_hash, dict(old.made_of), dict(old.made_on)) == (header.recipe_hash, dict(header.made_of), dict(header.made_on)):
        return records
    print(f"note: {path} belongs to another recipe, code or machine; the run would be refused. Add output=... to it", file=sys.stderr)
    return []


def _require_different(recipe: Recipe, built: CompareRecipe) -> None:
    """A cell of a sweep that is what another configuration is would be measured twice, under two names."""
    seen: dict[str, list[str]] = {}
    for name, configuration in built.configurations.items():
        alike = seen.setdefault(repr(configuration), [])
        for other in alike:
            if (sweep.is_cell(name) or sweep.is_cell(other)) and _equal(configuration, built.configurations[other]):
                message = f"it is the same configuration as {other}, and would be measured twice. Drop one of the two."
                raise CompareError(recipe.at(("configurations", name), message))
        alike.append(name)


def _equal(one: Configuration, other: Configuration) -> bool:
    try:
        return one == other
    except RuntimeError:  # tensors inside, which have no single truth; what looks alike need not be
        return False


def _problems(task: Task) -> tuple[Problem, ...]:
    problems = tuple(task.problems())
    if not problems:
        raise CompareError("the task has no problems. A comparison needs some. Write a larger size.")
    if len({problem.id for problem in problems}) < len(problems):
        raise CompareError("two problems of the task have the same id. The ledger tells problems apart by it. Make the ids unique.")
    return problems


@contextlib.contextmanager
def _placed(recipe: Recipe, *keys: str) -> Iterator[None]:
    """Errors of the block get the file and the line of the recipe's value under `keys`."""
    try:
        yield
    except ToolkitError as error:
        raise CompareError(recipe.at(keys, error)) from error


def _rows(recipe: Recipe, built: CompareRecipe, problems: Sequence[Problem]) -> list[Row]:
    """Load every model that a row uses, once, on the CPU, and check every row before any forward."""
    models: dict[object, Any] = {}

    def load(recipe: Lazy[Model] | str) -> Any:
        key = built.models[recipe] if isinstance(recipe, str) else recipe  # equal recipes are one model
        if key not in models:
            models[key] = key.build()
        return models[key]

    encoded: dict[object, tuple[tuple[tuple[int, ...], ...], Templates]] = {}
    rows: list[Row] = []
    refused: list[str] = []  # a grid often holds more than one pair that does not fit: all are named at once
    for name, configuration in built.configurations.items():
        key, model = built.models[configuration.model], load(configuration.model)
        if key not in encoded:
            with _placed(recipe, "run", "max_new_tokens"):
                encoded[key] = _encode(model, configuration.model, built.task, problems, built.run.max_new_tokens)
        try:
            for keys, cache in ((("decoder",), NoCache()), (("cache",), configuration.cache)):
                with _placed(recipe, "configurations", name, *keys):
                    check(model.spec, configuration.decoder, cache)
            driver = with_loaded(configuration.driver, lambda _, other: load(other))
            with _placed(recipe, "configurations", name, "driver"):
                driver.check(model, configuration.decoder, configuration.cache)
        except CompareError as error:
            refused.append(str(error))
            continue
        rows.append(Row(name, model, configuration.decoder, configuration.cache, *encoded[key], driver))
    if refused:
        raise CompareError("\n".join(refused))
    return rows


def _encode(model: Any, name: str, task: Task, problems: Sequence[Problem], budget: int) -> tuple[tuple[tuple[int, ...], ...], Templates]:
    """Prompts as ids, and the answers' skeletons if the task has them."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CompareError(f"models.{name} has no tokenizer. Prompts are text. Put tokenizer.json beside its model.safetensors.")

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    prompts = tuple(ids(task.render(problem, tokenizer)) for problem in problems)
    templates = None
    if any(problem.skeleton is not None for problem in problems):
        templates = tuple(
            tuple(
                one
                for part in problem.skeleton or ()
                for one in ([None] * len(ids(part.reference)) if isinstance(part, Gap) else ids(part))
            )
            for problem in problems
        )
    lengths = [budget] * len(prompts) if templates is None else [len(template) for template in templates]
    for problem, prompt, length in zip(problems, prompts, lengths, strict=True):
        if not prompt:
            raise CompareError(f"the prompt of {problem.id} is empty for models.{name}. There is nothing to answer. Change the task.")
        if length == 0:
            raise CompareError(f"the skeleton of {problem.id} is empty for models.{name}. There is nothing to fill. Change the task.")
        if len(prompt) + length > model.spec.max_positions:
            room = model.spec.max_positions - len(prompt)
            shorter = f"run.max_new_tokens={room} or less" if room > 0 and templates is None else "another model, or fewer task.shots"
            raise CompareError(
                f"the prompt of {problem.id} has {len(prompt)} tokens and the answer {length}, but models.{name} has "
                f"{model.spec.max_positions} positions. Write {shorter}."
            )
    check_prompts(model.spec, prompts, lengths)
    return prompts, templates


def _header(recipe: Recipe, built: CompareRecipe, rows: Sequence[Row], problems: Sequence[Problem], device: torch.device) -> Header:
    weights = {
        f"weights.{name}": provenance.weights_fingerprint(next(row.model for row in rows if built.configurations[row.name].model == name))
        for name in dict.fromkeys(configuration.model for configuration in built.configurations.values())
    }
    for row in rows:
        for argument, other in built.configurations[row.name].driver.others.items():
            name = other if isinstance(other, str) else f"{row.name}.driver.{argument}"
            weights[f"weights.{name}"] = provenance.weights_fingerprint(row.driver.other(argument))
    drivers = [configuration.driver for configuration in built.configurations.values()]
    parts = [built.task, *drivers, *(part for row in rows for part in (row.decoder, row.cache, *row.models))]
    return Header(
        recipe_hash=ledger.recipe_hash(recipe.tree),
        recipe=recipe.tree,
        made_of={
            "code": provenance.code_fingerprint(parts),
            "grader": provenance.grader_fingerprint(built.task),
            "problems": provenance.problems_fingerprint(problems),
            **weights,
        },
        made_on={
            "device": provenance.device_name(device),
            "kind": device.type,
            "dtype": built.run.dtype,
            **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),  # torchrun sets one, which is nothing to a GPU
        },
        versions=provenance.versions(),
        commit=provenance.git_commit(),
        date=provenance.now(),
        batch_size=built.run.batch_size,
        warm_up=built.run.warm_up,
        configurations=tuple(built.configurations),
        baselines={"autoregressive": built.baselines.autoregressive, "vanilla": built.baselines.vanilla},
        notes=(
            f"configurations were measured one after the other in this order: {', '.join(built.configurations)}",
            f"warm-up of each: {built.run.warm_up} problems, in whole batches, not counted",
        ),
    )
