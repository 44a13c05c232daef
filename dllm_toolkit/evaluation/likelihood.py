"""log p(answer | prompt): exact for a causal model, a Monte-Carlo lower bound for a masked diffusion model.

    causal           one forward: the sum of log softmax
    full             draw l uniformly from 1 .. L, hide l of the answer's L tokens, all choices alike, weigh their loss by L / l
    block_causal     the same in every block, given the prompt and the clean blocks before it; the sum over the blocks

The expectation is the mean over all orders in which the answer can be written, one token after the other, of the answer's log
probability in that order, so it is a lower bound of the log probability that a random order gives (LLaDA, arXiv 2502.09992; blocks: BD3-LM,
arXiv 2503.09573). With an answer, or a block, of few tokens there are fewer choices than samples; then each is asked once and the bound is
exact.

A block-causal model is asked about all blocks in one forward on `[clean canvas | noisy canvas]`, as BD3-LM is trained:

    two blocks a, b; the noisy half marked '            p  a1 a2 b1 b2   a1' a2' b1' b2'
    a1'  sees the prompt and its own noisy block        x  .  .  .  .    x   x   .   .
    b1'  also the clean blocks before its own           x  x  x  .  .    .   .   x   x

Draws come from the stateless noise (ops/noise.py), keyed by a pair's seed: a pair's number does not depend on its company.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.base import Model, Query
from dllm_toolkit.ops import noise, score, select
from dllm_toolkit.ops.masks import absolute_blocks, answer_blocks, block_causal
from dllm_toolkit.types import ModelSpec

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of the answer that is judged."""
_COUNT, _ORDER = 0x11CE, 0x0DD5  # salts: how many tokens are hidden, and which ones


class LikelihoodError(ToolkitError):
    """A likelihood that this model cannot give."""


@dataclass(frozen=True)
class LikelihoodOptions:
    """How a bound is estimated; a causal model needs none of it.

    samples: masks drawn for each answer (LLaDA's evaluation: 128). draw: how the number of hidden tokens is drawn, `stratified`: one in
    each of `samples` equal parts of 1 .. L, or `independent`; the mean is the same, the variance of the first is smaller. greedy: also
    find out whether the argmax decode is the answer, which takes up to one forward a token.
    """

    samples: int = 128
    draw: Literal["stratified", "independent"] = "stratified"
    greedy: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise LikelihoodError(f"samples must be at least 1, got {self.samples}. They are masks drawn of an answer. Write samples: 128.")


@dataclass(frozen=True)
class Likelihood:
    """What a model says of an answer.

    value: nats, log p(answer | prompt) or a lower bound of it. exact: without Monte-Carlo noise (of the bound, where it is one).
    standard_error: of the value, nats, from differences of successive samples; None where one sample says nothing of it. greedy: is the
    answer what the model writes when each forward decides the one most confident token (of the first open block); None if not asked.
    forwards, lanes: model invocations and query tokens.
    """

    value: float
    exact: bool
    standard_error: float | None
    greedy: bool | None
    forwards: int
    lanes: int


def log_likelihoods(
    model: Model,
    pairs: Sequence[Pair],
    *,
    options: LikelihoodOptions | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
) -> list[Likelihood]:
    """The likelihood of each answer given its prompt. batch_size: canvases of one forward. seed: noise key, one for all or one a pair.

    Raises LikelihoodError before any forward: an empty prompt, ids outside the vocabulary, a pair beyond the model's positions, a
    block-causal model whose block length is not known.
    """
    options = options or LikelihoodOptions()
    seeds = [seed] * len(pairs) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(pairs):
        raise LikelihoodError(f"one seed a pair, got {len(seeds)} for {len(pairs)} pairs. Write one number for all, or one for each.")
    if batch_size < 1:
        raise LikelihoodError(f"batch_size must be at least 1, got {batch_size}. It counts canvases. Write batch_size: 32.")
    check_pairs(model.spec, pairs)
    with torch.inference_mode():
        if model.spec.attention == "causal":
            return _causal(model, pairs, batch_size)
        found = _bounds(model, pairs, options, [one & 0xFFFFFFFF for one in seeds], batch_size)
        if not options.greedy:
            return found
        checked = _greedy(model, pairs, batch_size)
    return [
        Likelihood(one.value, one.exact, one.standard_error, right, one.forwards + forwards, one.lanes + lanes)
        for one, (right, forwards, lanes) in zip(found, checked, strict=True)
    ]


