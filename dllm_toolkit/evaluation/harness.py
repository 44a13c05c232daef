"""`dllm-toolkit harness`: a model and a decoder of ours on the tasks of the evaluation harness (lm_eval), answers in our ledger.

    dllm-toolkit harness recipes/eval/harness.yaml --tasks gsm8k,humaneval
    python -m dllm_toolkit.evaluation.harness run --model dllm_toolkit --model_args recipe=recipes/eval/harness.yaml --tasks gsm8k

The second form is the harness's own command line, with our model added to its registry: the harness finds models by their registration
only and has no plug-in mechanism, so `lm_eval` itself cannot know the name; in Python, `register()` does it before `simple_evaluate`.

Prompts, worked examples, stop strings, filters and metrics are the harness's; model, decoder, cache, driver, batches and the budget of an
answer are the recipe's. An answer has the smaller of `run.max_new_tokens` and the length that the task asks for. Options of sampling that a
task sets are not used: how tokens are drawn is the decoder's. Text is encoded without special tokens of its own, as everywhere here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decoders.base import Decoder, check
from dllm_toolkit.drivers.base import Denoise, Driver, with_loaded
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import harness_tasks, ledger, likelihood, provenance, report, sandbox
from dllm_toolkit.evaluation.harness_tasks import DataError, HarnessError
from dllm_toolkit.evaluation.ledger import Header
from dllm_toolkit.evaluation.likelihood import LikelihoodOptions
from dllm_toolkit.evaluation.measure import RunOptions, find_device
from dllm_toolkit.evaluation.report import ReportOptions
from dllm_toolkit.evaluation.tasks import Problem
from dllm_toolkit.models.base import Model
from dllm_toolkit.recipe import Lazy, Recipe, load

NAME = "dllm_toolkit"
"""What the harness calls our model: `--model dllm_toolkit`."""
ANSWERS, LIKELIHOODS, RESULTS = "ledger.jsonl", "likelihood.jsonl", "results.json"


@dataclass(frozen=True)
class HarnessRecipe:
    """Root of a recipe for the harness's tasks.

    tasks: the harness's names. data: of a task, a local file for each split of its data set, such as {gsm8k: {train: FILE, test: FILE}};
    without one the harness asks the hub. shots: worked examples, null for the task's own number. size: the first so many problems of a
    task, null for all. chat: wrap prompts in the tokenizer's chat template. execute: allow programs that the model wrote to run, in the
    sandbox. include: a directory with task definitions of your own. likelihood: how requests for likelihoods are answered.
    """

    model: Lazy[Model]
    decoder: Decoder
    cache: Cache = field(default_factory=NoCache)
    driver: Driver = field(default_factory=Denoise)
    tasks: tuple[str, ...] = ()
    data: dict[str, dict[str, Path]] = field(default_factory=dict)
    shots: int | None = None
    size: int | None = None
    chat: bool = False
    execute: bool = False
    include: Path | None = None
    likelihood: LikelihoodOptions = field(default_factory=LikelihoodOptions)
    run: RunOptions = field(default_factory=RunOptions)
    output: Path = Path("runs/harness")
    report: ReportOptions = field(default_factory=ReportOptions)

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise HarnessError(f"{name} must be at least {least}, got {value}. Write {name}: {least}, or null.")
        if len(set(self.tasks)) < len(self.tasks):
            raise HarnessError(f"tasks names one twice, got {list(self.tasks)}. Its answers would count twice. Leave one out.")

    @property
    def asked(self) -> dict[str, Any]:
        """What of the recipe the harness's own command line says for itself."""
        names = ("tasks", "data", "shots", "size", "chat", "execute", "include")
        said = {name: getattr(self, name) for name in names}
        return {name: value for name, value in said.items() if value or value == 0 and value is not False}


