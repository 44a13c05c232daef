"""A ledger as TensorBoard event files: a run a configuration (scalars, hparams, curves) and one run for the comparison (pictures, text).

`decided` is a curve over steps, so that the shape of a decode, not only its total, can be compared. A sweep is one view of hparams, with
parallel coordinates: every run declares the settings and the numbers of all of them. A report of several runs is written the same way.

`order` says how far from left to right tokens were decided: AR-ness as curves over k (DiffuCoder, arXiv 2506.20639), and a picture of every
token of every problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation.ledger import Header, Record, Summary
from dllm_toolkit.evaluation.order import commits_per_step, order_curves
from dllm_toolkit.evaluation.pictures import order_figure, order_map_figure, pareto_figure

if TYPE_CHECKING:
    from dllm_toolkit.evaluation.joined import Joined

_SCALARS = (
    "accuracy",
    "steps_right",
    "exact",
    "tokens_per_second",
    "tokens_per_forward",
    "nfe",
    "latency",
    "lanes",
    "forced_share",
    "order_local",
    "order_global",
    "speedup_vs_ar",
    "speedup_vs_vanilla",
    "diversity",
    "perplexity",
)
MARKER = "report.json"
"""Says that a folder of event files is a report's, which may be replaced."""


def write_tensorboard(directory: Path, header: Header, records: Sequence[Record], summaries: Sequence[Summary]) -> None:
    """Write event files under `directory`, one folder a configuration and `comparison`. What an earlier report left is replaced."""
    from torch.utils.tensorboard import SummaryWriter

    for stale in sorted(directory.glob("*/events.out.tfevents.*")):
        stale.unlink()
    configurations = header.recipe.get("configurations", {})
    settings = {summary.name: hyperparameters(configurations.get(summary.name, {})) for summary in summaries}
    numbers = {summary.name: _numbers(summary) for summary in summaries}
    for summary in summaries:
        with SummaryWriter(str(directory / summary.name)) as writer:
            _row(writer, summary.name, settings, numbers)
            rows = [record for record in records if record.configuration == summary.name]
            for step, decided in enumerate(decided_curve(rows)):
                writer.add_scalar("decided/share of the answer after this many steps", decided, step)
            local, whole = order_curves([record.born[: record.tokens] for record in rows])
            for k, (near, far) in enumerate(zip(local, whole, strict=True), start=1):
                writer.add_scalar("order/local AR-ness at k", near, k)
                writer.add_scalar("order/global AR-ness at k", far, k)
            if rows:
                writer.add_figure("order/step of each token, by problem", order_map_figure(rows))
    with SummaryWriter(str(directory / "comparison")) as writer:
        writer.add_figure("pareto", pareto_figure(summaries))
        for record_group in by_problem(records)[:3]:
            writer.add_figure(f"commit order/{record_group[0].problem}", order_figure(record_group))
            writer.add_text(f"decoded/{record_group[0].problem}", _text(record_group))
        writer.add_text("counting", "\n".join(f"- {rule}" for rule in header.counting))


def write_joined(directory: Path, joined: Joined) -> None:
    """Write a report of several runs: a folder a row, all in one view of hparams, and `comparison` with the Pareto picture.

    Raises ToolkitError for a folder that holds something else: event files of a training would be mixed into the view.
    """
    from torch.utils.tensorboard import SummaryWriter

    from dllm_toolkit.evaluation.joined import settings_columns
    from dllm_toolkit.evaluation.joined_text import json_text

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir()) and not (directory / MARKER).is_file()):
        raise ToolkitError(f"--tensorboard {directory} holds something else already. A report has a folder of its own. Write another name.")
    directory.mkdir(parents=True, exist_ok=True)
    for stale in sorted(directory.rglob("events.out.tfevents.*")):
        stale.unlink()
    (directory / MARKER).write_text(json_text(joined), encoding="utf-8")
    settings, kept = settings_columns(joined), {measure.key for measure in joined.measures}
    numbers = {}
    for row in joined.rows:
        numbers[row.name] = {key: value for key, value in _numbers(row.summary).items() if key.partition("/")[2] in kept}
        times = joined.speed_up(row)
        numbers[row.name] |= {} if times is None else {"comparison/speed_up": times}
    for row in joined.rows:
        with SummaryWriter(str(directory / row.name)) as writer:
            _row(writer, row.name, settings, numbers)
    if joined.front("tokens_per_forward") and joined.front("tokens_per_second"):
        with SummaryWriter(str(directory / "comparison")) as writer:
            writer.add_figure("pareto", pareto_figure([row.summary for row in joined.rows]))