def check_pairs(spec: ModelSpec, pairs: Sequence[Pair]) -> None:
    """Can this model judge these answers? Raises LikelihoodError for the first that it cannot."""
    if spec.attention == "causal" and spec.shift != 1:
        raise LikelihoodError("a causal model with shift 0 sees the token it predicts, got attention causal and shift 0. Write shift: 1.")
    if spec.attention == "block_causal" and spec.block_size is None:
        raise LikelihoodError(
            "the likelihood of a block-causal model goes block by block, got a model that does not say how long its blocks are. "
            "Write block_size in its load: {_component_: load, path: ..., attention: block_causal, block_size: 32}."
        )
    for number, (prompt, answer) in enumerate(pairs):
        if len(prompt) == 0:
            raise LikelihoodError(f"the prompt of pair {number} is empty. A model starts from a token. Put its start token there.")
        length = len(prompt) + len(answer)
        if length > spec.max_positions:
            raise LikelihoodError(
                f"pair {number} is too long, got {len(prompt)} tokens of prompt and {len(answer)} of answer with {spec.max_positions} "
                "positions. Shorten the prompt, or ask a model with more."
            )
        wrong = [one for one in (*prompt, *answer) if not 0 <= one < spec.vocab_size]
        if wrong:
            raise LikelihoodError(
                f"pair {number} holds an id outside the vocabulary, got {wrong[0]} with {spec.vocab_size} rows. "
                "Encode it with the checkpoint's own tokenizer."
            )
        if spec.mask_id in answer:
            raise LikelihoodError(
                f"the answer of pair {number} holds the mask token, got id {spec.mask_id}. No model writes it. Judge a text without it."
            )


class _Drawn(NamedTuple):
    """Masks of one answer of L tokens, a row each, and what the loss of a hidden token counts in it; the bound is the sum of it all.

    noisy: rows whose sum is a Monte-Carlo sample, in the order of the draws; the part of the bound that is exact lies in `weight` too.
    """

    masked: Bool[Tensor, "N L"]
    exact: Float[Tensor, "N L"]
    noisy: Float[Tensor, "N L"]
    sampled: int


@dataclass(frozen=True)
class _Sums:
    """What has been added up for one answer."""

    exact: list[float] = field(default_factory=list)
    noisy: dict[int, float] = field(default_factory=dict)


def draw_masks(groups: Sequence[int], options: LikelihoodOptions, seed: int) -> _Drawn:
    """The masks of one answer that consists of groups (blocks) of these lengths, each hidden independently of the others.

    A group of g tokens with 2^g - 1 <= samples has each of its choices once, at 1 / (l C(g, l)); any other is drawn, at g / (l samples).
    """
    least = [(1 << size) - 1 for size in groups]
    rows = max((count if count <= options.samples else options.samples for count in least), default=0)
    masked = torch.zeros(rows, sum(groups), dtype=torch.bool)
    exact, noisy = torch.zeros(masked.shape, dtype=torch.float64), torch.zeros(masked.shape, dtype=torch.float64)
    begin, sampled = 0, 0
    for number, (size, count) in enumerate(zip(groups, least, strict=True)):
        part = slice(begin, begin + size)
        begin += size
        if count <= options.samples:
            choice = torch.arange(1, count + 1)
            masked[:count, part] = (choice.unsqueeze(1) >> torch.arange(size)) & 1 == 1
            hidden = masked[:count, part].sum(1, keepdim=True)
            ways = torch.tensor([math.comb(size, int(one)) for one in hidden], dtype=torch.float64).unsqueeze(1)
            exact[:count, part] = masked[:count, part] / (hidden * ways)
            continue
        sampled = options.samples
        row = torch.arange(sampled)
        key, salt = torch.tensor(seed), torch.tensor
        drawn = noise.uniform(salt(_COUNT), key, salt(number), row).double()
        if options.draw == "stratified":
            drawn = (row + drawn) / sampled
        hidden = (1 + (drawn * size).long()).clamp(max=size).unsqueeze(1)  # [samples, 1]
        order = noise.uniform(salt(_ORDER), key, salt(number), row.unsqueeze(1), torch.arange(size))
        among = torch.ones(sampled, size, dtype=torch.bool)
        masked[:, part] = select.rank(order, among) < hidden
        noisy[:, part] = masked[:, part] * (size / (hidden * sampled).double())
    return _Drawn(masked, exact, noisy, sampled)


class _Canvas(NamedTuple):
    """One forward's question about one row: the canvas as it is, and the answer as it is shown."""

    prompt: Sequence[int]
    answer: Sequence[int]
    shown: Sequence[int]


