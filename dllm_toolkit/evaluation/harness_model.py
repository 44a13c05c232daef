"""Our side of the harness's model interface: requests in, texts and log likelihoods out, every answer in a ledger first.

Requests are measured by the code that measures every comparison (measure.py), so batches, warm-up, counting and continuing after a kill are
the same; an answer that the ledger already holds is not decoded again. This module imports lm_eval; harness.py does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string  # pyright: ignore[reportMissingImports]

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.evaluation.harness import ANSWERS, LIKELIHOODS, Session, from_arguments, placed, threads
from dllm_toolkit.evaluation.harness_tasks import HarnessError, HarnessTask
from dllm_toolkit.evaluation.ledger import Record
from dllm_toolkit.evaluation.likelihood import Likelihood, check_pairs, log_likelihoods
from dllm_toolkit.evaluation.measure import Row, fill
from dllm_toolkit.evaluation.tasks import Problem

_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GREEDY = {"do_sample": (False, None), "temperature": (0, 0.0, None)}


class HarnessModel(TemplateLM):
    """A recipe's model and decoder as the harness's `dllm_toolkit`. tasks: what is being evaluated, by name; needed to grade."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.tasks: dict[str, Any] = {}
        self.tokenizer = session.model.tokenizer

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> HarnessModel:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> HarnessModel:
        model = cls(from_arguments(arg_dict))
        run = model.session.built.run
        print(f"note: batch size {run.batch_size} and device {run.device} are the recipe's; change run.batch_size there", file=sys.stderr)
        return model

    @property
    def eot_token_id(self) -> int:
        return self.session.model.spec.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the tokenizer's start token if it has one."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def max_length(self) -> int:
        return self.session.model.spec.max_positions

    @property
    def tokenizer_name(self) -> str:
        return hashlib.sha256(json.dumps(self.session.built.model.tree, default=str, sort_keys=True).encode()).hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about us."""
        return {"recipe": self.session.recipe.tree, "recipe_hash": ledger.recipe_hash(self.session.recipe.tree)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return list(self.tokenizer.encode(string, add_special_tokens=False))

    def require_chat_template(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise HarnessError(
                "chat is true, but the model's tokenizer has no chat template. A base model takes the prompt as running text. "
                "Write chat=false (of lm_eval itself: no --apply_chat_template)."
            )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.require_chat_template()
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        session, run = self.session, self.session.built.run
        groups: dict[tuple[str, str], dict[str, Instance]] = {}
        for instance in requests:
            name = _task_name(instance)
            self._require_alone(instance, name)
            key = f"{name}-{instance.doc_id}"
            group = groups.setdefault((name, json.dumps(instance.args[1], sort_keys=True, default=str)), {})  # pyright: ignore
            if group.setdefault(key, instance) is not instance:
                raise HarnessError(f"{name} asks twice about document {instance.doc_id}. The ledger holds one answer of it. Leave it out.")
        tasks, rows, budgets = [], [], []
        for (name, _), instances in groups.items():
            asked = next(iter(instances.values())).args[1]  # pyright: ignore
            stops = asked.get("until") or []
            tasks.append(HarnessTask(self.tasks[name], instances, tuple([stops] if isinstance(stops, str) else stops)))
            budgets.append(self._budget(name, asked))
            prompts = tuple(tuple(self.tok_encode(instance.args[0])) for instance in instances.values())
            self._check(list(instances), prompts, budgets[-1])
            rows.append(Row(name, session.model, session.built.decoder, session.built.cache, prompts, None, session.driver))
        if len({row.name for row in rows}) < len(rows):
            raise HarnessError(
                "a task asks for different stop strings or lengths from problem to problem, got "
                f"{sorted({row.name for row in rows if sum(other.name == row.name for other in rows) > 1})}. Its answers would not be one "
                "row of a table. Leave it out."
            )
        problems = [replace(one, meta={"task": row.name}) for task, row in zip(tasks, rows, strict=True) for one in task.problems()]
        header = session.header("generate_until", problems, [(task.until, budget) for task, budget in zip(tasks, budgets, strict=True)])
        path = session.built.output / ANSWERS
        with threads(run), ledger.open_ledger(path, header) as book:
            self._keep_recipe()
            for task, row, budget in zip(tasks, rows, budgets, strict=True):
                fill(book.only(row.name), [row], list(task.problems()), task, replace(run, max_new_tokens=budget), session.device)
        texts = {record.problem: record.text for record in ledger.read(path)[1]}
        answers = [texts[f"{_task_name(instance)}-{instance.doc_id}"] for instance in requests]
        for instance, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return answers

    def _require_alone(self, instance: Instance, name: str) -> None:
        if name not in self.tasks:
            raise HarnessError(
                f"nobody said how answers of {name} are graded. The ledger holds no answer without its grade. "
                "Call dllm_toolkit.evaluation.harness.register() before lm_eval.simple_evaluate."
            )
        if (instance.repeats or 1) > 1 or instance.idx:
            raise HarnessError(
                f"{name} judges several answers to a problem together, got {instance.repeats} repeats. The ledger holds graded single "
                "answers. Take the task's form with one answer, such as humaneval for humaneval_64."
            )
        if len(instance.args) > 2:
            raise HarnessError(f"{name} shows more than text. These models read text. Leave it out.")

    def _budget(self, name: str, asked: Mapping[str, Any]) -> int:
        wanted = next((int(asked[key]) for key in _LENGTH if asked.get(key) is not None), None)
        run = self.session.built.run
        unused = {key: value for key, value in asked.items() if key not in ("until", *_LENGTH) and value not in _GREEDY.get(key, ())}
        if unused:
            print(f"note: {name} sets {unused}, which is not used: how tokens are drawn is the recipe's decoder's", file=sys.stderr)
        if wanted is not None and wanted > run.max_new_tokens:
            print(f"note: {name} allows {wanted} tokens an answer; run.max_new_tokens={run.max_new_tokens} allows less", file=sys.stderr)
        return run.max_new_tokens if wanted is None else min(wanted, run.max_new_tokens)

    def _check(self, keys: Sequence[str], prompts: Sequence[Sequence[int]], budget: int) -> None:
        most = self.max_length
        with placed(self.session.recipe, "run", "max_new_tokens"):
            for key, prompt in zip(keys, prompts, strict=True):
                if not prompt:
                    raise HarnessError(f"the prompt of {key} is empty for this model. There is nothing to answer. Leave the task out.")
                if len(prompt) + budget > most:
                    room = most - len(prompt)
                    shorter = f"run.max_new_tokens={room} or less" if room > 0 else "fewer shots, or another model"
                    raise HarnessError(
                        f"the prompt of {key} has {len(prompt)} tokens and the answer {budget}, but the model has {most} positions. "
                        f"Nothing is cut off without a word. Write {shorter}."
                    )

    def _keep_recipe(self) -> None:
        path: Path = self.session.built.output / "recipe.yaml"
        with ledger.written(path):
            path.write_text(self.session.recipe.to_yaml(), encoding="utf-8")

    # --- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for instance in requests:
            context, continuation = instance.args  # pyright: ignore
            if context == "":
                # As the harness does it: the first token of a text that begins with the start token is its context.
                ids = self.tok_encode(continuation)
                pair = ([self.prefix_token_id], ids) if ids[:1] != [self.prefix_token_id] else (ids[:1], ids[1:])
            else:
                pair = self._encode_pair(context, continuation)
            pairs.append(pair)
        found = self._judge(requests, [[pair] for pair in pairs], "loglikelihood", greedy=self.session.built.likelihood.greedy)
        answers = [(record.extra["log_likelihood"], record.correct) for record in found]
        for instance, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", instance.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for instance in requests:
            # A window is predicted from one token before it, so it may have all positions but one.
            rolled = get_rolling_token_windows(self.tok_encode(instance.args[0]), self.prefix_token_id, self.max_length - 1, 1)
            windows.append([make_disjoint_window(window) for window in rolled])
        found = self._judge(requests, windows, "loglikelihood_rolling", greedy=False)
        answers = [record.extra["log_likelihood"] for record in found]
        for instance, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, answer)
        return answers

    def _loglikelihood_tokens(self, requests: list, **unused: Any) -> list[tuple[float, bool]]:
        """The harness asks `loglikelihood`, which knows whose requests they are; this is for whoever asks with ids."""
        options, run = self.session.built.likelihood, self.session.built.run
        pairs = [(context, continuation) for _, context, continuation in requests]
        keys = [_key(context, run.seed) for context, _ in pairs]
        self._ready()
        found = log_likelihoods(self.session.model, pairs, options=options, seed=keys, batch_size=run.batch_size)
        return [(one.value, bool(one.greedy)) for one in found]

    def _judge(self, requests: Sequence[Instance], windows: Sequence[Sequence[Any]], kind: str, greedy: bool) -> list[Record]:
        """Records of the likelihood of each request, the sum over its windows; those that the ledger holds are not asked again."""
        session, run = self.session, self.session.built.run
        options = dataclasses.replace(session.built.likelihood, greedy=greedy)
        names = [_task_name(instance) for instance in requests]
        keys = [f"{name}-{one.doc_id}-{one.idx}" for name, one in zip(names, requests, strict=True)]
        for key, asked in zip(keys, windows, strict=True):
            try:
                check_pairs(session.model.spec, asked)
            except ToolkitError as error:
                raise HarnessError(f"the request {key} cannot be judged: {error}") from error
        problems = [Problem(key, one.args[0], one.args[-1], {"task": name}) for key, name, one in zip(keys, names, requests, strict=True)]
        name = LIKELIHOODS if kind == "loglikelihood" else f"rolling_{LIKELIHOODS}"
        path = session.built.output / name
        with threads(run), ledger.open_ledger(path, session.header(kind, problems, options)) as book:
            self._keep_recipe()
            self._ready()
            done = {record.problem for record in book.records}
            for first in range(0, len(keys), run.batch_size):
                batch = range(first, min(first + run.batch_size, len(keys)))
                # A batch of the ledger belongs to one task.
                for task in dict.fromkeys(names[number] for number in batch):
                    mine = [number for number in batch if names[number] == task and keys[number] not in done]
                    if mine:
                        book.append(self._judged(mine, first // run.batch_size, problems, windows, task, options))
        kept = {record.problem: record for record in ledger.read(path)[1]}
        return [kept[key] for key in keys]

    def _ready(self) -> None:
        for model in [self.session.model, *(self.session.driver.other(name) for name in self.session.driver.other_models)]:
            model.to(device=self.session.device, dtype=getattr(torch, self.session.built.run.dtype))

    def _judged(self, mine: Sequence[int], batch: int, problems: Sequence[Problem], windows: Any, task: str, options: Any) -> list[Record]:
        session, run = self.session, self.session.built.run
        pairs = [(number, pair) for number in mine for pair in windows[number]]
        seeds = [_key(pair[0], run.seed) for _, pair in pairs]
        clock = time.perf_counter()
        found = log_likelihoods(session.model, [pair for _, pair in pairs], options=options, seed=seeds, batch_size=run.batch_size)
        seconds = time.perf_counter() - clock
        records = []
        for number in mine:
            parts = [(pair, one) for (owner, pair), one in zip(pairs, found, strict=True) if owner == number]
            output = tuple(token for pair, _ in parts for token in pair[1])
            values = [one for _, one in parts]
            records.append(
                Record(
                    configuration=task,
                    problem=problems[number].id,
                    prompt=problems[number].prompt,
                    reference=problems[number].reference,
                    prompt_hash=hashlib.sha256(problems[number].prompt.encode()).hexdigest()[:16],
                    prompt_tokens=sum(len(pair[0]) for pair, _ in parts),
                    output=output,
                    pieces=(),
                    text=problems[number].reference,
                    correct=bool(values) and all(one.greedy is True for one in values),
                    steps_right=0.0,
                    exact=all(one.exact for one in values),
                    nfe=sum(one.forwards for one in values),
                    tokens=len(output),
                    canvas_tokens=len(output),
                    lanes=sum(one.lanes for one in values),
                    steps=0,
                    commits=0,
                    forced=0,
                    edits=0,
                    born=(),
                    seconds=seconds / len(mine),
                    batch=batch,
                    batch_rows=len(mine),
                    batch_seconds=seconds,
                    seed=run.seed,
                    given=len(output),
                    extra={
                        "log_likelihood": sum(one.value for one in values),
                        "standard_error": _error(values),
                        "greedy": None if any(one.greedy is None for one in values) else all(one.greedy for one in values),
                    },
                )
            )
        return records


def _task_name(instance: Instance) -> str:
    return instance.task_name or "request"


def _key(context: Sequence[int], seed: int) -> int:
    """The noise key of a request. Choices of one question share it: what they have in common is noise that their comparison is spared."""
    return zlib.crc32(repr((seed, list(context))).encode())


def _error(values: Sequence[Likelihood]) -> float | None:
    """The standard error of a sum of independent parts."""
    errors = [one.standard_error for one in values]
    return None if any(one is None for one in errors) else sum(one**2 for one in errors if one is not None) ** 0.5
