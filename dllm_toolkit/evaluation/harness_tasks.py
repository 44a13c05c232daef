"""Tasks of the evaluation harness (lm_eval): found by name, read from local files, graded one answer at a time, their programs held.

The harness fetches data from the hub, and its programming tasks fetch their metric, `code_eval`, from there too and run what a model
wrote with all your rights. Here a task takes the files that a recipe names for its splits, and `CodeMetric` stands in for that metric: the
same pass@k, each program in the sandbox, and only if the user says so. What the harness is: Gao et al., the language model evaluation
harness, doi 10.5281/zenodo.12608602.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import sandbox
from dllm_toolkit.evaluation.tasks import Grade, Problem, Task, sources

CODE = "code_eval"
Files = Mapping[str, Path]
"""Of each split of a task's data set the file that stands in for it."""
_EXECUTION: ContextVar[sandbox.Limits | Literal["loading", "forbidden"]] = ContextVar("execution", default="loading")


class HarnessError(ToolkitError):
    """An evaluation by the harness's tasks that cannot be run as asked."""


class DataError(HarnessError):
    """A local file that does not serve its task; `keys` is the place in the recipe."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = ("data", *keys)


def require() -> None:
    """Raises HarnessError if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(
            "the evaluation harness is not installed, got no package lm_eval. Its task definitions and metrics are used as they are. "
            "Write: pip install 'dllm-toolkit[harness]'."
        )


@dataclass(frozen=True)
class CodeMetric:
    """pass@k of programs (arXiv 2107.03374), in place of the hub's metric of the same form; a program and its tests run in the sandbox."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **unused: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over the problems for every k that all of them have answers for, and of each problem what became of its programs.

        While tasks are loaded nothing is run: their modules try the metric on a program of their own and throw the result away.
        """
        mode = _EXECUTION.get()
        if mode == "forbidden":
            raise HarnessError(
                "this task is graded by running what the model wrote, and nothing said that it may. Programs run in a sandbox, without "
                "network and with limits, but only if you say so. Write execute=true (of lm_eval itself: --confirm_run_unsafe_code)."
            )
        outcomes = [[None if isinstance(mode, str) else _outcome(one, reference, mode) for one in answers]
                    for answers, reference in zip(predictions, references, strict=True)]  # fmt: skip
        right = [[one is not None and one.right for one in row] for row in outcomes]
        shares = {
            f"pass@{count}": sum(pass_at(len(row), sum(row), count) for row in right) / len(right)
            for count in k
            if right and all(len(row) >= count for row in right)
        }
        told = {
            number: [(place, {"passed": one is not None and one.right, "result": one and one.status}) for place, one in enumerate(row)]
            for number, row in enumerate(outcomes)
        }
        return shares, told


@functools.lru_cache(maxsize=1 << 14)
def _outcome(program: str, tests: str, limits: sandbox.Limits) -> sandbox.Outcome:
    # An answer is graded for the ledger and again by the harness: it runs once, so that both have one verdict.
    return sandbox.run(program, [tests], limits)