def _numbers(summary: Summary) -> dict[str, float]:
    return {f"comparison/{name}": float(value) for name in _SCALARS if (value := getattr(summary, name)) is not None}


def _row(writer: Any, name: str, settings: Mapping[str, Mapping[str, Any]], numbers: Mapping[str, Mapping[str, float]]) -> None:
    """Scalars and hparams of one row among all.

    TensorBoard shows the columns that the first run it reads declares, so each declares those of all. Its parallel coordinates leave out a
    run that lacks one of the columns, so none does: only numbers that all rows have are columns, and a setting that a row has not is `-`.
    """
    from torch.utils.tensorboard.summary import hparams

    for key, value in numbers[name].items():
        writer.add_scalar(key, value)
    columns = _columns(settings)
    shared = {key: value for key, value in numbers[name].items() if all(key in own for own in numbers.values())}
    # `add_hparams` would open a sub-run of its own; the three summaries behind it belong into this run.
    for piece in hparams(columns[name], shared):
        writer.file_writer.add_summary(piece)


def _columns(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each row every setting that one of them has. A column is numbers, yes or no, or words; mixed ones are words."""
    found: dict[str, dict[str, Any]] = {name: {} for name in settings}
    for key in dict.fromkeys(key for own in settings.values() for key in own):
        values = {name: own.get(key, "-") for name, own in settings.items()}
        kinds = {float if isinstance(value, int | float) and not isinstance(value, bool) else type(value) for value in values.values()}
        for name, value in values.items():
            found[name][key] = value if len(kinds) == 1 else str(value)
    return found


def hyperparameters(configuration: Mapping[str, Any] | str, prefix: str = "") -> dict[str, Any]:
    """A configuration's recipe, flattened to `decoder.threshold: 0.9`; a component's own name stands under its slot."""
    flat: dict[str, Any] = {}
    for key, value in configuration.items() if isinstance(configuration, Mapping) else ():
        name = prefix if key == "_component_" else f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat |= hyperparameters(value, name)
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def decided_curve(records: Sequence[Record]) -> list[float]:
    """Mean share (0..1) of the counted tokens that are decided after 0, 1, 2, ... steps."""
    curves = []
    for record in records:
        total, curve = 0, [0.0]
        counts = commits_per_step(record.born[: record.tokens])
        for count in counts:
            total += count
            curve.append(total / max(1, sum(counts)))
        curves.append(curve)
    length = max((len(curve) for curve in curves), default=0)
    return [sum(curve[min(step, len(curve) - 1)] for curve in curves) / len(curves) for step in range(length)]


def by_problem(records: Sequence[Record]) -> list[list[Record]]:
    """Records grouped by problem, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.problem, []).append(record)
    return list(groups.values())


def _text(group: Sequence[Record]) -> str:
    def quote(text: str) -> str:
        # An indented block is shown as it is, never as markup, and is not wrapped.
        lines = [part for line in text.splitlines() for part in wrap(line.strip(), 100) or [""]]
        return "\n".join(f"    {line}" for line in lines or [""])

    parts = [f"**problem**\n\n{quote(group[0].prompt)}", f"**reference**\n\n{quote(group[0].reference)}"]
    for record in group:
        verdict = "right" if record.correct else "wrong"
        parts.append(f"**{record.configuration}** ({verdict}, {record.tokens} tokens, {record.nfe} forwards)\n\n{quote(record.text)}")
    return "\n\n".join(parts)
