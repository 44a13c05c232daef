"""Infilling: a text with one sentence missing, both sides given. What a diffusion model can do and a causal one cannot.

The text before and behind the gap is pinned on the canvas (`decode(templates=...)`), so the decoder fills the gap alone. The gap has as
many tokens as the sentence that was taken out, in the vocabulary of the model.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from dllm_toolkit import registry
from dllm_toolkit.data import stories
from dllm_toolkit.evaluation.tasks import sources
from dllm_toolkit.evaluation.tasks.base import Gap, Grade, Problem, Task, TaskError, check_size
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.recipe import Lazy

# A sentence ends where the next one starts with a capital or a digit: `"Are we there?" asked Mia.` is one.
_SENTENCE = re.compile(r".*?[.!?]+[\"'\u201d\u2019]*(?=\s+[\"'\u201c\u2018]?[A-Z0-9]|\s*$)", re.DOTALL)


@registry.register("task", "infilling")
@dataclass(frozen=True)
class Infilling(Task):
    """Fill in the middle sentence of a text; accuracy, words in common with the original, and perplexity under a judge.

    path: a plain text file, of which passages of `sentences` sentences are taken, null for solutions of story arithmetic of `style`, where
    the sentence is an equation that what stands around it determines. size: how many. seed: which ones. judge: an autoregressive model that
    gives the perplexity of the filled text, null for none; it is loaded once, and is used on the CPU.
    """

    path: Path | None = None
    size: int = 100
    seed: int = 0
    style: Literal["terse", "worded"] = "terse"
    sentences: int = 5
    judge: Lazy[Model] | None = None

    def __post_init__(self) -> None:
        check_size(self.size)
        if self.sentences < 3:
            raise TaskError(f"sentences must be at least 3, got {self.sentences}. The gap has text on both sides. Write sentences: 5.")
        if self.seed < 0:
            raise TaskError(f"seed must not be negative, got {self.seed}. It picks the texts. Write seed: 0.")

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        texts = self._stories() if self.path is None else self._passages(self.path)
        return tuple(
            Problem(
                id=f"infilling-{self.seed}-{index}",
                prompt=prompt,
                reference=before + gap + behind,
                meta={"before": before, "gap": gap, "behind": behind},
                skeleton=tuple(part for part in (before, Gap(gap), behind) if part),
            )
            for index, (prompt, before, gap, behind) in enumerate(texts)
        )

    def _stories(self) -> list[tuple[str, str, str, str]]:
        texts = []
        for index in range(self.size):
            story = stories.story(self.seed, index, "heldout", self.style)
            parts = _SENTENCE.findall(story.solution)
            # The first sentence follows from the question alone; the last one is only the answer again.
            at = (len(parts) - 1) // 2
            texts.append((stories.format_prompt(story), "".join(parts[:at]), parts[at], "".join(parts[at + 1 :])))
        return texts

    def _passages(self, path: Path) -> list[tuple[str, str, str, str]]:
        parts = _SENTENCE.findall(sources.text(path))
        count = len(parts) // self.sentences
        if count == 0:
            raise TaskError(
                f"path {str(path)!r} has {len(parts)} sentences, fewer than the {self.sentences} of a passage. "
                "Write the path of a longer text, or sentences: 3."
            )
        texts = []
        for index in range(min(self.size, count)):
            start = (self.seed + index) % count * self.sentences
            passage, at = parts[start : start + self.sentences], self.sentences // 2
            texts.append((passage[0].lstrip(), "".join(passage[1:at]), passage[at], "".join(passage[at + 1 :])))
        return texts

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def ready(self) -> None:
        if self.judge is None:
            return
        spec = self._judging.spec
        if spec.attention != "causal" or spec.shift != 1 or getattr(self._judging, "tokenizer", None) is None:
            raise TaskError(
                "judge must be an autoregressive model with a tokenizer, since a perplexity needs the probability of each token given the "
                f"ones before it; got attention {spec.attention}, shift {spec.shift}. Write judge: null, or another model."
            )

    def extraction(self) -> str:
        found = "the text between the two given sides; right if it is the missing sentence, white space aside"
        if self.path is None:
            found += ", or a sentence with the same equations"
        return f"{found}. steps_right: the words in common with it (F1). Perplexity: {'none' if self.judge is None else 'under the judge'}"

    def notes(self) -> tuple[str, ...]:
        return ("the gap has exactly as many tokens as the missing sentence",)

    def grade(self, problem: Problem, text: str) -> Grade:
        filled, wanted = self._filled(problem, text), problem.meta["gap"]
        exact = filled is not None and filled.split() == wanted.split()
        right = exact
        if self.path is None and filled is not None and not exact:
            found = stories.equations(filled)
            right = bool(found) and found == stories.equations(wanted)
        extra: dict[str, Any] = {"read": filled}
        if self.judge is not None:
            loss, tokens = self._loss(problem.prompt, text)
            extra |= {"judge_loss": loss, "judge_tokens": tokens}
        return Grade(correct=right, steps_right=_in_common(filled or "", wanted), exact=exact, extra=extra)

    @staticmethod
    def _filled(problem: Problem, text: str) -> str | None:
        """What stands between the given sides; None where a side is not there (the text ended before it)."""
        text, before, behind = " ".join(text.split()), *(" ".join(problem.meta[key].split()) for key in ("before", "behind"))
        if len(text) < len(before) + len(behind) or not text.startswith(before) or not text.endswith(behind):
            return None
        return text[len(before) : len(text) - len(behind)].strip()

    @cached_property
    def _judging(self) -> Any:
        assert self.judge is not None
        return self.judge.build()

    def _loss(self, prompt: str, text: str) -> tuple[float, int]:
        """Nats of `text` behind `prompt`, and its number of tokens; what does not fit into the judge is left out."""
        model = self._judging
        given, answer = (model.tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text))
        ids = (given + answer)[: model.spec.max_positions]
        scored = max(0, len(ids) - max(1, len(given)))
        if scored == 0:
            return 0.0, 0
        tokens = torch.tensor([ids], device=getattr(model, "device", None))
        positions = torch.arange(len(ids), device=tokens.device).unsqueeze(0)
        with torch.inference_mode():
            logits = model(Query(tokens, positions)).float().log_softmax(-1)  # [1, L, V]; row i predicts token i + 1
        chosen = logits[0, :-1].gather(1, tokens[0, 1:, None]).squeeze(1)  # [L - 1]
        return -float(chosen[-scored:].sum()), scored


def _in_common(text: str, wanted: str) -> float:
    """F1 of the words, counted with their repetitions; 0..1."""
    found, there = Counter(text.split()), Counter(wanted.split())
    common = sum((found & there).values())
    return 2 * common / (sum(found.values()) + sum(there.values())) if common else 0.0
