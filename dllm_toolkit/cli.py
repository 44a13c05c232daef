"""The `dllm-toolkit` command: compare, harness, report, generate, watch, train, ... Long because the arguments of all of them are here.

Results go to stdout; progress and messages go to stderr. Exit codes: 0 done; 1 a check failed; 2 the input
is wrong (one message, nothing written); 130 interrupted. Each command imports what it needs when it runs, so
that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dllm_toolkit import __version__
from dllm_toolkit.errors import SaidElsewhere, ToolkitError

# In the order in which `check` looks for a name that several kinds use.
_CHECKABLE = ("decoder", "cache", "schedule", "propose", "commit", "revise", "stop", "driver")
_RESUMABLE = ("compare", "harness", "train")
_OVERRIDES = "change a value of the recipe: key=value, with dots for nested keys (decoder.threshold=0.8)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    command = ""
    try:
        arguments = _parse(argv)
        command = arguments.command
        return arguments.run(arguments)
    except SystemExit as leave:
        # Lightning turns Ctrl-C into SystemExit.
        if isinstance(leave.__context__, KeyboardInterrupt):
            return _interrupted(command)
        return leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    except KeyboardInterrupt:
        return _interrupted(command)
    except BrokenPipeError:  # `dllm-toolkit list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SaidElsewhere:
        return 2
    except ToolkitError as problem:
        print(problem, file=sys.stderr)
        return 2
    except OSError as problem:
        if problem.filename is None:
            raise
        print(f"{problem.filename}: {problem.strerror}. Check the path and its permissions.", file=sys.stderr)
        return 2


def _interrupted(command: str) -> int:
    again = " Run the same command again to continue where it stopped." if command in _RESUMABLE else ""
    print(f"\nInterrupted.{again}", file=sys.stderr)
    return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dllm-toolkit",
        description="Decode, compare and train diffusion language models, from recipes (YAML files).",
        epilog="start here:\n  dllm-toolkit compare recipes/quickstart.yaml\n  dllm-toolkit doctor\n\n"
        "`dllm-toolkit COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dllm-toolkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], short: str, long: str, *examples: str) -> Any:
        lines = "\n".join(f"  dllm-toolkit {example}" for example in examples)
        command = commands.add_parser(
            name,
            help=short,
            description=f"{short[0].upper()}{short[1:]}.\n\n{long}",
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    def takes_recipe(command: Any) -> None:
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        command.add_argument("overrides", metavar="a.b=c", nargs="*", default=[], help=_OVERRIDES)

    compare = add(
        "compare",
        _compare,
        "run several decoders on the same problems and compare accuracy and speed",
        "Runs every configuration of the recipe, prints a table, and writes a ledger (one line a\n"
        "problem), TensorBoard files and an HTML report into the recipe's output directory. The last\n"
        "line on stdout is one JSON object. A run that was stopped continues when the same command\n"
        "is given again. A value written {_sweep_: [0.7, 0.9]} makes a configuration of each.",
        "compare recipes/quickstart.yaml",
        "compare recipes/quickstart.yaml task.size=8 output=runs/small",
        "compare recipes/compare/sweep.yaml --dry-run",
        "compare recipes/quickstart.yaml run.device=cuda     # on 8 GPUs: torchrun --nproc_per_node 8 -m dllm_toolkit compare ...",
    )
    takes_recipe(compare)
    compare.add_argument("--dry-run", action="store_true", help="check everything, say what it will cost, and stop")
    harness = add(
        "harness",
        _harness,
        "run a model on tasks of the evaluation harness (lm_eval)",
        "Prompts, stop strings and metrics are the harness's; model, decoder, cache and batches are the recipe's. Prints\n"
        "the harness's table and ours, and writes results.json and a ledger into the recipe's output directory. A run\n"
        "that was stopped continues when the same command is given again. Needs: pip install 'dllm-toolkit[harness]'.",
        "harness recipes/eval/harness.yaml --tasks gsm8k data.gsm8k.train=train.jsonl data.gsm8k.test=test.jsonl",
        "harness recipes/eval/harness.yaml --tasks humaneval execute=true size=20",
    )
    takes_recipe(harness)
    harness.add_argument("--tasks", metavar="NAME,NAME", help="the harness's own names; instead of the recipe's `tasks`")
    reporting = add(
        "report",
        _report,
        "join runs into one table, with intervals and tests",
        "A row a configuration of every run (folders of compare, sweeps and harness): 95 % intervals, tests against a\n"
        "baseline on the same problems, sweeps as curves with their AUP. Runs that were counted differently are\n"
        "refused, with the fields that differ and what to do.",
        "report runs/quickstart runs/mine",
        "report runs/compare-sweep --baseline vanilla --rows 'd2f*' --rows vanilla",
        "report runs/one runs/eight --vary run.batch_size --out batches.html --tensorboard runs/batches",
    )
    reporting.add_argument("runs", metavar="RUN", nargs="+", help="a folder that compare or harness wrote, or a ledger.jsonl")
    reporting.add_argument(
        "--format", choices=("terminal", "markdown", "csv", "json", "html"), help="default: by the suffix of --out, else terminal"
    )
    reporting.add_argument("--out", metavar="FILE", help="write the report there instead of to stdout")
    reporting.add_argument(
        "--baseline", metavar="NAME", help="the row to test against; default: the run's own baseline, else the first row"
    )
    reporting.add_argument(
        "--rows", metavar="NAME", action="append", default=[], help="only these rows; * stands for anything; can be repeated"
    )
    reporting.add_argument("--shared-problems", action="store_true", help="compare the problems that all rows hold, though some hold more")
    reporting.add_argument(
        "--drop-incomparable",
        action="store_true",
        help="leave out columns that were counted differently, where others are still comparable",
    )
    reporting.add_argument(
        "--vary",
        metavar="FIELD",
        action="append",
        default=[],
        help="a field that the runs vary on purpose, such as run.batch_size; a column",
    )
    reporting.add_argument("--tensorboard", metavar="DIR", help="also write TensorBoard files: all rows in one hparams view")
    generate = add(
        "generate",
        _generate,
        "answer a prompt with a model and a decoder",
        "Prints the answer on stdout, and how it was decoded on stderr. --trace shows the text after\n"
        "each step, with _ for what is not decided yet. A model without a tokenizer takes\n"
        "prompt_ids=[1,2,3] and answers with ids.",
        "generate recipes/decode/d2f_stories.yaml --trace \\\n"
        '      prompt="Noah brings 32 magnets from home. Nora has 3 times as many magnets as Noah. '
        'What is the difference between Nora and Noah now?"',
        'generate recipes/decode/d2f_llada.yaml model.path=checkpoints/LLaDA-8B-Instruct prompt="Hello"',
    )
    takes_recipe(generate)
    generate.add_argument("--trace", action="store_true", help="show the text after every step, on stderr")
    watch = add(
        "watch",
        _watch,
        "watch an answer being decoded, step by step",
        "Shows every step in the terminal: blocks, what was committed, how sure the model was, what was\n"
        "changed or taken back. RECIPE is one of compare (its configurations on one problem of its task)\n"
        "or of generate (its prompt), or a file that --json wrote. --html writes one page that needs no\n"
        "network, with a slider and the decoders side by side.",
        "watch recipes/quickstart.yaml --decoder d2f --decoder fast_dllm",
        "watch recipes/quickstart.yaml --problem 3 --speed 0 --html trace.html --gif trace.gif",
        "watch recipes/decode/d2f_llada.yaml prompt='Hello' --json trace.json",
        "watch trace.json --html trace.html",
    )
    takes_recipe(watch)
    watch.add_argument("--problem", metavar="N", help="number of the problem or prompt, from 0, or a problem's id; default: 0")
    watch.add_argument("--decoder", metavar="NAME", action="append", default=[], help="only this configuration; may be given again")
    watch.add_argument("--speed", metavar="X", type=float, default=5.0, help="steps a second on a terminal; 0: no pauses; default: 5")
    for kind, what in (("html", "a page"), ("gif", "an animation"), ("json", "the trace as data")):
        watch.add_argument(f"--{kind}", metavar="FILE", type=Path, help=f"write {what}")
    takes_recipe(
        add(
            "train",
            _train,
            "train a model or an adapter",
            "Writes checkpoints and TensorBoard files into the recipe's output directory, and at the end\n"
            "the weights with a card. A run that was stopped continues when the same command is given again.",
            "train recipes/train/teacher.yaml",
            "train recipes/train/teacher.yaml trainer.max_steps=20 trainer.max_minutes=null trainer.precision=32-true \\\n"
            "      data.size=2000 data.heldout=64 data.batch_size=16 output=runs/try export=null   # try it on a laptop",
        )
    )
    listing = add(
        "list",
        _list,
        "show the names that a recipe can use: decoders, caches, models and more",
        "One line for each name: kind, name, what it is, and the paper it comes from.",
        "list",
        "list decoder",
    )
    listing.add_argument("kind", metavar="KIND", nargs="?", help="only this kind, such as decoder or cache")
    takes_recipe(
        add(
            "show",
            _show,
            "spell out a recipe without running it",
            "Checks the recipe, then prints each decoder's step as text, the task's first prompt with its stop\n"
            "strings and its rule of grading, the recipe with its base and its overrides resolved, and its\n"
            "hash. Loads no model.",
            "show recipes/quickstart.yaml",
            "show recipes/quickstart.yaml configurations.d2f.decoder.threshold=0.8",
        )
    )
    takes_recipe(
        add(
            "cite",
            _cite,
            "print BibTeX for everything that a recipe uses",
            "The toolkit's own entry, then one for each paper behind the recipe's decoders, their parts,\n"
            "caches, drivers, models and objectives, under a comment that says for what. Loads no model.",
            "cite recipes/quickstart.yaml > paper.bib",
        )
    )
    check = add(
        "check",
        _check,
        "test your own decoder, cache or rule against the contract",
        "Runs the contract (fills the canvas, keeps the prompt, rows independent, counts right, ...) on\n"
        "tiny models, in seconds. Exit code 1 if a check fails. NAME is a registered name or a dotted\n"
        "path; a file my_rule.py in the current directory needs no installation.",
        "check my_rule.EntropySpend budget=0.5",
        "check d2f block_length=4 threshold=0.7",
    )
    check.add_argument("name", metavar="NAME", help="a registered name, or a dotted path to your class")
    check.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="arguments of the class")
    golden = add(
        "golden",
        _golden,
        "replay recorded decodes of the official implementations",
        "Decodes every case of a directory in this format with this package and compares token ids,\n"
        "number of forwards, commit order and query lengths, and logits within their tolerance. A row a\n"
        "file; the last line is one JSON object. Exit code 1 if a case differs.",
        "golden",
        "golden tests/golden/vectors",
    )
    golden.add_argument("directory", metavar="DIR", nargs="?", help="a directory with cases/ and the checkpoints; default: the shipped one")
    doctor = add(
        "doctor",
        _doctor,
        "say what this machine has, which checkpoints are in reach, and whether they fit",
        "Versions, devices and memory, the checkpoints that ship, lie in checkpoints/ or in the hub's\n"
        "cache, and the line to type next. Loads no weights and leaves the network alone. Exit code 1 if\n"
        "something that was asked for is not usable.",
        "doctor",
        "doctor checkpoints/LLaDA-8B-Instruct",
        "doctor Dream-org/Dream-v0-Instruct-7B --online",
    )
    doctor.add_argument("checkpoints", metavar="PATH_OR_ID", nargs="*", help="a directory, a hub id, a .gguf file or asset:NAME")
    doctor.add_argument("--online", action="store_true", help="also ask the hub whether it answers")

    arguments, rest = parser.parse_known_args(argv)
    # argparse ends a list of positionals at the first option: `generate x.yaml --trace prompt=...`.
    repeated = next((name for name in ("overrides", "runs") if hasattr(arguments, name)), None)
    if rest and (repeated is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and repeated is not None:
        setattr(arguments, repeated, [*getattr(arguments, repeated), *rest])
    return arguments


def _compare(arguments: argparse.Namespace) -> int:
    from dllm_toolkit.evaluation.compare import CompareRecipe, run_comparison

    recipe = _load(arguments, CompareRecipe)
    run_comparison(recipe, recipe.build(CompareRecipe), dry_run=arguments.dry_run)
    return 0


def _harness(arguments: argparse.Namespace) -> int:
    from dllm_toolkit.evaluation.harness import HarnessRecipe, run_harness
    from dllm_toolkit.evaluation.processes import require_alone

    require_alone("harness")
    if arguments.tasks is not None:
        arguments.overrides = [*arguments.overrides, f"tasks=[{arguments.tasks}]"]
    recipe = _load(arguments, HarnessRecipe)
    run_harness(recipe, recipe.build(HarnessRecipe))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from dllm_toolkit.evaluation.joined_report import ReportRequest, run_report

    run_report(
        ReportRequest(
            runs=[Path(run) for run in arguments.runs],
            form=arguments.format,
            out=None if arguments.out is None else Path(arguments.out),
            baseline=arguments.baseline,
            rows=arguments.rows,
            shared_problems=arguments.shared_problems,
            drop_incomparable=arguments.drop_incomparable,
            vary=arguments.vary,
            tensorboard=None if arguments.tensorboard is None else Path(arguments.tensorboard),
        )
    )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from dllm_toolkit.generate import GenerateRecipe, run_generation

    recipe = _load(arguments, GenerateRecipe)
    run_generation(recipe, recipe.build(GenerateRecipe), trace=arguments.trace)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from dllm_toolkit import recipe
    from dllm_toolkit.evaluation.watch import WatchOptions, replay, run_watch

    options = WatchOptions(
        problem=arguments.problem or "0",
        decoders=tuple(arguments.decoder),
        speed=arguments.speed,
        html=arguments.html,
        gif=arguments.gif,
        json=arguments.json,
    )
    if arguments.recipe.endswith(".json"):
        if arguments.overrides or arguments.problem is not None:
            raise ToolkitError(
                f"{arguments.recipe} is a trace of what was decoded, got {' '.join(arguments.overrides) or '--problem'} to change it. "
                "Write the recipe instead to decode anew."
            )
        replay(Path(arguments.recipe), options)
        return 0
    loaded = recipe.load(arguments.recipe, arguments.overrides)
    root = _root_of(loaded.tree)
    loaded = loaded.checked(root)
    run_watch(loaded, loaded.build(root), options)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    _require_lightning("training")
    from dllm_toolkit import recipe
    from dllm_toolkit.evaluation.processes import require_alone
    from dllm_toolkit.training.filter import FilterRecipe, run_filter_training
    from dllm_toolkit.training.reinforce import PolicyRecipe, run_policy_training
    from dllm_toolkit.training.run import TrainRecipe, run_training

    loaded = recipe.load(arguments.recipe, arguments.overrides)
    if "filter" in loaded.tree or "policy" in loaded.tree:
        require_alone("training a filter" if "filter" in loaded.tree else "training on rewards")
    if "filter" in loaded.tree:
        loaded = loaded.checked(FilterRecipe)
        run_filter_training(loaded, loaded.build(FilterRecipe))
    elif "policy" in loaded.tree:
        loaded = loaded.checked(PolicyRecipe)
        run_policy_training(loaded, loaded.build(PolicyRecipe))
    else:
        loaded = loaded.checked(TrainRecipe)
        run_training(loaded, loaded.build(TrainRecipe))
    return 0


def _load(arguments: argparse.Namespace, root: type) -> Any:
    from dllm_toolkit import recipe

    return recipe.load(arguments.recipe, arguments.overrides).checked(root)


def _require_lightning(what: str) -> None:
    if importlib.util.find_spec("lightning") is None:
        raise ToolkitError(f"{what} needs lightning, which is not installed. Write: pip install lightning.")


def _list(arguments: argparse.Namespace) -> int:
    from dllm_toolkit import registry
    from dllm_toolkit.citations import papers_of

    if arguments.kind is not None and arguments.kind not in registry.kinds():
        known = ", ".join(registry.kinds())
        raise ToolkitError(f"there is no kind {arguments.kind!r}. Write one of: {known}.")
    wanted = [arguments.kind] if arguments.kind else registry.kinds()
    rows = []
    for kind in wanted:
        for name in registry.names(kind):
            entry = registry.lookup(kind, name)
            rows.append((kind, name, _first_line(entry), ", ".join(papers_of(entry))))
    _print_table(("kind", "name", "what it is", "paper"), rows)
    return 0


def _first_line(entry: Any) -> str:
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; on a terminal the documentation is cut to the width, in a file it is whole."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    if sys.stdout.isatty():
        free = shutil.get_terminal_size().columns - sum(widths) + widths[2] - 2 * (len(widths) - 1)
        widths[2] = max(20, min(widths[2], free))
    for row in [header, *rows]:
        cells = [cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(row, widths, strict=True)]
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip())


def _show(arguments: argparse.Namespace) -> int:
    from dllm_toolkit import recipe

    loaded = recipe.load(arguments.recipe, arguments.overrides)
    root = _root_of(loaded.tree)
    loaded = loaded.checked(root)
    built = loaded.build(root)
    print(recipe.describe(built))
    task = getattr(built, "task", None)
    if task is not None:
        print(f"\n# the task\n{task.describe()}")
    print(f"\n# resolved recipe, hash {loaded.hash()}\n{loaded.to_yaml()}", end="")
    return 0


def _cite(arguments: argparse.Namespace) -> int:
    from dllm_toolkit import citations, recipe

    loaded = recipe.load(arguments.recipe, arguments.overrides)
    root = _root_of(loaded.tree)
    loaded = loaded.checked(root)
    papers = citations.papers_in(loaded.tree, root, loaded.build(root))
    print(citations.bibliography(papers))
    unknown = set(papers) - set(citations.BIBLIOGRAPHY)
    if unknown:
        print(f"note: no title is known for {', '.join(sorted(unknown))}; their entries hold no more than that", file=sys.stderr)
    return 0


def _root_of(tree: dict[str, Any]) -> type:
    """The command's dataclass that a recipe is written for, by its keys."""
    if "configurations" in tree or "models" in tree:
        from dllm_toolkit.evaluation.compare import CompareRecipe

        return CompareRecipe
    if "tasks" in tree:
        from dllm_toolkit.evaluation.harness import HarnessRecipe

        return HarnessRecipe
    if "objective" in tree or "trainer" in tree or "filter" in tree or "policy" in tree:
        _require_lightning("a training recipe")
        from dllm_toolkit.training.filter import FilterRecipe
        from dllm_toolkit.training.reinforce import PolicyRecipe
        from dllm_toolkit.training.run import TrainRecipe

        return FilterRecipe if "filter" in tree else PolicyRecipe if "policy" in tree else TrainRecipe
    from dllm_toolkit.generate import GenerateRecipe

    return GenerateRecipe