def pass_at(answers: int, right: int, count: int) -> float:
    """The chance that one of `count` of the answers is right (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(answers - right, count) / math.comb(answers, count)


@contextlib.contextmanager
def execution(limits: sandbox.Limits | None) -> Iterator[None]:
    """Within it, `CodeMetric` runs programs under `limits`, or refuses to if there are none."""
    token = _EXECUTION.set("forbidden" if limits is None else limits)
    try:
        yield
    finally:
        _EXECUTION.reset(token)


def hold_programs() -> None:
    """From now on `evaluate.load("code_eval")` gives CodeMetric, in this process; tasks that are loaded later use it."""
    import evaluate  # pyright: ignore[reportMissingImports]

    original = evaluate.load
    if getattr(original, "held", False):
        return

    @functools.wraps(original)
    def load(path: str, *arguments: Any, **named: Any) -> Any:
        return CodeMetric() if path == CODE else original(path, *arguments, **named)

    load.held = True  # type: ignore[attr-defined]
    evaluate.load = load


@dataclass(frozen=True)
class Loaded:
    """Tasks and groups of the harness, and the index that they were found in."""

    items: tuple[Any, ...]
    index: Any

    @property
    def tasks(self) -> dict[str, Any]:
        """The single tasks, by name."""
        found: dict[str, Any] = {}
        for one in self.items:
            for task in one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]:
                found[task.task_name] = task
        return found


def load_tasks(names: Sequence[str], data: Mapping[str, Files], include: Path | None = None) -> Loaded:
    """The harness's tasks and groups of these names, those in `data` on local files. include: a directory with definitions of your own.

    Raises HarnessError for names that it does not know, data that is not there, and answers that are judged together.
    """
    require()
    hold_programs()
    manager = _manager(names, include)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            closest = f" Close to it: {', '.join(close)}." if close else ""
            raise HarnessError(
                f"the harness has no task of this name, got {name!r}.{closest} `lm_eval ls tasks` lists them all; "
                "include=DIR adds definitions of your own. Write tasks=[gsm8k]."
            )
    lost = [name for name in data if name not in names]
    if lost:
        raise DataError(
            f"this is none of the tasks, got {lost[0]!r}. Files belong to a task that is run. Write one of {list(names)} there.", lost[0]
        )
    with _quiet():
        return Loaded(tuple(one for name in names for one in _load(manager, name, data.get(name))), manager)


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """The harness's index of definitions. Reading all of its 14,000 takes ten seconds, so a task's own folder is tried first."""
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    if include is not None and not include.is_dir():
        raise HarnessError(f"include must be a directory with task definitions, got {str(include)!r}. Write include=my_tasks.")
    root = Path(lm_eval.tasks.__file__).parent
    folders = {root / re.split(r"[_-]", name)[0] for name in names}
    if include is None and all(folder.is_dir() for folder in folders):
        few = lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)
        if all(name in few.all_subtasks for name in names):
            return few
    return lm_eval.tasks.TaskManager(include_path=None if include is None else str(include))


def _load(manager: Any, name: str, files: Files | None) -> list[Any]:
    try:
        if files is None:
            loaded = manager.load([name])
            groups = loaded.get("groups", {})
            return [groups[name]] if name in groups else list(loaded["tasks"].values())
        if name not in manager.all_subtasks:
            raise DataError(f"files can be given to a single task, got the group {name}. Write its tasks one by one.", name)
        read = _reader(name, files)
        # As the member of a group a task's definition is merged with what is said here.
        local = {"group": "local", "task": [{"task": name, "custom_dataset": read}]}
        return list(manager.load([local])["tasks"].values())
    except ToolkitError:
        raise
    except KeyError as error:
        missing = error.args[0] if error.args else error
        raise DataError(
            f"the data of {name} lacks what the task asks of it, got splits {sorted(files or ())} and no {missing!r}. "
            f"Write data.{name}.{missing}=FILE if that is a split, or another file if it is a column.",
            name,
        ) from error
    except Exception as error:  # the library raises errors of many others: network, hub, file system, templates
        first = str(error).strip().partition("\n")[0][:200]
        raise HarnessError(
            f"the harness cannot load {name} ({type(error).__name__}: {first}). Its data comes from the hub unless a recipe names files. "
            f"Write data.{name}.test=FILE (and train=FILE where it has worked examples)."
        ) from error


def _reader(name: str, files: Files) -> Callable[..., dict[str, Any]]:
    """What the harness calls for the data set of a task."""
    import datasets  # pyright: ignore[reportMissingImports]

    rows = {}
    for split, path in files.items():
        try:
            rows[split] = sources.read(path, (), "the file")
        except ToolkitError as error:
            raise DataError(str(error), name, split) from error

    def local_files(**unused: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(one) for split, one in rows.items()}

    return local_files


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's advice about data sets that are functions, which is none to whoever wrote a path."""
    logger = logging.getLogger("lm_eval.api.task")

    def keep(record: logging.LogRecord) -> bool:
        return "Custom kwargs can be passed" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def require_execution(tasks: Mapping[str, Any], execute: bool) -> None:
    """Raises HarnessError for a task that runs programs and may not, or that would run them outside the sandbox."""
    for name, task in tasks.items():
        if not getattr(task, "UNSAFE_CODE", False):
            continue
        if not execute:
            raise HarnessError(
                f"{name} is graded by running what the model wrote, got execute: false. Programs run in a sandbox, without network and "
                "with limits, but only if you say so. Write execute=true."
            )
        if not _held(task.config.__dict__):
            raise HarnessError(
                f"{name} runs what the model wrote by means of its own, got a task without the metric {CODE}. That would be outside the "
                "sandbox. Leave it out, or run it with lm_eval on a machine that you can lose."
            )
        sandbox.require()


def _held(thing: Any) -> bool:
    """Does a function somewhere in a task's definition have the metric in its module?"""
    if isinstance(thing, Mapping):
        return any(map(_held, thing.values()))
    if isinstance(thing, list | tuple):
        return any(map(_held, thing))
    return any(isinstance(value, CodeMetric) for value in getattr(thing, "__globals__", {}).values())


@dataclass(frozen=True, eq=False)
class HarnessTask(Task):
    """Requests of one task of the harness, all with the same stop strings, as a task of ours: what `fill` measures.

    An answer is graded by the task's own filters and metrics, by itself, as soon as it is there; `scores` in the ledger holds every
    number, and `correct` says whether the first metric under the first filter is 1.
    """

    task: Any
    instances: Mapping[str, Any]  # by problem id
    until: tuple[str, ...]

    def problems(self) -> Sequence[Problem]:
        return [Problem(key, instance.args[0], self._target(instance)) for key, instance in self.instances.items()]

    def _target(self, instance: Any) -> str:
        return str(self.task.doc_to_target(instance.doc))

    def stops(self) -> tuple[str, ...]:
        return self.until

    def extraction(self) -> str:
        filters = ", ".join(one.name for one in self.task._filters)
        return f"by the harness's task {self.task.task_name}: filters {filters}; metrics {', '.join(self.task._metric_fn_list)}"

    def grade(self, problem: Problem, text: str) -> Grade:
        scores = self.scores(self.instances[problem.id], text)
        first = next((value for value in scores.values() if isinstance(value, int | float)), 0.0)
        return Grade(
            correct=first >= 1, steps_right=min(1.0, max(0.0, float(first))), exact=text.strip() == problem.reference.strip(),
            extra={"scores": scores},
        )  # fmt: skip

    def scores(self, instance: Any, text: str) -> dict[str, Any]:
        """What the task says of one answer: "metric,filter" -> value, as in the harness's results."""
        alone = copy.copy(instance)
        alone.resps, alone.filtered_resps = [text], {}
        found: dict[str, Any] = {}
        for one in self.task._filters:
            one.apply([alone])
            metrics = self.task.process_results(instance.doc, [alone.filtered_resps[one.name]])
            found |= {f"{metric},{one.name}": plain(value) for metric, value in metrics.items()}
        return found


def plain(value: Any) -> Any:
    """A metric's value as the ledger keeps it: a number where it is one, text otherwise."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, bool | int | float | str) else repr(value)
