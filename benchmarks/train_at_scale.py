"""What do the training recipes of 8B models cost: twenty steps of each on one GPU, with random weights and generated rows.

    python benchmarks/train_at_scale.py --save        recipes/train/*_llada.yaml and *_dream.yaml, one GPU of 80 GB, three minutes
    python benchmarks/train_at_scale.py --tiny        the same recipes at toy size, eager, seconds on any CPU
    python benchmarks/train_at_scale.py --recipes d2f_llada my.yaml --rows 0 2 8        rows of a micro-batch; 0: the recipe's own
    python benchmarks/train_at_scale.py --markdown benchmarks/results/train_at_scale.json        a table of a kept result

A line is `dllm-toolkit train` with that recipe (training/run.py, Lightning's loop and all), except for what the hub would have to send:

    model      the published model's shape with random bf16 weights, made on the device, once for all recipes of that model
    data       rows of the recipe's own lengths: a prompt between half of prompt_length_max and all of it, an answer of answer_length. Where
               recorded answers are asked for, their steps are those of the recipe's decoder: blocks of 32 from left to right, a token a
               step, in random order within a block
    trainer    `--warm-up` steps, in which layers are compiled, then `--steps` timed ones. accumulate is 1, so each micro-batch is a step
               with clipping and optimiser of its own: what is reported is a little less than a run reaches that accumulates. No
               validation, checkpoint or export. Schedules go from their start to their end within these steps

Objective, teacher (the same weights with the adapter off), adapter, optimiser, precision, compilation and checkpointing are the recipe's.

    tokens/s   all positions of the rows, prompt included, each counted once: an objective with two copies of a row computes twice as many
    lanes      what is computed for a row: tokens that the student reads, all copies, and tokens that the teacher reads
    memory     the most that tensors held in a timed step (and what the allocator had reserved), weights and optimiser included
    MFU        useful operations / time / peak (989 TFLOP/s dense bf16 on H100 and H200). Useful are, for N weights of the layers and A of
               the adapter: 4 N + 6 A for each token that the student reads (forward, back to the activations, and the adapter's own
               gradient), 2 N for each that the teacher reads; 4 V D for each position whose logits the loss needs, and 2 V D more if
               the teacher's are needed; 4 D for each pair (query, key) that the rule allows, in every layer, three times for the
               student and once for the teacher. What is computed again, or in vain, counts as time only

Times are medians. A line that fails, for want of memory for instance, has its error in its place, and the next one runs; lines that
`--minutes` leaves no time for are left out by name, and with `--save` a run that is ended from outside leaves what it had in
a file *.partial. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from common import device_name, finish, keep_so_far, save_option
from torch import Tensor
from train_speed import PEAK

from dllm_toolkit import recipe
from dllm_toolkit.data.stories import build_tokenizer
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer, TransformerConfig
from dllm_toolkit.recipe_hints import Lazy
from dllm_toolkit.training.composed import Composed
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.data import Data, Example, Source
from dllm_toolkit.training.layouts import full_allow
from dllm_toolkit.training.lora import Lora
from dllm_toolkit.training.module import DiffusionModule
from dllm_toolkit.training.run import TrainRecipe, run_training

RECIPES = Path(__file__).parents[1] / "recipes" / "train"
DEFAULT = ("d2f_llada", "dscd_llada", "dparallel_llada", "d3llm_llada", "d2f_dream", "dparallel_dream", "d3llm_dream")
BLOCK = 32  # of the decoder that records answers
TINY: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "vocab_size": 400}
SHAPES: dict[str, dict[str, Any]] = {
    "llada": {"width": 4096, "layers": 32, "heads": 32, "mlp_width": 12288, "vocab_size": 126464, "rope_theta": 5e5},
    "dream": {
        "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp_width": 18944, "vocab_size": 152064, "rope_theta": 1e6,
        "norm_eps": 1e-6, "qkv_bias": True, "shift": 1,
    },
}  # fmt: skip


# ---- what stands for the hub


def read(name: str, options: argparse.Namespace) -> tuple[str, recipe.Recipe, str, TransformerConfig, TrainRecipe]:
    """A recipe by its name or path: name, recipe, name and shape of the model, and what it builds."""
    path = RECIPES / f"{name}.yaml"
    try:
        loaded = recipe.load(path if path.is_file() else name, options.override).checked(TrainRecipe)
        built = loaded.build(TrainRecipe)
    except ToolkitError as error:
        raise SystemExit(str(error)) from None
    return Path(name).stem, loaded, *shape_of(built, options.tiny), built


def shape_of(built: TrainRecipe, tiny: bool) -> tuple[str, TransformerConfig]:
    """Name and shape of the model that a recipe trains."""
    path = str(built.model.tree.get("path", "")).lower() if isinstance(built.model.tree, dict) else ""
    name = next((name for name in SHAPES if name in path), None)
    if name is None:
        raise SystemExit(f"only {' and '.join(SHAPES)} have a known shape, got model.path {path!r}. Write a recipe of one of them.")
    shape = SHAPES[name] | ({**TINY, "kv_heads": None} if tiny else {})
    words = shape["vocab_size"]
    return name, TransformerConfig(**shape, mask_id=words - 1, eos_ids=(words - 2,), pad_id=words - 2, max_positions=4096)


def random_weights(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Transformer(config)
    model.allocate(dtype, device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.zeros_(parameter) if name.endswith("bias") else torch.nn.init.ones_(parameter)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def around(weights: dict[str, Tensor], config: TransformerConfig) -> Transformer:
    """A model of its own, to put an adapter into, on weights that others have too."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    model.rebuild_rotary_tables()
    return model