def _check(arguments: argparse.Namespace) -> int:
    from dllm_toolkit import recipe, registry
    from dllm_toolkit.recipe_errors import OVERRIDE, Mark
    from dllm_toolkit.yaml_marks import Node

    kind = _kind_of(arguments.name)
    named = Node(arguments.name, Mark(OVERRIDE, None, arguments.name))
    component = recipe.build(recipe.override(named, arguments.overrides), registry.base_of(kind))
    from dllm_toolkit.testing.contract import check_component

    print(f"checking the {kind}:\n{recipe.describe(component)}\n", file=sys.stderr)
    groups: dict[str, list[Any]] = {}
    for result in check_component(component):  # a result is named `check [model, cache, decoder]`
        groups.setdefault(result.name.partition(" ")[0], []).append(result)
    faulty = 0
    for name, results in groups.items():
        failed = [result for result in results if not result.passed]
        faulty += bool(failed)
        share = f"{len(results) - len(failed)}/{len(results)}"
        if not failed:
            print(f"pass  {share:>7}  {name}: {results[0].message}")
            continue
        print(f"FAIL  {share:>7}  {name}")
        for result in failed[:3]:
            print(f"{'':15}{result.name.partition(' ')[2]} {result.message}")
    print(f"{len(groups) - faulty} of {len(groups)} checks passed on every combination of model and cache")
    return 1 if faulty else 0


def _golden(arguments: argparse.Namespace) -> int:
    from dllm_toolkit.testing import golden

    return golden.main(Path(arguments.directory) if arguments.directory else None)


def _doctor(arguments: argparse.Namespace) -> int:
    from dllm_toolkit.doctor import run_doctor

    return run_doctor(arguments.checkpoints, online=arguments.online)


def _kind_of(name: str) -> str:
    """The first kind that has something of this name."""
    from dllm_toolkit import registry

    problems = []
    for kind in _CHECKABLE:
        try:
            registry.lookup(kind, name)
        except registry.UnknownName as problem:
            problems.append(problem)
        else:
            return kind
    # The same complaint in each kind's words; one that has a suggestion helps most.
    raise next((problem for problem in problems if problem.suggestions), problems[0])
