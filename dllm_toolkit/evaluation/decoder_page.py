"""The page docs/decoders.md: every registered method, and what it did in a comparison. Nothing on it is written by hand.

    python -m dllm_toolkit.evaluation.decoder_page runs/compare-all docs/decoders.md [runs/compare-sweep] [--against semi_ar]

What a method is comes from the registry and the catalogue (testing/cases), what it did from the ledgers in the two run directories.
Sentences are made from numbers: a difference is called one only where the 95 % interval of the paired differences excludes zero.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dllm_toolkit import registry
from dllm_toolkit.cache.base import Cache
from dllm_toolkit.citations import BIBLIOGRAPHY, NUMBER, papers_of
from dllm_toolkit.decoders.base import Decoder, Part, Revise
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import curves, ledger
from dllm_toolkit.evaluation.curves import Curve, Point, cache_of
from dllm_toolkit.evaluation.curves import component as _component
from dllm_toolkit.evaluation.ledger import Header, Record, Summary
from dllm_toolkit.evaluation.left_out import LEFT_OUT
from dllm_toolkit.evaluation.pictures import machine, pareto_figure, plural, sweep_figure
from dllm_toolkit.evaluation.report import summaries_of
from dllm_toolkit.evaluation.statistics import Difference, paired

TEMPLATES = frozenset({"block", "denoise"})
"""Registered names that are no method: the template decoder and the default driver."""


@dataclass(frozen=True)
class Run:
    """A comparison: its ledger and the summaries of its rows. against: the row that others are measured by; None: the baseline vanilla."""

    header: Header
    records: Sequence[Record]
    summaries: Sequence[Summary]
    against: str | None = None

    @classmethod
    def read(cls, directory: Path, against: str | None = None) -> Run:
        """The run in `directory`. Raises ToolkitError if there is none, or no row `against`."""
        path = directory / "ledger.jsonl"
        if not path.is_file():
            raise ToolkitError(f"there is no ledger at {path}. Run the comparison first: dllm-toolkit compare RECIPE output={directory}.")
        header, records = ledger.read(path)
        if not records:
            raise ToolkitError(f"{path} holds no whole batch. Run the comparison to its end.")
        summaries = summaries_of(header, records)
        if against is not None and against not in {one.name for one in summaries}:
            names = [one.name for one in summaries]
            raise ToolkitError(f"{path} has no such row, got {against!r}. Methods are measured against it. Write one of {names}.")
        return cls(header, records, summaries, against)

    def configuration(self, name: str) -> Mapping[str, Any]:
        return self.header.recipe["configurations"][name]

    def rows(self, name: str) -> dict[str, Record]:
        """Records of a configuration by problem."""
        return {record.problem: record for record in self.records if record.configuration == name}

    def baseline(self, name: str) -> str | None:
        """The row that a configuration is measured against: the autoregressive one for its own model, else `against`; None for itself."""
        own = {key: self.header.baselines.get(key) for key in ("autoregressive", "vanilla")}
        same = own["autoregressive"] is not None and self.configuration(name)["model"] == self.configuration(own["autoregressive"])["model"]
        found = own["autoregressive"] if same else self.against or own["vanilla"]
        return None if found == name or found not in {summary.name for summary in self.summaries} else found


def page(run: Run, sweep: Run | None, pictures: Mapping[str, str]) -> str:
    """The page as Markdown. pictures: `all` and `sweep`, paths as the page links them."""
    parts = [
        "# Decoders\n\nMade by `python -m dllm_toolkit.evaluation.decoder_page` from the registry and the ledger of a comparison; do not "
        "edit. The words are explained in [DESIGN.md](DESIGN.md).",
        _methods_section(),
        _results_section(run, pictures["all"]),
        _sentences_section(run),
    ]
    if sweep is not None:
        parts.append(_sweep_section(sweep, pictures["sweep"]))
    parts.append(_left_out_section())
    return "\n\n".join(parts) + "\n"


# --- what there is


def _methods_section() -> str:
    rows = [_decoder_row(name) for name in registry.names("decoder") if name not in TEMPLATES]
    drivers = [_driver_row(name) for name in registry.names("driver") if name not in TEMPLATES]
    head = ("name", "what it is", "paper", "components", "caches", "lossless", "revises")
    return "\n\n".join(
        (
            "## Methods",
            "Components: what differs from the template's defaults, with the slot. Caches: those that go with the decoder on some kind of "
            "model; **bold** ones are exact (the logits are those without a cache), the others approximate. Lossless: the text is provably "
            "that of the process it speeds up. Revises: decided tokens may change.",
            _table(head, rows),
            "Drivers compose steps into a generation; every decoder above runs under `denoise`, which is `decode()`.",
            _table(("name", "what it is", "paper", "lossless"), drivers),
            "Caches, and what each asks of a model:",
            _table(("name", "what it is", "paper", "exact", "needs"), [_cache_row(*item) for item in _made_caches().items()]),
        )
    )


def _decoder_row(name: str) -> tuple[str, ...]:
    entry = registry.lookup("decoder", name)
    decoder = _example(entry)
    members = decoder.members() if decoder is not None else []
    revises = any(isinstance(one, Revise) and not one.monotone for one in members)
    lossless = any(getattr(one, "lossless", False) for one in members)
    caches = "" if decoder is None else ", ".join(_caches(decoder))
    return (f"`{name}`", _first_line(entry), _links(papers_of(entry)), _components(decoder), caches, _yes(lossless), _yes(revises))


def _driver_row(name: str) -> tuple[str, ...]:
    entry = registry.lookup("driver", name)
    return f"`{name}`", _first_line(entry), _links(papers_of(entry)), _yes(entry.lossless)


def _example(entry: Any) -> Decoder | None:
    """A decoder as the catalogue makes it, or else without arguments; None for one that needs some and is not in the catalogue."""
    from dllm_toolkit.testing import cases

    for case in cases.DECODERS:
        if case.maker is entry:
            return case.build()
    required = [one for one in inspect.signature(entry).parameters.values() if one.default is one.empty]
    return None if required else entry()


def _components(decoder: Decoder | None) -> str:
    """`slot: rule` of every part that is not the template's default, rules inside rules in parentheses."""
    if decoder is None or not is_dataclass(decoder):
        return ""
    found = []
    for item in fields(decoder):
        value = getattr(decoder, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if isinstance(value, Part | Decoder) and type(value) is not type(default):
            found.append(f"{item.name}: {_rule(value)}")
    return "; ".join(found)


def _rule(part: Part | Decoder) -> str:
    inner = [_rule(value) for value in vars(part).values() if isinstance(value, Part | Decoder)]
    return f"`{registry.name_of(part) or type(part).__name__}`" + (f" ({', '.join(inner)})" if inner else "")


def _caches(decoder: Decoder) -> list[str]:
    from dllm_toolkit.testing import contract

    toys = contract.toys()
    return [_cache_name(name) for name, cache in _made_caches().items() if any(contract.fits(decoder, cache, toy) is None for toy in toys)]


def _made_caches() -> dict[str, Cache]:
    """A cache of every registered name, as the catalogue makes it: what a cache is may depend on what it is made of."""
    from dllm_toolkit.testing import cases

    makers = {name: registry.lookup("cache", name) for name in registry.names("cache")}
    built = {case.maker: case.build for case in reversed(cases.CACHES)}
    return {name: built[maker]() if maker in built else maker() for name, maker in makers.items()}


def _cache_name(name: str) -> str:
    """In bold if the cache is exact."""
    made = _made_caches()
    return f"**{name}**" if name in made and made[name].exact else name


def _cache_row(name: str, cache: Cache) -> tuple[str, ...]:
    needs = ", ".join(need.value for need in sorted(cache.needs, key=lambda need: need.name))
    entry = registry.lookup("cache", name)
    return f"`{name}`", _first_line(entry), _links(papers_of(entry)), _yes(cache.exact), needs


def _links(numbers: Sequence[str]) -> str:
    titles = {number: BIBLIOGRAPHY[number].title if number in BIBLIOGRAPHY else number for number in numbers}
    linked = [f"[{title}](https://arxiv.org/abs/{key})" if NUMBER.fullmatch(key) else title for key, title in titles.items()]
    return "<br>".join(linked)


# --- what they did


def _results_section(run: Run, picture: str) -> str:
    header, count = run.header, max(summary.problems for summary in run.summaries)
    baselines = [name for name in (header.baselines.get("autoregressive"), header.baselines.get("vanilla")) if name]
    head = (
        "",
        "configuration",
        "decoder",
        "cache",
        "accuracy, 95 % interval",
        "exact",
        "tokens/forward",
        "forwards",
        "lanes",
        "tokens/s",
        *(f"x {name}" for name in baselines),
    )
    rows = []
    for number, summary in enumerate(run.summaries, 1):
        configuration = run.configuration(summary.name)
        speed = {header.baselines.get("autoregressive"): summary.speedup_vs_ar, header.baselines.get("vanilla"): summary.speedup_vs_vanilla}
        rows.append(
            (
                str(number),
                f"`{summary.name}`",
                _decoder_of(configuration),
                _cache_name(cache_of(configuration)),
                f"{_percent(summary.accuracy)} ({_percent(summary.accuracy_low)} to {_percent(summary.accuracy_high)})",
                _percent(summary.exact),
                f"{summary.tokens_per_forward:.2f}",
                f"{summary.nfe:.1f}",
                f"{summary.lanes:.0f}",
                f"{summary.tokens_per_second:,.1f}",
                *("" if speed[name] is None else f"{speed[name]:.2f}" for name in baselines),
            )
        )
    made = f"{plural(count, 'problem')} of {_component(header.recipe['task'])}, batch {header.batch_size}, {machine(header)}"
    version = f", commit {header.commit}" if header.commit else ""
    return "\n\n".join(
        (
            "## Results",
            f"{made}; recipe {header.recipe_hash}{version}. Definitions: {'; '.join(header.counting)}.",
            _table(head, rows),
            f"![Accuracy against tokens per second and against tokens per forward; numbers are those of the table]({picture})",
        )
    )


def _sentences_section(run: Run) -> str:
    """One sentence a configuration, and the groups that the sentences fall into."""
    groups: dict[str, list[str]] = {title: [] for title in _GROUPS}
    lines = []
    for summary in run.summaries:
        baseline = run.baseline(summary.name)
        if baseline is None:
            continue
        group, line = _sentence(run, summary, baseline)
        groups[group].append(f"`{summary.name}`")
        lines.append(f"- {line}")
    if not lines:
        return "## What helps here\n\nThe comparison names no baseline to measure against."
    overview = [f"- **{title}** ({len(names)}): {', '.join(names)}." for title, names in groups.items() if names]
    return "\n\n".join(("## What helps here", "\n".join(overview), *_unlike(run), "\n".join(lines)))


_GROUPS = (
    "Fewer forwards, accuracy and exact solutions kept or raised",
    "Fewer forwards, accuracy kept, fewer exact solutions",
    "Fewer forwards, lower accuracy",
    "As many forwards or more",
)


def _sentence(run: Run, summary: Summary, baseline: str) -> tuple[str, str]:
    mine, theirs = run.rows(summary.name), run.rows(baseline)
    common = [problem for problem in theirs if problem in mine]
    accuracy = paired([mine[problem].correct for problem in common], [theirs[problem].correct for problem in common])
    exact = paired([mine[problem].exact for problem in common], [theirs[problem].exact for problem in common])
    before = next(one for one in run.summaries if one.name == baseline)
    forwards = before.nfe / summary.nfe if summary.nfe else 0.0
    rate = summary.tokens_per_second / before.tokens_per_second if before.tokens_per_second else 0.0
    lanes = before.lanes / summary.lanes if summary.lanes else 0.0
    line = (
        f"`{summary.name}` {_clause(accuracy, 'accuracy')} and {_clause(exact, 'exact solutions')} against `{baseline}`, "
        f"with {_times(forwards, 'forwards')} and {_times(lanes, 'lanes')}, at {rate:.2f} times its tokens per second."
    )
    if forwards <= 1.0:
        return _GROUPS[3], line
    if accuracy.verdict == "lowers":
        return _GROUPS[2], line
    return _GROUPS[1] if exact.verdict == "lowers" else _GROUPS[0], line


def _clause(difference: Difference, what: str) -> str:
    if difference.low == difference.high == 0:
        return f"keeps {what} (no problem differs)"
    zero = "includes" if difference.verdict == "keeps" else "excludes"
    size = f"{100 * difference.mean:+.1f} points, interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f} {zero} zero"
    return f"{difference.verdict} {what} ({size})"


def _times(ratio: float, what: str) -> str:
    return f"{ratio:.2f} times fewer {what}" if ratio >= 1 else f"{1 / ratio:.2f} times as many {what}" if ratio else f"no {what}"


def _unlike(run: Run) -> tuple[str, ...]:
    """How far this task tells methods apart, if it does not."""
    kept = total = 0
    for summary in run.summaries:
        baseline = run.baseline(summary.name)
        if baseline is None:
            continue
        mine, theirs = run.rows(summary.name), run.rows(baseline)
        common = [problem for problem in theirs if problem in mine]
        total += 1
        kept += paired([mine[one].correct for one in common], [theirs[one].correct for one in common]).verdict == "keeps"
    if not total or kept < total / 2:
        return ()
    where = "the intervals of the differences include zero"
    return (f"Accuracy does not tell {kept} of these {total} configurations from their baselines: {where}.",)


# --- sweeps


def curves_of(run: Run) -> list[Curve]:
    """The sweeps of a run as curves."""
    points = [Point(summary, run.configuration(summary.name), run.configuration(summary.name)["model"]) for summary in run.summaries]
    return curves.curves_of(points)


def _sweep_section(run: Run, picture: str) -> str:
    found = curves_of(run)
    single = [summary for summary in run.summaries if all(summary not in curve.summaries for curve in found)]
    rows = []
    for area in curves.areas(found, run.summaries):
        points = ", ".join(
            f"{setting}: {one.tokens_per_forward:.2f} at {_percent(one.accuracy)} ({_percent(one.exact)})"
            for setting, one in zip(area.curve.settings, area.curve.summaries, strict=True)
        )
        rows.append((area.curve.name, points, f"{area.accuracy:.0f}", f"{area.exact:.0f}"))
    best = {what: max(100 * getattr(summary, what) for summary in run.summaries) for what in ("accuracy", "exact")}
    count = max(summary.problems for summary in run.summaries)
    others = ", ".join(f"`{one.name}` {one.tokens_per_forward:.2f} at {_percent(one.accuracy)} ({_percent(one.exact)})" for one in single)
    return "\n\n".join(
        (
            "## Threshold sweeps",
            f"{plural(count, 'problem')}, {machine(run.header)}; recipe {run.header.recipe_hash}. "
            "A point is tokens per forward at accuracy (exact solutions). AUP, area under parallelism "
            f"({_links(('2601.07568',))}): alpha 3, points more than 5 below a curve's first one left out, y_max the best of this pool: "
            f"{best['accuracy']:.1f} % accuracy, {best['exact']:.1f} % exact solutions. "
            "A curve that reaches further right has more area even where its accuracy falls, so look at the picture as well.",
            _table(("curve", "points", "AUP, accuracy", "AUP, exact"), rows),
            *((f"Single points: {others}.",) if others else ()),
            f"![Accuracy and exact solutions against tokens per forward, a line for each sweep]({picture})",
        )
    )


# --- what is not there


def _left_out_section() -> str:
    known = {name for kind in registry.kinds() for name in registry.names(kind)}
    rows = [(one.name, _links(one.papers), one.reason) for one in LEFT_OUT if not known & set(one.unless)]
    return "\n\n".join(("## Left out", _table(("method", "paper", "why"), rows)))


# --- words


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _decoder_of(configuration: Mapping[str, Any]) -> str:
    decoder, driver = _component(configuration["decoder"]), configuration.get("driver")
    return f"`{decoder}`" if driver is None else f"`{decoder}` under `{_component(driver)}`"


def _first_line(entry: Any) -> str:
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _yes(value: bool) -> str:
    return "yes" if value else ""


def main(arguments: Sequence[str]) -> int:
    """Write the page, and its pictures beside it."""
    arguments, against = list(arguments), None
    if "--against" in arguments[:-1]:
        place = arguments.index("--against")
        against = arguments[place + 1]
        del arguments[place : place + 2]
    if not 2 <= len(arguments) <= 3:
        print("usage: python -m dllm_toolkit.evaluation.decoder_page RUN PAGE.md [SWEEP_RUN] [--against ROW]", file=sys.stderr)
        return 2
    target = Path(arguments[1])
    try:
        run = Run.read(Path(arguments[0]), against)
        sweep = Run.read(Path(arguments[2])) if len(arguments) == 3 else None
        names = {"all": f"{target.stem}.png", "sweep": f"{target.stem}_sweep.png"}
        text = page(run, sweep, names)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    pareto_figure(run.summaries, legend=False).savefig(target.with_name(names["all"]), dpi=150, metadata={"Software": None})
    if sweep is not None:
        sweep_figure(curves_of(sweep), sweep.summaries).savefig(target.with_name(names["sweep"]), dpi=150, metadata={"Software": None})
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