@dataclass(frozen=True)
class Session:
    """A recipe with its model loaded: everything that answering a request takes."""

    recipe: Recipe
    built: HarnessRecipe
    model: Any
    driver: Driver
    device: torch.device

    def header(self, kind: str, problems: Sequence[Problem], asked: object) -> Header:
        """Of the ledger of these requests. asked: whatever else decides an answer, such as stop strings."""
        built, models = self.built, {"model": self.model, **{name: self.driver.other(name) for name in self.driver.other_models}}
        return Header(
            recipe_hash=ledger.recipe_hash(self.recipe.tree),
            recipe=self.recipe.tree,
            made_of={
                "code": provenance.code_fingerprint([self.driver, built.decoder, built.cache, *models.values()]),
                "harness": _own_code(),
                "problems": provenance.problems_fingerprint(problems),
                "asked": hashlib.sha256(repr((kind, asked)).encode()).hexdigest()[:16],
                **{f"weights.{name}": provenance.weights_fingerprint(model) for name, model in models.items()},
            },
            made_on={
                "device": provenance.device_name(self.device),
                "kind": self.device.type,
                "dtype": built.run.dtype,
                "threads": torch.get_num_threads(),
            },
            versions={**provenance.versions(), "lm_eval": importlib.metadata.version("lm_eval")},
            commit=provenance.git_commit(),
            date=provenance.now(),
            batch_size=built.run.batch_size,
            warm_up=built.run.warm_up,
            configurations=tuple(dict.fromkeys(problem.meta["task"] for problem in problems)),
            notes=(f"{kind} requests of the evaluation harness", f"warm-up of each task: {built.run.warm_up} problems, not counted"),
        )


def _own_code() -> str:
    """Digest of this adapter: what of the package the ledger's other fingerprint leaves out."""
    digest = hashlib.sha256()
    for file in sorted([*Path(__file__).parent.glob("harness*.py"), Path(likelihood.__file__)]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def open_session(recipe: Recipe, built: HarnessRecipe) -> Session:
    """Load the recipe's model, on the CPU, and check that its parts fit. Raises ToolkitError."""
    with placed(recipe, "run", "device"):
        device = find_device(built.run.device)
    for argument, other in built.driver.others.items():
        if isinstance(other, str):
            with placed(recipe, "driver", argument):
                built.driver.other(argument)
    model: Any = built.model.build()
    if getattr(model, "tokenizer", None) is None:
        raise HarnessError(
            recipe.at(("model",), "the model has no tokenizer. The harness speaks text. Put tokenizer.json beside its model.safetensors.")
        )
    for key, cache in (("decoder", NoCache()), ("cache", built.cache)):
        with placed(recipe, key):
            check(model.spec, built.decoder, cache)
    driver = with_loaded(built.driver, lambda _, other: model if other == built.model else other.build())  # type: ignore[union-attr]
    with placed(recipe, "driver"):
        driver.check(model, built.decoder, built.cache)
    return Session(recipe, built, model, driver, device)


@contextlib.contextmanager
def placed(recipe: Recipe, *keys: str) -> Iterator[None]:
    """Errors of the block get the file and the line of the recipe's value under `keys`."""
    try:
        yield
    except ToolkitError as error:
        raise HarnessError(recipe.at(keys, error)) from error


@contextlib.contextmanager
def threads(run: RunOptions) -> Iterator[None]:
    """The recipe's number of CPU threads."""
    before = torch.get_num_threads()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def register() -> None:
    """Add our model to the harness's registry, and the sandbox to its metric of programs, for this process. Raises HarnessError.

    `lm_eval.evaluate` then also tells our model which tasks it runs: an answer is graded when it is written down, so that a ledger holds
    no answer without its grade.
    """
    harness_tasks.require()
    import lm_eval.evaluator as evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]

    from dllm_toolkit.evaluation.harness_model import HarnessModel

    if NAME not in model_registry:
        model_registry.register(NAME, target=HarnessModel)
    harness_tasks.hold_programs()
    original = evaluator.evaluate
    if getattr(original, "told", False):
        return

    @functools.wraps(original)
    def evaluate(*arguments: Any, **named: Any) -> Any:
        lm = named.get("lm", arguments[0] if arguments else None)
        tasks = named.get("task_dict", arguments[1] if len(arguments) > 1 else {})
        lm = getattr(lm, "lm", lm)  # inside the harness's own cache
        if isinstance(lm, HarnessModel):
            lm.tasks.update(tasks.get("tasks", {}))
        allowed = bool(named.get("confirm_run_unsafe_code"))
        with harness_tasks.execution(sandbox.Limits() if allowed else None):
            return original(*arguments, **named)

    evaluate.told = True  # type: ignore[attr-defined]
    evaluator.evaluate = evaluate


