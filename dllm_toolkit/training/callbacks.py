"""Callbacks: progress lines and metrics, and decoding a few held-out problems while training.

Nothing here waits for the device except at the steps that are logged.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import check_prompts
from dllm_toolkit.decoders.base import Decoder, check
from dllm_toolkit.registry import declare, register
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.data import DataError, Example
from dllm_toolkit.training.module import DiffusionModule
from dllm_toolkit.types import ModelSpec

declare("callback", pl.Callback)


def cut_log(path: Path, counter: str, last: int) -> None:
    """Drop what a log of JSON lines has beyond the checkpoint of a resumed run, `last` of `counter`: it is done and logged again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    # A kill may cut the last line in half; a line that is no JSON was never a measurement.
    kept = [line for line in lines if line.endswith("}") and json.loads(line)[counter] <= last]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


class Throughput(pl.Callback):
    """Every `every` steps: loss, gradient norm, learning rate, samples and tokens per second to TensorBoard, metrics.jsonl and stderr.

    Always on. metrics.jsonl has one object a logged step; what lies beyond the checkpoint that a run resumes from is cut off. Tokens
    count prompt and answer as the model reads them, padding to the static length included.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._mark: tuple[float, int] | None = None
        self._measured = self._skipped = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self._mark = None
        self._measured, self._skipped = trainer.global_step, pl_module.skipped_steps
        if trainer.is_global_zero:
            cut_log(self.path, "step", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        assert isinstance(pl_module, DiffusionModule)
        step = trainer.global_step
        if step == self._measured or step % self.every:  # also: micro-batches of an unfinished accumulation
            return
        self._measured = step
        metrics = {name: float(value) for name, value in self._tensors(pl_module).items()}  # the one wait for the device
        self._check_skipped(pl_module, step)
        now = time.monotonic()
        if self._mark is not None:
            samples = (pl_module.batches - self._mark[1]) * batch.tokens.shape[0]
            metrics["samples_per_second"] = samples / (now - self._mark[0])
            metrics["tokens_per_second"] = metrics["samples_per_second"] * batch.tokens.shape[1]
        self._mark = (now, pl_module.batches)
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["progress"] = pl_module.progress
        self._write(trainer, step, {f"train/{name}": value for name, value in metrics.items()})

    def _check_skipped(self, module: DiffusionModule, step: int) -> None:
        """Say how many steps gave no usable gradient, and end a run in which none does any more."""
        skipped = module.skipped_steps
        now, self._skipped = skipped - self._skipped, skipped
        if now:
            print(f"step {step:>6}  {now} steps since the last line were skipped: their gradient was NaN or infinite", file=sys.stderr)
        if now >= max(2, self.every):
            raise DataError(
                f"the last {now} steps gave no gradient that is a number. The run has diverged, or the data or the first weights hold NaN; "
                "nothing was learned of them. Look at the loss in metrics.jsonl, and write a smaller optimizer.learning_rate."
            )

    @staticmethod
    def _tensors(module: DiffusionModule) -> dict[str, Tensor]:
        assert module.last_loss is not None and module.gradient_norm is not None
        return {"loss": module.last_loss, "gradient_norm": module.gradient_norm, **module.last_metrics}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        if pl_module.validation_loss is not None:
            self._write(trainer, trainer.global_step, {"validation/loss": pl_module.validation_loss})
        self._mark = None  # validation time is not training time

    def _write(self, trainer: pl.Trainer, step: int, metrics: dict[str, float]) -> None:
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, step)
        if not trainer.is_global_zero:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")
        shown = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        print(f"step {step:>6}  {shown}", file=sys.stderr, flush=True)


@register("callback", "decode")
class DecodeWhileTraining(pl.Callback):
    """Every `every` steps decode held-out problems with the averaged weights; text, accuracy and tokens per forward to TensorBoard.

    `decoder` and `cache` are the components that a comparison uses. `name` separates several of these callbacks in TensorBoard.
    `stop_at`: share (0..1) at which training ends early, for a model that is to be trained just so far; `measure` says of what: right
    final answers (`accuracy`), or solutions that are the reference (`exact`).
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache | None = None,
        every: int = 1000,
        problems: int = 16,
        max_new_tokens: int = 80,
        name: str = "decode",
        stop_at: float | None = None,
        measure: Literal["accuracy", "exact"] = "accuracy",
    ) -> None:
        if every < 1 or problems < 1:
            raise DataError(f"every and problems must be at least 1, got {every} and {problems}. Write every: 1000, problems: 16.")
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {max_new_tokens}. It is a length. Write max_new_tokens: 80.")
        self.decoder, self.cache, self.every, self.problems = decoder, cache or NoCache(), every, problems
        if stop_at is not None and not 0 < stop_at <= 1:
            raise DataError(f"stop_at must lie in (0, 1], got {stop_at}. It is a share. Write stop_at: 0.5, or null.")
        self.max_new_tokens, self.name, self.stop_at, self.measure = max_new_tokens, name, stop_at, measure
        self.examples: list[Example] = []  # given by run_training
        self._done = 0

    def check(self, spec: ModelSpec) -> None:
        """Raise DecodeError now, not at the first decode, if the decoder does not fit the model."""
        check(spec, self.decoder, self.cache)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        prompts = [example.prompt for example in self.examples[: self.problems]]
        check_prompts(pl_module.model.spec, prompts, [self.max_new_tokens] * len(prompts))
        if self.stop_at is not None and self.measure == "exact" and any(one.exact is None for one in self.examples[: self.problems]):
            raise DataError("stop_at cannot look at exact solutions, got data without reference solutions. Write measure: accuracy.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = trainer.global_step
        if self.stop_at is not None and trainer.global_step:
            assert isinstance(pl_module, DiffusionModule)
            self.report(trainer, pl_module, trainer.global_step)  # a run that was ended by this is started again

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._done or step % self.every:
            return
        self._done = step
        assert isinstance(pl_module, DiffusionModule)
        self.report(trainer, pl_module, step)

    def report(self, trainer: pl.Trainer, module: DiffusionModule, step: int) -> None:
        """Decode now and write the results at `step`: process 0 does; the others lend their part of the weights, where they are sharded."""
        if not trainer.is_global_zero:
            with module.averaged():
                return
        from dllm_toolkit.decode import decode
        from dllm_toolkit.evaluation.ledger import answer_tokens

        tokenizer, spec = module.model.tokenizer, module.model.spec
        assert tokenizer is not None
        examples = self.examples[: self.problems]
        with torch.no_grad(), module.averaged() as model:
            output = decode(
                model,
                self.decoder,
                [example.prompt for example in examples],
                max_new_tokens=self.max_new_tokens,
                cache=self.cache,
                throw=False,
            )
        lengths = [answer_tokens(ids, spec.eos_ids) for ids in output.tokens]
        texts = [str(tokenizer.decode(ids[:length], skip_special_tokens=True)) for ids, length in zip(output.tokens, lengths, strict=True)]
        right = [example.grade(text) for example, text in zip(examples, texts, strict=True)]
        exact = [example.exact(text) for example, text in zip(examples, texts, strict=True) if example.exact is not None]
        shares = {"accuracy": sum(right) / len(right)} | ({"exact": sum(exact) / len(exact)} if exact else {})
        told = shares | {"tokens_per_forward": sum(lengths) / max(1, sum(output.stats.nfe))}
        print(
            f"step {step:>6}  {self.name}: {'  '.join(f'{name} {value:.3f}' for name, value in told.items())}  "
            f"({len(right)} problems)\n    {texts[0]!r}",
            file=sys.stderr,
            flush=True,
        )
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"{self.name}/{name}": value for name, value in told.items()}, step)
            writer = trainer.logger.experiment  # type: ignore[attr-defined]
            shown = [
                f"**{'right' if ok else 'wrong'}**, {nfe} forwards\n\n> {example.text}\n>\n> {text}"
                for example, text, ok, nfe in zip(examples, texts, right, output.stats.nfe, strict=True)
            ]
            writer.add_text(f"{self.name}/text", "\n\n---\n\n".join(shown[:8]), step)
        if self.stop_at is not None and shares[self.measure] >= self.stop_at:
            trainer.should_stop = True