def _ask(model: Model, rows: Sequence[_Canvas], doubled: bool) -> tuple[Float[Tensor, "B A V"], list[int]]:
    """Logits of every answer position (padded to the longest answer), and the number of query tokens of each row.

    doubled: `[clean | noisy]` for block-causal models; otherwise one canvas that holds what is shown.
    """
    spec = model.spec
    device = torch.device(getattr(model, "device", "cpu"))
    sizes = [len(row.prompt) + len(row.answer) for row in rows]
    length, longest = max(sizes), max(len(row.answer) for row in rows)

    def table(lines: Sequence[Sequence[int]]) -> Int[Tensor, "B L"]:
        return torch.tensor([[*line, *[spec.pad_id] * (length - len(line))] for line in lines], device=device)

    begin = torch.tensor([len(row.prompt) for row in rows], device=device)
    inside = torch.arange(length, device=device) < torch.tensor(sizes, device=device).unsqueeze(1)  # [B, L]
    tokens = table([[*row.prompt, *row.shown] for row in rows])
    positions = torch.arange(length, device=device).expand(len(rows), length)
    prompt = positions < begin.unsqueeze(1)
    # The position that each answer token is read at; behind a shorter answer its last one is read again.
    wanted = begin.unsqueeze(1) + torch.arange(longest, device=device)
    wanted = torch.minimum(wanted, inside.sum(1, keepdim=True) - 1)
    source = wanted - spec.shift
    itself = torch.eye(length, dtype=torch.bool, device=device)
    if spec.attention == "full":
        allow = None if all(size == length for size in sizes) else inside.unsqueeze(1).expand(-1, length, -1)
    elif spec.attention == "causal":
        allow = None  # what stands behind a row is not seen by it
    else:
        assert spec.block_size is not None
        if spec.block_anchor == "prompt":
            block = answer_blocks(begin, length, spec.block_size)
        else:
            block = absolute_blocks(len(rows), length, spec.block_size, device)
        allow = block_causal(block) & inside.unsqueeze(1) | itself
        if doubled:
            before, same = block.unsqueeze(1) < block.unsqueeze(2), block.unsqueeze(1) == block.unsqueeze(2)
            noisy = torch.cat((before & inside.unsqueeze(1), same & inside.unsqueeze(1) | itself), dim=2)
            clean = torch.cat((allow, torch.zeros_like(allow)), dim=2)
            allow = torch.cat((clean, noisy), dim=1)  # [B, 2 L, 2 L]
            # With a shift, a block's first token is predicted by the last one of the block before it, which is clean by then.
            source = torch.where(block.gather(1, source) == block.gather(1, wanted), source + length, source)
            tokens = torch.cat((table([[*row.prompt, *row.answer] for row in rows]), tokens), dim=1)
            positions, prompt = torch.cat((positions, positions), dim=1), torch.cat((prompt, prompt), dim=1)
    logits = model(Query(tokens, positions, None, allow, source, prompt))
    return logits, [size * (2 if doubled else 1) for size in sizes]