def run_harness(recipe: Recipe, built: HarnessRecipe) -> dict[str, Any]:
    """Run or continue an evaluation: the harness's table and ours on stdout, ledgers and results.json in `built.output`.

    Returns the harness's results. Raises ToolkitError, before the first forward for whatever can be known then.
    """
    register()
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    from dllm_toolkit.evaluation.harness_model import HarnessModel

    if not built.tasks:
        raise HarnessError(f"{recipe.path}: tasks is missing. There is nothing to evaluate. Write --tasks gsm8k, or tasks: [gsm8k].")
    with placed(recipe, "run", "device"):
        find_device(built.run.device)
    try:
        loaded = harness_tasks.load_tasks(built.tasks, built.data, built.include)
    except HarnessError as error:
        keys = error.keys if isinstance(error, DataError) else ("tasks",)
        raise HarnessError(recipe.at(keys, error)) from error
    with placed(recipe, "execute"):
        harness_tasks.require_execution(loaded.tasks, built.execute)
    with threads(built.run):
        lm = HarnessModel(open_session(recipe, built))
        if built.chat:
            with placed(recipe, "chat"):
                lm.require_chat_template()
        results = simple_evaluate(
            model=lm,
            tasks=list(loaded.items),
            task_manager=loaded.index,
            num_fewshot=built.shots,
            limit=built.size,
            apply_chat_template=built.chat,
            confirm_run_unsafe_code=built.execute,
        )
    assert results is not None
    return _finish(built, dict(results), loaded.tasks)


def _finish(built: HarnessRecipe, results: dict[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Tables on stdout, results.json, reports; says so if the harness graded an answer otherwise than the ledger."""
    from lm_eval.utils import handle_non_serializable, make_table  # pyright: ignore[reportMissingImports]

    samples = results.pop("samples", {})
    results["ledger"] = agreement(built.output / ANSWERS, samples)
    with ledger.written(built.output / RESULTS):
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        (built.output / RESULTS).write_text(text + "\n", encoding="utf-8")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    more: dict[str, Any] = {"output": str(built.output), "results": {name: _numbers(results["results"][name]) for name in tasks}}
    if not (built.output / ANSWERS).exists():
        print(json.dumps(more))
        return results
    header, records = ledger.read(built.output / ANSWERS)
    with ledger.written(built.output):
        summaries = report.write_reports(built.output, header, records, built.report)
    report.print_table(header, summaries)
    for name, (compared, differing) in results["ledger"].items():
        if differing:
            print(
                f"note: {name}: the harness graded {differing} of {compared} answers otherwise than the ledger, which grades them alone",
                file=sys.stderr,
            )
    print(report.json_line(header, summaries, **more))
    return results


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def agreement(path: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[int, int]]:
    """Of each task the number of grades that ledger and harness both have, and how many of them differ."""
    if not path.exists():
        return {}
    kept = {record.problem: record.extra["scores"] for record in ledger.read(path)[1]}
    found: dict[str, tuple[int, int]] = {}
    for name, graded in samples.items():
        pairs = [
            (kept[key][f"{metric},{sample['filter']}"], harness_tasks.plain(sample[metric]))
            for sample in graded
            if (key := f"{name}-{sample['doc_id']}") in kept
            for metric in sample["metrics"]
        ]
        if pairs:
            found[name] = (len(pairs), sum(one != other for one, other in pairs))
    return found


def from_arguments(arguments: Mapping[str, Any]) -> Session:
    """The session of the harness's own `--model_args recipe=FILE,a.b=c,...`. Raises HarnessError."""
    rest = dict(arguments)
    path = rest.pop("recipe", None)
    if path is None:
        raise HarnessError(
            f"model_args must name a recipe, got {sorted(arguments) or 'nothing'}. Write --model_args recipe=FILE,output=DIR."
        )
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items()]
    recipe = load(str(path), overrides).checked(HarnessRecipe)
    built = recipe.build(HarnessRecipe)
    if built.asked:
        raise HarnessError(
            f"{path} says {', '.join(built.asked)}, which the harness's own command line says for itself. One of them would be ignored. "
            "Run `dllm-toolkit harness` with it, or take them out and write --tasks, --num_fewshot, --limit, --apply_chat_template."
        )
    return open_session(recipe, built)


def main(arguments: Sequence[str] | None = None, command: Callable[[], Any] | None = None) -> int:
    """The harness's own command line with our model in its registry. Returns an exit code."""
    try:
        register()
        run: Callable[[], Any]
        if command is None:
            from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

            run = cli_evaluate
        else:
            run = command
        before, sys.argv = sys.argv, ["lm_eval", *(sys.argv[1:] if arguments is None else arguments)]
        try:
            run()
        finally:
            sys.argv = before
    except ToolkitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Under its own name: what lm_eval imports must be this module and not a second one called __main__.
    from dllm_toolkit.evaluation import harness

    sys.exit(harness.main())
