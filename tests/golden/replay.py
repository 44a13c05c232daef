"""Replaying recorded decodes of the official implementations with this package's decoders.

A case (see vectors/README.md) holds a prompt, the official arguments, and what the official code did with them: token ids, number of
forwards, the forward after which each position was decided, and the query tokens of each forward. `plan` maps the official arguments
onto our parts; everything else here only runs them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import Output, decode, trace
from dllm_toolkit.decoders.base import Decoder
from dllm_toolkit.decoders.confidence_adaptive import confidence_adaptive
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer

VECTORS = Path(__file__).parent / "vectors"
Case = dict[str, Any]
CACHES: dict[str, Callable[[], Cache]] = {
    "generate": NoCache,
    "generate_with_prefix_cache": PrefixCache,
    "generate_with_dual_cache": DualCache,
}
FALLBACKS = {"default": "probability", "neg_entropy": "negative_entropy", "margin_confidence": "margin"}
# Strangers that share a batch with a recorded prompt: one shorter, one longer than any of them, with other budgets.
COMPANY = ([17, 4, 230], [(7 * place) % 250 for place in range(23)])
COMPANY_BUDGETS = (13, 31)


@dataclass(frozen=True)
class Plan:
    """A case in this package's words."""

    model: Transformer
    decoder: Decoder
    cache: Cache
    budget: int


def params(file: str, *, leave_out: tuple[str, ...] = ()) -> list[Any]:
    """The cases of one file as pytest parameters. Cases with guidance are skipped."""
    found = []
    for case in json.loads((VECTORS / "cases" / f"{file}.json").read_text())["cases"]:
        name, marks = case["name"], []
        if case["args"].get("cfg_scale"):
            marks.append(pytest.mark.skip(reason="classifier-free guidance is not implemented yet"))
        if name not in leave_out:
            found.append(pytest.param(case, id=name, marks=marks))
    assert found, f"no cases in {file}.json"
    return found


@functools.cache
def model(checkpoint: str, adapter: str | None = None, attention: Any = None) -> Transformer:
    """A recorded checkpoint, loaded once a test process."""
    return load(str(VECTORS / checkpoint), adapter=adapter and str(VECTORS / adapter), attention=attention)


def plan(case: Case) -> Plan:
    """The decoder, cache and model that a case's official function and arguments stand for."""
    arguments, function, checkpoint = case["args"], case["function"], case["checkpoint"]
    if "block_add_threshold" in arguments:
        decoder = d2f(
            block_length=arguments["block_size"],
            threshold=arguments["skip_threshold"],
            add_at=arguments["block_add_threshold"],
            activate_at=arguments["decoded_token_threshold"],
            fallback=FALLBACKS[arguments.get("sampling_strategy", "default")],
            official_loop=True,
        )
        student = model(checkpoint, case["adapter"], "block_causal")
        return Plan(student, decoder, BlockCausalCache(), arguments["max_new_tokens"])
    base, budget = model(checkpoint), arguments["gen_length"]
    if "confidence_threshold" in arguments:
        return Plan(base, _confidence_adaptive(case, base), NoCache(), budget)
    cache = CACHES[function]()
    if arguments.get("threshold") is not None or arguments.get("factor") is not None:
        decoder = fast_dllm(
            block_length=arguments["block_length"],
            threshold=arguments.get("threshold"),
            factor=arguments.get("factor"),
            stop_at_eos=False,
            official_tail=True,
            step_cap=arguments["steps"] if isinstance(cache, DualCache) else None,
        )
        return Plan(base, decoder, cache, budget)
    decoder = vanilla(
        steps=arguments["steps"],
        block_length=arguments["block_length"],
        suppress=("eos",) if arguments.get("logits_eos_inf") else (),
        defer=(arguments["eos_id"], arguments["eot_id"]) if arguments.get("confidence_eos_eot_inf") else (),
        idle_steps=True,
    )
    return Plan(base, decoder, cache, budget)


def _confidence_adaptive(case: Case, base: Transformer) -> Decoder:
    arguments = case["args"]
    by_entropy = arguments["selection_method"] == "entropy"
    return confidence_adaptive(
        block_length=arguments.get("block_length"),
        threshold=arguments["entropy_threshold" if by_entropy else "confidence_threshold"],
        minimum=arguments["min_tokens_per_step"],
        maximum=arguments["max_tokens_per_step"],
        eos_share=arguments["eos_threshold_ratio"],
        # The official list names the ends of text of several models; the others' ids lie outside this vocabulary.
        late=tuple(one for one in arguments["eos_ids"] if one < base.spec.vocab_size),
        max_steps_per_block=arguments.get("max_steps_per_block") or arguments.get("max_steps"),
        score="negative_entropy" if by_entropy else "probability",
        stop_at_eos=False,
    )