def _losses(logits: Float[Tensor, "B A V"], rows: Sequence[_Canvas]) -> Float[Tensor, "B A"]:
    """-log p of every token of the answers, float64 on the host; 0 behind an answer."""
    longest = logits.shape[1]
    target = torch.tensor([[*row.answer, *[0] * (longest - len(row.answer))] for row in rows], device=logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = wide.logsumexp(-1) - wide.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    live = torch.arange(longest, device=logits.device) < torch.tensor([[len(row.answer)] for row in rows], device=logits.device)
    return torch.where(live, loss, 0.0).double().cpu()


def _causal(model: Model, pairs: Sequence[Pair], batch_size: int) -> list[Likelihood]:
    found = [Likelihood(0.0, True, 0.0, True, 0, 0)] * len(pairs)
    for numbers in _chunks(pairs, batch_size):
        rows = [_Canvas(*pairs[number], pairs[number][1]) for number in numbers]
        logits, lanes = _ask(model, rows, doubled=False)
        losses, best = _losses(logits, rows), logits.argmax(-1).tolist()
        for place, number in enumerate(numbers):
            answer = list(pairs[number][1])
            greedy = best[place][: len(answer)] == answer
            found[number] = Likelihood(-float(losses[place].sum()), True, 0.0, greedy, 1, lanes[place])
    return found


def _bounds(model: Model, pairs: Sequence[Pair], options: LikelihoodOptions, seeds: Sequence[int], batch_size: int) -> list[Likelihood]:
    spec = model.spec
    doubled = spec.attention == "block_causal"
    drawn = [draw_masks(groups_of(spec, len(prompt), len(answer)), options, seeds[i]) for i, (prompt, answer) in enumerate(pairs)]
    jobs = [(number, row) for number, one in enumerate(drawn) for row in range(len(one.masked))]
    sums = [_Sums() for _ in pairs]
    lanes = [0] * len(pairs)
    for chosen in _chunks([pairs[number] for number, _ in jobs], batch_size):
        rows = []
        for job in chosen:
            (prompt, answer), hidden = pairs[jobs[job][0]], drawn[jobs[job][0]].masked[jobs[job][1]].tolist()
            rows.append(_Canvas(prompt, answer, [spec.mask_id if gone else one for one, gone in zip(answer, hidden, strict=True)]))
        logits, used = _ask(model, rows, doubled)
        losses = _losses(logits, rows)
        for place, job in enumerate(chosen):
            number, row = jobs[job]
            loss = losses[place, : len(pairs[number][1])]
            sums[number].exact.append(float((loss * drawn[number].exact[row]).sum()))
            sums[number].noisy[row] = float((loss * drawn[number].noisy[row]).sum())
            lanes[number] += used[place]
    found = []
    for one, total, tokens in zip(drawn, sums, lanes, strict=True):
        samples = [total.noisy[row] for row in range(one.sampled)]
        # math.fsum: the order in which forwards came must not show.
        value = -math.fsum([*total.exact, *samples])
        found.append(Likelihood(value, one.sampled == 0, _standard_error(samples), None, len(one.masked), tokens))
    return found


def _standard_error(samples: Sequence[float]) -> float | None:
    """Of the sum of `samples`, each the n-th part of a draw: right for independent draws, too large for stratified ones."""
    count = len(samples)
    if count == 0:
        return 0.0
    if count == 1:
        return None
    steps = math.fsum((after - before) ** 2 for before, after in zip(samples, samples[1:], strict=False))
    return math.sqrt(count * steps / (2 * (count - 1)))


def groups_of(spec: ModelSpec, prompt_length: int, answer_length: int) -> list[int]:
    """Lengths of the parts of an answer that are hidden independently: the answer itself, or what each block holds of it."""
    if answer_length == 0:
        return []
    if spec.attention != "block_causal":
        return [answer_length]
    assert spec.block_size is not None
    first = spec.block_size - (prompt_length % spec.block_size if spec.block_anchor == "absolute" else 0)
    sizes = [min(first, answer_length)]
    while sum(sizes) < answer_length:
        sizes.append(min(spec.block_size, answer_length - sum(sizes)))
    return sizes


def _greedy(model: Model, pairs: Sequence[Pair], batch_size: int) -> list[tuple[bool, int, int]]:
    """Of each pair: does the most confident token, forward by forward, always belong to the answer? Forwards and query tokens of it.

    What was decided so far is the answer's own, so a row leaves with the first token that is not.
    """
    spec = model.spec
    found: list[tuple[bool, int, int]] = [(True, 0, 0)] * len(pairs)
    for numbers in _chunks(pairs, batch_size):
        open_: dict[int, list[bool]] = {number: [True] * len(pairs[number][1]) for number in numbers}
        while open_:
            asked = list(open_)
            rows = [_Canvas(*pairs[n], [spec.mask_id if m else t for t, m in zip(pairs[n][1], open_[n], strict=True)]) for n in asked]
            logits, lanes = _ask(model, rows, doubled=False)
            place, token = _most_confident(spec, logits, pairs, open_)
            for index, number in enumerate(asked):
                right, forwards, tokens = found[number]
                right = token[index] == pairs[number][1][place[index]]
                found[number] = (right, forwards + 1, tokens + lanes[index])
                open_[number][place[index]] = False
                if not right or not any(open_[number]):
                    del open_[number]
    return found


def _most_confident(
    spec: ModelSpec, logits: Float[Tensor, "B A V"], pairs: Sequence[Pair], open_: dict[int, list[bool]]
) -> tuple[list[int], list[int]]:
    """Of each row the place of the surest hidden token, in its first open block, and that token."""
    width = logits.shape[1]
    logits = logits.clone()
    logits[..., spec.mask_id] = float("-inf")  # as in every decoder
    best = logits.argmax(-1)  # [B, A]
    sure = score.probability(logits, best)
    among = torch.zeros(best.shape, dtype=torch.bool)
    for index, (number, hidden) in enumerate(open_.items()):
        begin = 0
        for size in groups_of(spec, len(pairs[number][0]), len(hidden)):
            if any(hidden[begin : begin + size]):
                among[index, begin : begin + size] = torch.tensor(hidden[begin : begin + size])
                break
            begin += size
    place = select.rank(sure, among.to(sure.device)).eq(0).long().argmax(1)
    assert width == among.shape[1]
    return place.tolist(), best.gather(1, place.unsqueeze(1)).squeeze(1).tolist()


def _chunks(pairs: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Numbers of the pairs, `size` at a time, long ones together; pairs with an empty answer are in none."""
    order = sorted((number for number, pair in enumerate(pairs) if len(pair[1])), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
