"""Recorded cases of official implementations in this package's words: which model, decoder and cache a case stands for.

A plan is chosen by what a case says about its origin (repository, file, function, arguments), never by its name. What released code does
by mistake is a small flag of one rule where that is cheap; elsewhere the case is declined, with a reason, and counted as that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as remember
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.buffer import KVBuffer
from dllm_toolkit.cache.delayed import DelayedBlocksCache
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decoders.ascending_steps import ascending_steps
from dllm_toolkit.decoders.base import Commit, Decoder, Propose
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.confidence_adaptive import confidence_adaptive
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.d3llm import d3llm
from dllm_toolkit.decoders.dparallel import dparallel
from dllm_toolkit.decoders.dream import SCORES, Timetable, dream
from dllm_toolkit.decoders.eoser import eoser
from dllm_toolkit.decoders.fast_dllm import FirstOfBlock, fast_dllm
from dllm_toolkit.decoders.freedave import SelfDraft
from dllm_toolkit.decoders.pc_sampler import PositionAndCorpus
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.propose import Sample, Score
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.decoders.window_diffusion import window_diffusion
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.state import Answer, Proposal, State

Case = dict[str, Any]
CACHES: dict[str, Callable[[], Cache]] = {
    "generate": NoCache,
    "generate_with_prefix_cache": PrefixCache,
    "generate_with_dual_cache": DualCache,
}
NEVER = 10000  # d3LLM's "no cache"
FALLBACKS: dict[str, Any] = {"default": "probability", "neg_entropy": "negative_entropy", "margin_confidence": "margin"}


class Declined(Exception):
    """The official behaviour of this case is not reproduced, and why."""


class NotBuilt(Exception):
    """The decoder of this case does not exist here yet."""


def rows(case: Case, name: str) -> list[list[int]]:
    """A field of a case as one list a row, whether or not the case is a batch."""
    value = case[name]
    return value if isinstance(value[0], list) else [value]


def leaves_masks(case: Case) -> bool:
    """Did the official loop end with masks on its canvas?"""
    return any(-1 in row for row in rows(case, "commit_forward"))


def padding(case: Case) -> list[int]:
    """Left padding of each row. Our canvases are padded on the right, and padding is never computed."""
    if "attention_mask" not in case:
        return [0] * len(rows(case, "prompt_ids"))
    return [keep.count(0) for keep in rows(case, "attention_mask")]


def prompts(case: Case) -> list[list[int]]:
    """The prompts of a case without padding."""
    return [prompt[pad:] for prompt, pad in zip(rows(case, "prompt_ids"), padding(case), strict=True)]


@dataclass(frozen=True)
class Plan:
    """A case in this package's words. waits: length of the blocks at whose end the official loop makes rows wait for each other."""

    model: Model
    decoder: Decoder
    cache: Cache
    budget: int
    waits: int | None = None


@remember
def checkpoint(directory: Path, name: str, adapter: str | None = None, attention: Any = None) -> Transformer:
    """A recorded checkpoint, loaded once a process."""
    return load(str(directory / name), adapter=None if adapter is None else str(directory / adapter), attention=attention)


@dataclass(frozen=True)
class Recorded(Propose):
    """A proposal whose random scores are given: 1 - u for the k-th masked position of a row's i-th forward, u = draws[i][k]."""

    inner: Sample
    draws: tuple[tuple[float, ...], ...]

    def __call__(self, answer: Answer, state: State) -> Proposal:
        proposal = self.inner(answer, state)
        width = max(map(len, self.draws))
        table = torch.tensor([[*row, *[1.0] * (width - len(row))] for row in self.draws])
        place = (state.masked.cumsum(1) - 1).clamp(0, width - 1)
        given = 1.0 - table[state.step.clamp(max=len(self.draws) - 1)].gather(1, place)
        return replace(proposal, score=torch.where(proposal.score.isinf(), proposal.score, given.to(proposal.score.dtype)))


class FirstRowTwice:
    """A shifted model as d3LLM's cached Dream code reads it: the first computed position is read from its own row of logits.

    The row that speaks of it was computed in an earlier forward and is gone there; here the buffer remembers it.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.spec, self.device = model, model.spec, model.device

    def buffer(self, rows: int, slots: int) -> KVBuffer:
        return self.model.buffer(rows, slots)

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        assert query.read is not None and query.slots is not None
        read = torch.maximum(query.read, query.slots.amin(1, keepdim=True))
        return self.model(query._replace(read=read), kv)


# What a case's source stands for. Each function gets the case and its base model.


def _quota(case: Case, *, least_steps: int = 1, score: Score = "probability") -> BlockDecoder:
    """Fast-dLLM's loop without a threshold: a quota, and a block ends when it is full."""
    arguments = case["args"]
    return BlockDecoder(
        SemiAutoregressive(arguments["block_length"], least_steps=least_steps),
        Quota(arguments["steps"]),
        Sample(score=score),
        stop=WhenFull(),
    )