def rows(case: Case, field: str) -> list[list[int]]:
    """A field of a case as one list a row, whether or not the case is a batch."""
    value = case[field]
    return value if isinstance(value[0], list) else [value]


def prompts(case: Case) -> list[list[int]]:
    """The prompts of a case without the official left padding: our canvases are padded on the right."""
    given = rows(case, "prompt_ids")
    if "attention_mask" not in case:
        return given
    return [
        [token for token, real in zip(prompt, keep, strict=False) if real]
        for prompt, keep in zip(given, rows(case, "attention_mask"), strict=True)
    ]


def run(case: Case, *, company: bool = False) -> tuple[Output, list[int]]:
    """Decode a case; with `company`, between two unrelated prompts of other lengths. Returns the output and the case's row numbers."""
    planned, own = plan(case), prompts(case)
    together = [COMPANY[0], *own, COMPANY[1]] if company else own
    budgets = [planned.budget] * len(own)
    if company:
        budgets = [COMPANY_BUDGETS[0], *budgets, COMPANY_BUDGETS[1]]
    output = decode(planned.model, planned.decoder, together, max_new_tokens=budgets, cache=planned.cache)
    first = 1 if company else 0
    return output, list(range(first, first + len(own)))


def check_until_the_last_forward(case: Case) -> None:
    """For a case that leaves masks: every commit but those of the last forward, after which our row ends at its first mask.

    What the last forward decided behind a mask is not part of our answer, so it is compared up to there.
    """
    planned = plan(case)
    steps = list(trace(planned.model, planned.decoder, prompts(case), max_new_tokens=planned.budget, cache=planned.cache))
    assert len(steps) == case["nfe"]
    state, last = steps[-1].before, case["nfe"] - 1
    first = int(state.begin[0])
    for place, (token, commit) in enumerate(zip(case["generated_ids"], case["commit_forward"], strict=True)):
        assert bool(state.masked[0, first + place]) == (commit in (-1, last)), place
        if 0 <= commit < last:
            assert (int(state.tokens[0, first + place]), int(state.born[0, first + place])) == (token, commit), place
    end = case["commit_forward"].index(-1)
    after = steps[-1].after
    assert int(after.end[0]) == first + end
    assert after.tokens[0, first : first + end].tolist() == case["generated_ids"][:end]
    assert after.born[0, first : first + end].tolist() == case["commit_forward"][:end]


def query_lengths(case: Case) -> list[list[int]]:
    """Query tokens of every forward, for each row that took part."""
    planned = plan(case)
    steps = trace(planned.model, planned.decoder, prompts(case), max_new_tokens=planned.budget, cache=planned.cache)
    return [step.asked.plan.compute.sum(1).tolist() for step in steps]


def written(case: Case, output: Output, row: int) -> list[int]:
    """The row step at which each recorded position was decided."""
    size = len(rows(case, "generated_ids")[0])
    first = int(output.begin[row])
    return output.born[row, first : first + size].tolist()


def check(case: Case, output: Output, numbers: list[int], *, waits: bool = False) -> None:
    """Token ids, forwards and commit forwards equal the recorded ones.

    waits: in the official batch a row that has finished its block waits for the others, so its forwards are counted on; its commits
    are then compared from the start of their block.
    """
    assert max(output.stats.nfe[row] for row in numbers) == case["nfe"]
    for row, ids, commits in zip(numbers, rows(case, "generated_ids"), rows(case, "commit_forward"), strict=True):
        assert output.tokens[row][: len(ids)] == ids
        ours = written(case, output, row)
        if waits:
            size = case["args"]["block_length"]
            official_starts = _block_starts(rows(case, "commit_forward"), size)
            ours = _from_block_start(ours, _block_starts([ours], size), size)
            commits = _from_block_start(commits, official_starts, size)
        else:
            assert output.stats.nfe[row] == case["nfe"]
        assert ours == commits


def _block_starts(commits: list[list[int]], size: int) -> list[int]:
    """The forward at which each block opens: one after the last commit of the block before it, over all rows that wait for each other."""
    blocks = range(0, len(commits[0]), size)
    return [0] + [max(max(row[first : first + size]) for row in commits) + 1 for first in blocks][:-1]


def _from_block_start(commits: list[int], starts: list[int], size: int) -> list[int]:
    return [commit - starts[place // size] for place, commit in enumerate(commits)]
