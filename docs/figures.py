"""Draw the pictures of docs/ from real decodes (of the small random-weight model that the golden tests use), so they cannot go stale.

    make figures            docs/caches.png, docs/pipeline.png, docs/attention.png

The picture of the README is another matter, it shows measurements:

    python -m dllm_toolkit.evaluation.report runs/quickstart/ledger.jsonl docs/quickstart.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import Step, trace
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.ops import masks

HERE = Path(__file__).parent
VECTORS = HERE.parent / "tests" / "golden" / "vectors"
CASE = next(
    case for case in json.loads((VECTORS / "cases" / "d2f_llada.json").read_text())["cases"] if case["name"] == "d2f_llada_bs8_default"
)
INK, FAINT = "#1b1f24", "#6d7680"
# What a position is to one forward. Colours are in order of darkness, so the picture survives a grey printer.
KINDS = (
    ("not visible", "#ffffff"),
    ("visible, keys and values reused", "#e3e8ec"),
    ("computed, decided earlier", "#a9cbe2"),
    ("computed, still masked", "#f3c98b"),
    ("computed, decided in this step", "#0b4f7d"),
)


def cells(steps: Sequence[Step]) -> torch.Tensor:
    """[steps, L] the kind of every position of row 0 in each forward."""
    rows = []
    for step in steps:
        plan, masked = step.asked.plan, step.before.masked[0]
        kind = torch.zeros_like(step.before.tokens[0])
        kind[plan.visible[0]] = 1
        kind[plan.compute[0] & ~masked] = 2
        kind[plan.compute[0] & masked] = 3
        kind[masked & ~step.after.masked[0] & (step.after.born[0] >= 0)] = 4
        rows.append(kind)
    return torch.stack(rows)


def draw_decode(axes: Axes, steps: Sequence[Step], block_length: int, title: str) -> None:
    """Across: position; down: forward. Lines mark the blocks."""
    grid = cells(steps)
    axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=ListedColormap([colour for _, colour in KINDS]), vmin=0, vmax=4)
    begin, length = int(steps[0].before.begin[0]), grid.shape[1]
    for edge in range(begin, length, block_length):
        axes.axvline(edge - 0.5, color=INK, lw=1.4 if edge == begin else 0.6)
    for line in range(grid.shape[0]):
        axes.axhline(line - 0.5, color="white", lw=0.6)
    lanes = sum(int(step.asked.plan.compute[0].sum()) for step in steps)
    axes.set_title(f"{title}: {len(steps)} forwards, {lanes} query tokens", fontsize=10, loc="left", color=INK)
    centres = [(begin - 1) / 2, *(edge + (block_length - 1) / 2 for edge in range(begin, length, block_length))]
    axes.set_xticks(centres, ["prompt", *(f"block {number}" for number in range(1, len(centres)))], fontsize=8)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.set_ylabel("forward", fontsize=9, color=INK)
    for side in axes.spines.values():
        side.set_color(FAINT)


def run(model: Transformer, decoder: Decoder, cache: Cache, answer: int) -> list[Step]:
    return list(trace(model, decoder, [CASE["prompt_ids"]], max_new_tokens=answer, cache=cache))


def key(figure: Figure, columns: int) -> None:
    patches = [Patch(facecolor=colour, edgecolor=FAINT, lw=0.5, label=name) for name, colour in KINDS]
    figure.legend(handles=patches, loc="lower center", ncols=columns, frameon=False, fontsize=9)


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, name: str) -> None:
    path = HERE / name
    figure.savefig(path, dpi=150, metadata={"Software": None})
    print(path)


def caches() -> None:
    """The same decoder under four caches: what is computed, what is reused."""
    teacher = load(str(VECTORS / "llada-tiny"))
    student = load(str(VECTORS / "llada-tiny"), attention="block_causal")
    decoder = fast_dllm(block_length=8, threshold=0.7, stop_at_eos=False)
    figure = canvas(11, 7.2)
    panels = (
        ("none", teacher, NoCache()),
        ("prefix (approximate)", teacher, PrefixCache()),
        ("dual (approximate)", teacher, DualCache()),
        ("block_causal (exact)", student, BlockCausalCache()),
    )
    for number, (title, model, cache) in enumerate(panels, 1):
        draw_decode(figure.add_subplot(2, 2, number), run(model, decoder, cache, 32), 8, title)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    key(figure, 5)
    save(figure, "caches.png")


def pipeline() -> None:
    """One D2F decode: several blocks in flight, finished ones stored."""
    student = load(str(VECTORS / "llada-tiny"), adapter=str(VECTORS / "lora-llada-tiny"), attention="block_causal")
    decoder = d2f(block_length=8, official_loop=True)
    figure = canvas(11, 4.2)
    draw_decode(figure.add_subplot(1, 1, 1), run(student, decoder, BlockCausalCache(), 48), 8, "D2F, exact cache")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    key(figure, 5)
    save(figure, "pipeline.png")


def attention() -> None:
    """Who may look at whom under the three attention rules: a prompt of 4, blocks of 4."""
    length = 12
    block = masks.answer_blocks(torch.tensor([4]), length, 4)
    everywhere = torch.arange(length).unsqueeze(0)
    visible = torch.ones(1, length, dtype=torch.bool)
    figure = canvas(9, 3.3)
    for number, rule in enumerate(("full", "block_causal", "causal"), 1):
        axes = figure.add_subplot(1, 3, number)
        allow = masks.lanes_allow(rule, visible, block, everywhere)[0]
        axes.imshow(allow, cmap=ListedColormap(["#ffffff", "#a9cbe2"]), vmin=0, vmax=1)
        for edge in range(length + 1):
            wide = edge % 4 == 0 and rule == "block_causal"
            axes.axhline(edge - 0.5, color=INK if wide else "#d5dbe0", lw=1.2 if wide else 0.5)
            axes.axvline(edge - 0.5, color=INK if wide else "#d5dbe0", lw=1.2 if wide else 0.5)
        axes.set_title(rule, fontsize=10, loc="left", color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("key", fontsize=9, color=INK)
        if number == 1:
            axes.set_ylabel("query", fontsize=9, color=INK)
    figure.tight_layout()
    save(figure, "attention.png")


if __name__ == "__main__":
    caches()
    pipeline()
    attention()