def _llada(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    decoder = vanilla(
        steps=arguments["steps"],
        block_length=arguments["block_length"],
        suppress=(arguments["eos_id"],) if arguments.get("logits_eos_inf") else (),
        defer=(arguments["eos_id"], arguments["eot_id"]) if arguments.get("confidence_eos_eot_inf") else (),
        idle_steps=True,
    )
    return Plan(base, decoder, NoCache(), arguments["gen_length"])


def _fast_dllm(case: Case, base: Transformer, *, trailing: bool = False, capped: bool = False, fills: bool = False) -> Plan:
    arguments, cache = case["args"], CACHES[case["function"]]()
    trailing = trailing and not isinstance(cache, NoCache)
    by_evidence = arguments.get("threshold") is not None or arguments.get("factor") is not None
    if by_evidence:
        decoder = fast_dllm(
            block_length=arguments["block_length"],
            threshold=arguments.get("threshold") if arguments.get("factor") is None else None,
            factor=arguments.get("factor"),
            stop_at_eos=fills,
            fill_at_eos=fills,
            official_tail=True,
            step_cap=arguments["steps"] if capped and isinstance(cache, DualCache) else None,
            trailing_forward=trailing,
        )
    else:
        decoder = _quota(case, least_steps=2 if trailing else 1)
    waits = arguments["block_length"] if by_evidence else None
    return Plan(base, decoder, cache, arguments["gen_length"], waits)


def _fast_dllm_first(case: Case, base: Transformer) -> Plan:
    return _fast_dllm(case, base, trailing=True)


def _fast_dllm_v1(case: Case, base: Transformer) -> Plan:
    return _fast_dllm(case, base, capped=True)


def _dinfer(case: Case, base: Transformer) -> Plan:
    early_stop = bool(case["args"].get("early_stop"))
    planned = _fast_dllm(case, base, fills=early_stop)
    if early_stop and any(case["args"]["eos_id"] in prompt for prompt in prompts(case)):
        raise Declined("its early stop takes an end-of-text token of the prompt for the end of the answer")
    if not early_stop or isinstance(planned.cache, NoCache):
        return planned
    assert isinstance(planned.decoder, BlockDecoder)
    return replace(planned, decoder=replace(planned.decoder, stop=AtEos(fill=True, skip_first=True)))


def _dparallel_llada(case: Case, base: Transformer) -> Plan:
    arguments, cache = case["args"], CACHES[case["function"]]()
    cached = not isinstance(cache, NoCache)
    if arguments.get("threshold") is None:
        decoder = _quota(case, least_steps=2 if cached else 1, score="negative_entropy" if cached else "probability")
    else:
        decoder = dparallel(arguments["block_length"], arguments["threshold"], stop_at_eos=False, trailing_forward=cached)
    return Plan(base, decoder, cache, arguments["gen_length"])


def _dparallel_dream(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    decoder = dparallel(arguments["block_length"], arguments["threshold"], strict=True, stop_at_eos=False)
    return Plan(base, decoder, NoCache(), arguments["max_new_tokens"])


def _filters(case: Case) -> dict[str, Any]:
    arguments = case["args"]
    return {"top_p": arguments.get("top_p") or 1.0, "top_k": arguments.get("top_k") or 0}


def _dream(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    decoder = dream(
        steps=arguments["steps"],
        algorithm=arguments["alg"],
        eps=arguments["eps"],
        idle_steps=True,
        **_filters(case),
    )
    if arguments["alg"] == "origin" and "uniform_draws" not in case:
        raise Declined("drawn with the official code's own random numbers")
    if "uniform_draws" in case:
        assert isinstance(decoder.propose, Sample)
        draws = tuple(tuple(row) for row in case["uniform_draws"])
        decoder = replace(decoder, propose=Recorded(decoder.propose, draws))
    return Plan(base, decoder, NoCache(), arguments["max_new_tokens"])


def _fast_dllm_dream(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    if arguments["alg"] != "confidence_threshold":
        return _dream(case, base)
    decoder = fast_dllm(None, threshold=arguments["threshold"], steps=arguments["steps"], stop_at_eos=False)
    decoder = replace(decoder, propose=Sample(evidence="filtered", **_filters(case)))
    return Plan(base, decoder, NoCache(), arguments["max_new_tokens"])


def _fast_dllm_dream_cached(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    block_length, steps = arguments.get("block_length") or arguments["max_new_tokens"], arguments["steps"]
    if arguments["alg"] == "confidence_threshold":
        decoder = fast_dllm(block_length, arguments["threshold"], stop_at_eos=False, trailing_forward=True, first_of_block=True)
        decoder = replace(decoder, propose=Sample(evidence="filtered", **_filters(case)))
    elif steps * block_length == arguments["max_new_tokens"]:
        raise Declined("with one step a block the official loop commits a single token of it and leaves the rest masked")
    else:  # whatever `alg` says, this code ranks by entropy
        commit: Commit = FirstOfBlock(Timetable(steps, arguments["eps"]))
        propose = Sample(score=SCORES["entropy"], evidence="filtered", **_filters(case))
        decoder = BlockDecoder(SemiAutoregressive(block_length, hold=steps), commit, propose, stop=WhenFull())
    return Plan(base, decoder, DualCache() if arguments.get("dual_cache") else PrefixCache(), arguments["max_new_tokens"])


def _cdlm(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    by_entropy = arguments["selection_method"] == "entropy"
    if leaves_masks(case):
        raise Declined("its forced completion passes over held-back end-of-text tokens and leaves masks; ours lifts the gate there")
    decoder = confidence_adaptive(
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
    return Plan(base, decoder, NoCache(), arguments["gen_length"])


def _d2f(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    decoder = d2f(
        block_length=arguments["block_size"],
        threshold=arguments["skip_threshold"],
        add_at=arguments["block_add_threshold"],
        activate_at=arguments["decoded_token_threshold"],
        fallback=FALLBACKS[arguments.get("sampling_strategy", "default")],
        official_loop=True,
        **_filters(case),
    )
    return Plan(base, decoder, BlockCausalCache(), arguments["max_new_tokens"])


def _d3llm(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    shifted = base.spec.shift == 1  # its Dream code has another comparison and no best position of a step
    decoder = d3llm(
        block_length=arguments["block_size"],
        entropy=arguments["threshold"],
        add_at=arguments["block_add_threshold"],
        minimum=0 if shifted else 1,
        strict=shifted,
        stop_at_eos=bool(arguments.get("early_stop")),
    )
    delay = arguments.get("cache_delay_iter", NEVER)
    cache = NoCache() if delay >= NEVER else DelayedBlocksCache(delay + 1, arguments["refresh_interval"])
    model: Model = base if isinstance(cache, NoCache) or not shifted else FirstRowTwice(base)
    return Plan(model, decoder, cache, arguments["max_new_tokens"])


def _eoser(case: Case, base: Transformer) -> Plan:
    arguments, function = case["args"], case["function"]
    if function == "ass_generate":  # its `steps`, floor(log2 length), is not asked for
        decoder = ascending_steps(stages=arguments["block_num"], stop_at_eos=False)
    else:
        ascending = function == "eoser_ass_generate"
        decoder = eoser(
            steps=None if ascending else arguments["steps"],
            block_length=None if ascending else arguments["block_length"],
            low=arguments["eos_min_gamma"],
            high=arguments["eos_max_gamma"],
            ascending=ascending,
            stages=arguments["block_num"] if ascending else 1,
            late=(arguments["eos_id"],),
            stop_at_eos=False,
        )
    return Plan(base, decoder, NoCache(), arguments["gen_length"])


def _window_llada(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    decoder = window_diffusion(
        arguments["window_tokens"],
        arguments["active_tokens"],
        arguments["refresh_cycle"] or arguments["window_size"],
        arguments["steps"],
        score="probability",
        stop_at_eos=False,
        whole_refresh=True,
    )
    return Plan(base, decoder, DualCache(), arguments["gen_length"])


def _window_dream(case: Case, base: Transformer) -> Plan:
    arguments, early = case["args"], case["args"]["early_stop"]
    if early and any(arguments["eos_id"] in prompt for prompt in prompts(case)):
        raise Declined("its early stop takes an end-of-text token of the prompt for the end of the answer")
    decoder = window_diffusion(
        arguments["o_win_size"] - 1,  # it keeps the masks of a rank below that
        arguments["i_win_size"],
        arguments["refresh_cycle"],
        None if early else arguments["steps"],
        None if early else arguments["eps"],
        score=SCORES[arguments["alg"]],
        slide=arguments["slide_window"],
        stop_at_eos=early,
        first_at_refresh=True,
        contiguous=True,
        refresh_at_end=early,
        idle_steps=not early,
    )
    return Plan(base, decoder, DualCache(), arguments["max_new_tokens"])


def _freedave(case: Case, base: Transformer) -> Plan:
    arguments = case["args"]
    if arguments.get("eager_acceptance_mode"):
        raise Declined("once a block is full its eager mode commits drafts that were made from an earlier canvas and that nothing verifies")
    threshold, first_of_block = arguments["confidence_threshold"], bool(base.spec.shift)
    commit: Commit = Quota() if threshold is None else Gate(threshold)
    propose: Propose = Sample(evidence="filtered", **_filters(case))
    if arguments["alg_temp"] == -1:  # from left to right
        propose = PositionAndCorpus(decay=1e6, inner=propose)
    static = BlockDecoder(
        SemiAutoregressive(arguments["block_length"]),
        FirstOfBlock(commit) if first_of_block else commit,
        propose,
        stop=AtEos() if arguments["early_exit"] else WhenFull(),
    )
    cache = DualCache() if arguments["dual_cache"] else PrefixCache()
    if "draft_steps" not in arguments:
        return Plan(base, static, cache, arguments["max_gen_length"])
    form: Literal["tree", "batch"] = "tree" if arguments["draft_mode"] == "tree_attention" else "batch"
    drafting = SelfDraft(static, arguments["draft_steps"], form, match="subset", official_loop=True)
    return Plan(base, drafting, cache, arguments["max_gen_length"])


@dataclass(frozen=True)
class Source:
    """Where official code comes from: how the repository starts, how the file ends, and what it is here (None: not built yet)."""

    repository: str
    file: str
    plan: Callable[[Case, Transformer], Plan] | None

    def covers(self, case: Case) -> bool:
        source = case["source"]
        return source["repo"].startswith(self.repository) and source["file"].endswith(self.file)


SOURCES = (
    Source("ML-GSAI/LLaDA", "generate.py", _llada),
    Source("NVlabs/Fast-dLLM", "v1/llada/generate.py", _fast_dllm_v1),
    Source("NVlabs/Fast-dLLM", "llada/generate.py", _fast_dllm_first),
    Source("NVlabs/Fast-dLLM", "dream/model/generation_utils.py", _fast_dllm_dream),
    Source("NVlabs/Fast-dLLM", "dream/model/generation_utils_block.py", _fast_dllm_dream_cached),
    Source("inclusionAI/dInfer", "generate_fastdllm.py", _dinfer),
    Source("czg1225/dParallel", "LLaDA/generate.py", _dparallel_llada),
    Source("czg1225/dParallel", "generation_utils_semiar.py", _dparallel_dream),
    Source("Dream-org/Dream", "generation_utils.py", _dream),
    Source("yihao-liang/CDLM", "LLaDA_generate_dynamic.py", _cdlm),
    Source("zhijie-group/Discrete-Diffusion-Forcing", ".py", _d2f),
    Source("hao-ai-lab/d3LLM", ".py", _d3llm),
    Source("yjyddq/EOSER-ASS-RL", ".py", _eoser),
    Source("cychomatica/FreeDave", ".py", _freedave),
    Source("vhicrgit/Window-Diffusion", "llada/model/modeling_llada.py", _window_llada),
    Source("vhicrgit/Window-Diffusion", "dream/model/generation_utils.py", _window_dream),
)


def plan(case: Case, directory: Path) -> Plan:
    """The model, decoder and cache that a case stands for. Raises NotBuilt or Declined."""
    source = next((one for one in SOURCES if one.covers(case)), None)
    if source is None or source.plan is None:
        raise NotBuilt(f"no decoder here for {case['source']['repo']}, {case['source']['file']}")
    arguments = case["args"]
    random = ("remasking", "selection_method")
    drawn = arguments.get("temperature") or (arguments.get("alg_temp") or 0) > 0  # FreeDave writes -1 for left to right
    if drawn or any(arguments.get(name) == "random" for name in random):
        raise Declined("drawn with the official code's own random numbers")
    attention = "block_causal" if source.plan is _d2f else None
    base = checkpoint(directory, case["checkpoint"], case.get("adapter"), attention)
    planned = source.plan(case, base)
    scale = arguments.get("cfg_scale")
    return replace(planned, model=Guided(base, scale)) if scale else planned