@dataclass(frozen=True)
class Generated(Data):
    """Random words in rows of given lengths, with the steps at which a block decoder would have written them."""

    words: int
    prompt_length_max: int
    answer_length: int
    batch_size: int

    step_maps = True

    def check(self, max_positions: int) -> None:
        assert self.prompt_length_max + self.answer_length <= max_positions

    def tokenizer(self) -> Any:
        return build_tokenizer()  # nobody reads these words

    def examples(self, count: int, split: Literal["train", "heldout"] = "heldout") -> list[Example]:
        return []

    def sources(self, device: torch.device, seed: int, rank: int = 0, world: int = 1) -> tuple[Source, Source]:
        rows, answer = 8 * self.batch_size, self.answer_length
        length = self.prompt_length_max + answer
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.words, (rows, length), generator=generator)
        prompt = torch.randint(self.prompt_length_max // 2, self.prompt_length_max + 1, (rows,), generator=generator)
        within = torch.rand(rows, -(-answer // BLOCK), BLOCK, generator=generator).argsort(-1)
        step = (within + BLOCK * torch.arange(within.shape[1]).view(-1, 1)).flatten(1)[:, :answer]
        steps = torch.full_like(tokens, -1).scatter(1, prompt.unsqueeze(1) + torch.arange(answer), step)
        source = Source(tokens.to(device), prompt.to(device), answer, self.batch_size, seed, rank, world, step_map=steps.to(device))
        return source, source


# ---- measuring


class Enough(Exception):
    """The steps are measured: what would follow, a checkpoint of all weights, is not asked for."""


class Measure(pl.Callback):
    """Times whole steps of the loop, remembers what they were asked, and ends the run."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.marks: list[float] = []
        self.losses: list[float] = []
        self.asked: list[tuple[Batch, int, float]] = []
        self.row: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.asked.append((batch, pl_module.batches, pl_module.progress))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        assert isinstance(pl_module, DiffusionModule) and pl_module.last_loss is not None
        self.losses.append(float(pl_module.last_loss))
        self._mark(pl_module)
        if len(self.losses) == self.warm_up and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if len(self.losses) == self.warm_up + self.steps:
            self.row = self._measured(pl_module)
            raise Enough

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning would carry all of it to the host.
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        for parameter in pl_module.parameters():
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)

    def _mark(self, module: pl.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.marks.append(time.perf_counter())

    def _measured(self, module: DiffusionModule) -> dict[str, Any]:
        times = [after - before for before, after in zip(self.marks[self.warm_up :], self.marks[self.warm_up + 1 :], strict=False)]
        batch = self.asked[-1][0]
        rows, length = batch.tokens.shape
        student, teacher = module.objective.lanes(length, batch.answer_length)
        seconds = statistics.median(times)
        row: dict[str, Any] = {
            "rows": rows,
            "length": length,
            "student_lanes": student,
            "teacher_lanes": teacher,
            "trained_parameters": sum(one.numel() for one in module.model.parameters() if one.requires_grad),
            "ms": round(seconds * 1e3, 1),
            "slowest_ms": round(max(times) * 1e3, 1),
            "tokens_per_second": round(rows * length / seconds),
            "tflop": float(f"{useful(module, self.asked[self.warm_up :]) / 1e12:.6g}"),
            "loss": round(self.losses[-1], 4),
            "finite": all(math.isfinite(loss) for loss in self.losses) and not (module.skipped is not None and int(module.skipped)),
            "warm_up_seconds": round(self.marks[self.warm_up] - self.marks[0], 1),
        }
        if module.device.type == "cuda":
            row["gb"] = round(torch.cuda.max_memory_allocated(module.device) / 1e9, 2)
            row["reserved_gb"] = round(torch.cuda.max_memory_reserved(module.device) / 1e9, 2)
        return row


@torch.no_grad()
def useful(module: DiffusionModule, asked: list[tuple[Batch, int, float]]) -> float:
    """Operations that a step cannot do without, the mean of the given ones; the formula is in the module's docstring."""
    objective, model, config = module.objective, module.model, module.model.config
    assert isinstance(objective, Composed) and config.head_dim is not None
    matrices = [one for one in model.layers.parameters() if one.ndim > 1]
    frozen = sum(one.numel() for one in matrices if not one.requires_grad)
    adapter = sum(one.numel() for one in matrices if one.requires_grad)
    head, pair = 2 * config.vocab_size * config.width, 4 * config.heads * config.head_dim * config.layers
    total = 0.0
    for batch, number, progress in asked:
        view = objective.show(batch, model.spec, module.noise(1, number), progress)
        lanes = view.seen.tokens.numel()
        pairs = full_allow(batch).tril().sum() if view.seen.allow is None else view.seen.allow.sum()
        needed = ((view.weight > 0) | (view.teacher_weight > 0)).sum()
        total += lanes * (4 * frozen + 6 * adapter) + 2 * head * float(needed) + 3 * pair * float(pairs)
        if objective.needs_teacher:
            copies = view.tokens.shape[0] // batch.tokens.shape[0]
            total += view.tokens.numel() * 2 * frozen + head * float(needed) + pair * copies * float(full_allow(batch).sum())
    return total / len(asked)


def measured(
    loaded: recipe.Recipe, built: TrainRecipe, config: TransformerConfig, weights: dict[str, Tensor], rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One line: the recipe's run with what is not there replaced."""
    own: Any = getattr(built.data, "prompts", built.data)
    prompt, answer = (16, 64) if options.tiny else (own.prompt_length_max, own.answer_length)
    measure = Measure(options.warm_up, options.steps)
    on_gpu = torch.device(options.device).type == "cuda"
    with tempfile.TemporaryDirectory() as output:
        changed = replace(
            built,
            model=Lazy(built.model.tree, lambda: around(weights, config)),
            data=Generated(config.vocab_size - 2, prompt, answer, rows or own.batch_size),
            lora=None if built.lora is None else replace(built.lora, rank=4) if options.tiny else built.lora,
            trainer=replace(
                built.trainer,
                max_steps=options.warm_up + options.steps,
                accumulate=1,
                accelerator="gpu" if on_gpu else "cpu",
                log_every=1 << 20,
                validate_every=0,
                checkpoint_every=1 << 20,
                compile=built.trainer.compile if options.compile and on_gpu else False,
            ),
            callbacks=(measure,),
            output=Path(output) / "run",
            export=None,
        )
        with contextlib.suppress(Enough):
            run_training(loaded, changed)
    row = measure.row
    if options.peak:
        row["mfu"] = round(row["tflop"] * 1e12 / (row["ms"] / 1e3) / options.peak, 3)
    return row


def attempt(*given: Any) -> dict[str, Any]:
    """What is measured, or why it could not be."""
    torch._dynamo.reset()  # as a process of its own would begin
    try:
        return measured(*given)
    except Exception as failure:  # a line that fails must not cost the others
        said = str(failure).splitlines()
        return {"failed": f"{type(failure).__name__}: {said[0] if said else ''}"[:300]}


def tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- showing


def told(row: dict[str, Any]) -> str:
    name = f"{row['recipe']:18}"
    if "ms" not in row:
        return f"{name} {row.get('failed') or row['left_out']}"
    lanes = f"{row['student_lanes']} + {row['teacher_lanes']}"
    text = f"{name} {row['rows']} x {row['length']:<5} lanes {lanes:12} trained {row['trained_parameters'] / 1e6:7.1f} M"
    text += f"  {row['ms']:8.1f} ms  {row['tokens_per_second']:8} tokens/s"
    text += f"  mfu {row['mfu']:.3f}" if "mfu" in row else ""
    text += f"  {row['gb']:6.2f} GB" if "gb" in row else ""
    return f"{text}  loss {row['loss']:9.4f}{'' if row['finite'] else '  NOT FINITE'}"


def markdown(result: dict[str, Any]) -> str:
    """The table of the documentation."""
    lines = [
        "| recipe | rows x tokens | lanes of a row: student + teacher | trained | ms a step | tokens/s | MFU | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["lines"]:
        if "ms" not in row:
            lines.append(f"| `{row['recipe']}` | {row.get('failed') or row['left_out']} | | | | | | |")
            continue
        mfu = f"{row['mfu']:.2f}" if "mfu" in row else "-"
        memory = f"{row['gb']:.1f} GB" if "gb" in row else "-"
        lines.append(
            f"| `{row['recipe']}` | {row['rows']} x {row['length']} | {row['student_lanes']:,} + {row['teacher_lanes']:,} | "
            f"{row['trained_parameters'] / 1e6:,.0f} M | {row['ms']:,.0f} | {row['tokens_per_second']:,} | {mfu} | {memory} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU, eager")
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULT), help="names of recipes/train, or paths")
    parser.add_argument("--rows", nargs="+", type=int, default=None, help="rows of a micro-batch, one pass for each; 0: the recipe's own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=3.0, help="no line is begun after that many")
    parser.add_argument("--device", default=None)
    parser.add_argument("--peak", type=float, default=None, help="FLOP/s of the device, for MFU; known for H100, H200, A100")
    parser.add_argument("--eager", dest="compile", action="store_false", help="compile nothing")
    parser.add_argument("--override", nargs="+", default=[], help="changes of every recipe, such as objective.forward.checkpoint=layers")
    parser.add_argument(
        "--markdown", nargs="?", const="", default=None, metavar="FILE", help="also print a Markdown table; with a kept result, only that"
    )
    save_option(parser)
    options = parser.parse_args(arguments)
    if options.markdown:
        kept = json.loads(Path(options.markdown).read_text(encoding="utf-8"))
        print(markdown(kept))
        return kept
    options.rows = options.rows or ([0] if options.tiny else [0, 4])
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("these shapes need a GPU, and PyTorch sees none. Write --tiny.")
    options.peak = options.peak or next((peak for key, peak in PEAK.items() if key in device_name(device)), None)
    torch._dynamo.config.recompile_limit = 64  # several sizes of each graph
    begun = time.perf_counter()
    lines: list[dict[str, Any]] = []
    found = [read(name, options) for name in options.recipes]
    found.sort(key=lambda one: one[2] != "llada")  # so that the weights of a model are made once in a pass
    weights, made = dict[str, Tensor](), None
    for rows in options.rows:
        for name, loaded, shape, config, built in found:
            dtype = getattr(torch, (built.lora or Lora()).frozen)
            if (time.perf_counter() - begun) / 60 > options.minutes:
                row: dict[str, Any] = {"left_out": "no time was left"}
            else:
                if made != (shape, dtype):
                    weights.clear()
                    tidy(device)
                    weights.update(random_weights(config, dtype, device))
                    made = shape, dtype
                row = attempt(loaded, built, config, weights, rows, options)
                tidy(device)
            lines.append({"recipe": name, "model": shape, **row})
            print(told(lines[-1]), file=sys.stderr, flush=True)
            result = {"peak_flops": options.peak, "seconds": round(time.perf_counter() - begun, 1), "lines": lines}
            keep_so_far("train_at_scale", result, options, device)
    print("\n".join(["", *(told(row) for row in lines)]), file=sys.stderr, flush=True)
    if options.markdown is not None:
        print(markdown(result))
    return finish("train_at_scale", result, options, device)


if __name__ == "__main__":
    main()
