"""An autoregressive model owns the text; a masked diffusion model drafts it several tokens at a time. DEER, arXiv 2512.15176.

    prefix of n decided tokens, answer budget left
    draft     one forward of the drafter over [prefix | masks]: K tokens d_1 .. d_K, each drawn from its own q_j
    verify    one forward of the target over the last decided token and the drafts: p_1 .. p_{K+1}
    accept    d_j while all before it were, with probability min(1, p_j(d_j) / q_j(d_j)); greedy: while it is the target's argmax
    commit    the accepted ones and one token more: from (p - q)+ at the first refusal, from p_{K+1} if there was none

Standard speculative sampling: the text is distributed as if the target had written it alone, and is the same text when the target is
greedy. Every round commits a token or more, so it never takes more target forwards than tokens. The target's keys and values live in
the usual engine; what a round computed from accepted drafts is kept, so with the block-causal cache a round runs K + 1 lanes.

A draft of several steps, by any decoder, has no q that could be written down: each token depends on others that were drawn before it.
It then counts as certain (q is 1 at the draft), which is exact for any draft and accepts p(d) instead of min(1, p(d) / q(d)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dllm_toolkit.cache.base import Cache
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import Output, Stats, Template, check_prompts, loop, start
from dllm_toolkit.decoders.autoregressive import NextToken
from dllm_toolkit.decoders.base import DecodeError, Decoder, check
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.revise import Keep
from dllm_toolkit.decoders.rules.schedule import blocks_of
from dllm_toolkit.decoders.rules.stop import AtEos, WhenFull
from dllm_toolkit.drivers.base import Driver
from dllm_toolkit.engine import Engine
from dllm_toolkit.models.base import Model
from dllm_toolkit.ops import lanes, noise
from dllm_toolkit.recipe_hints import Lazy
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Proposal, Region, State
from dllm_toolkit.types import Canvas, Need, Tokens

# Salts that keep the three draws of a position apart.
_DRAFT, _ACCEPT, _COMMIT = 0xD12AF7, 0xACCE97, 0xC0331


@register("driver", "deer")
@dataclass(frozen=True)
class ExternalVerify(Driver):
    """A masked diffusion drafter proposes, the autoregressive `model` verifies: the target's text in fewer of its forwards.

    drafter: the model that drafts; same vocabulary. draft_length: the most tokens drafted in a round. draft: a decoder that drafts in up
    to `draft_steps` steps; null drafts everything from one forward, which is the paper's way. draft_canvas: the masks that the drafter
    sees, up to the end of the `answer` (how LLaDA was trained), or the drafted `window` only. separator: id of the token that it sees
    behind the window, if it was trained with one (objective deer_continuation). draft_cache: the drafter's K/V reuse.

    The configuration's decoder is `autoregressive`; its temperature, top_p and top_k hold for the target and for a one-forward draft.
    Forwards (nfe) and lanes count both models; `target_forwards`, `draft_forwards`, `target_lanes`, `draft_lanes`, `drafted` and
    `accepted` stand beside them in `Stats.extra`.

    Reference: DEER, arXiv 2512.15176; speculative sampling, arXiv 2211.17192.
    """

    cite = ("2512.15176", "2211.17192")
    lossless = True
    other_models = ("drafter",)

    drafter: Lazy[Model] | str
    draft_length: int = 32
    draft: Decoder | None = None
    draft_steps: int = 1
    draft_canvas: Literal["answer", "window"] = "answer"
    separator: int | None = None
    draft_cache: Cache = field(default_factory=NoCache)

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise DecodeError(f"draft_length must be 1 or more, got {self.draft_length}. It counts drafted tokens. Write draft_length: 32.")
        if self.draft_steps < 1:
            raise DecodeError(f"draft_steps must be 1 or more, got {self.draft_steps}. It counts steps of a draft. Write draft_steps: 1.")
        if self.draft is None and self.draft_steps > 1:
            raise DecodeError(
                f"draft_steps counts steps of the decoder under draft, got {self.draft_steps} and no draft. One forward drafts everything. "
                "Write draft: {_component_: fast_dllm}, or leave draft_steps out."
            )
        if self.separator is not None and self.draft_canvas != "window":
            raise DecodeError(
                f"a separator stands behind the drafted window, got {self.separator} and draft_canvas={self.draft_canvas}. There "
                "masks go on. Write draft_canvas: window."
            )

    def check(self, model: Model, decoder: Decoder, cache: Cache) -> None:
        check(model.spec, decoder, cache)
        _target_of(decoder)
        drafter = self.other("drafter")
        if not Need.BIDIRECTIONAL.met_by(drafter.spec):
            raise DecodeError(
                f"the drafter must fill masks, got attention={drafter.spec.attention} shift={drafter.spec.shift}. An autoregressive model "
                "cannot draft several tokens at once. Write a masked diffusion model."
            )
        if self.draft is None:
            for need in self.draft_cache.needs:
                if not need.met_by(drafter.spec):
                    raise DecodeError(
                        f"draft_cache does not fit the drafter, got attention={drafter.spec.attention}. It needs {need.value}. "
                        "Write draft_cache: none."
                    )
        else:
            check(drafter.spec, self.draft, self.draft_cache)
        if self.separator is not None and not 0 <= self.separator < drafter.spec.vocab_size:
            raise DecodeError(
                f"separator is an id outside the vocabulary, got {self.separator} with {drafter.spec.vocab_size} rows. The drafter reads "
                "it. Write the separator that it was trained with."
            )
        _same_vocabulary(model, drafter)

    def run(
        self,
        model: Model,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        templates: Sequence[Template] | None = None,
        cache: Cache | None = None,
        seed: int | Sequence[int] = 0,
        max_steps: int | None = None,
        compile: bool = False,
        callback: Callable[[State], None] | None = None,
        throw: bool = True,
    ) -> Output:
        """Answers for a batch of prompts; DecodeError for models that do not fit each other, and whatever `decode` refuses."""
        self.check(model, decoder, NoCache() if cache is None else cache)
        drafter = self.other("drafter")
        begun = start(
            model,
            decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            templates=templates,
            cache=cache,
            seed=seed,
            compile=compile,
            max_reads=self.draft_length + 1,
        )
        check_prompts(drafter.spec, prompts, begun.budget)
        if getattr(drafter, "device", None) != getattr(model, "device", None):
            raise DecodeError(
                f"target and drafter must be on one device, got {getattr(model, 'device', None)} and {getattr(drafter, 'device', None)}. "
                "They exchange drafts in every round. Move one of them."
            )
        reads = max(begun.budget) if self.draft is not None else self.draft_length
        with torch.inference_mode():
            first = replace(begun.state, spec=drafter.spec)
        rounds = _Rounds(self, _target_of(decoder), Engine(drafter, self.draft_cache, first, max_reads=reads, compile=compile), begun.state)
        output = loop(begun, rounds.step, max_steps=max_steps, callback=callback, throw=throw)
        return replace(output, stats=rounds.account(output))


class _Rounds:
    """One generation: the step that `loop` repeats. The drafter's engine is its only memory besides two counters."""

    def __init__(self, driver: ExternalVerify, target: BlockDecoder, engine: Engine, first: State) -> None:
        self.driver, self.rules, self.engine = driver, _Rules(target), engine
        self.drafted, self.accepted = torch.zeros_like(first.step), torch.zeros_like(first.step)

    def step(self, engine: Engine, state: State) -> State:
        """One round: draft, verify, accept, commit."""
        place, limit = _next_run(state, self.driver.draft_length)
        tokens, where, odds = self._draft(state, place, limit)
        ending = torch.where(where & state.is_eos(tokens), state.positions, state.tokens.shape[1]).amin(1, keepdim=True)
        where = where & (state.positions <= ending)  # what is drafted behind an end of text is of no use
        hypothesis, count = state.write(where, tokens), where.sum(1)
        answer = engine.ask(hypothesis, _verify_region(state, place, count))
        after, final, accepted = engine.unit(self.rules.decide)(answer, odds, hypothesis, state, place, count)
        engine.accept(after, final)
        alive = (~state.done).long()
        self.drafted, self.accepted = self.drafted + count * alive, self.accepted + accepted * alive
        return after

    def _draft(self, state: State, place: Int[Tensor, "B"], limit: Int[Tensor, "B"]) -> tuple[Tokens, Canvas, Tensor | None]:
        """Drafted tokens and where they stand [B, L]; and what they were drawn from [B, R, V], lane j for place + j (None: certain)."""
        driver, spec = self.driver, self.engine.model.spec
        window = state.masked & (state.positions >= place.unsqueeze(1)) & (state.positions < (place + limit).unsqueeze(1))
        end = state.end if driver.draft_canvas == "answer" else torch.minimum(state.end, place + limit)
        masked = state.masked & (state.positions < end.unsqueeze(1))
        behind = spec.pad_id if driver.separator is None else driver.separator
        end = end if driver.separator is None else end + 1  # the place of the round's own token, so there always is one
        view = replace(
            state,
            tokens=torch.where(masked, spec.mask_id, state.tokens.masked_fill(state.masked, behind)),
            masked=masked,
            fixed=~masked,
            end=end,
            done=state.done | (limit == 0),
            spec=spec,
        )
        if driver.draft is None:
            answer = self.engine.ask(view, _draft_region(view, window, place, limit))
            return self.engine.unit(self.rules.draw)(answer, view, window)
        view = driver.draft.init(view)
        for _ in range(driver.draft_steps):
            further = driver.draft.step(self.engine, view)
            if self.engine.finished(further):
                break
            view = further
        open_from = torch.where(window & view.masked, state.positions, state.masked.shape[1]).amin(1, keepdim=True)
        return view.tokens, window & (state.positions < open_from), None

    def account(self, output: Output) -> Stats:
        """The target's account with the drafter's forwards and lanes added, and both of them apart."""
        stats, drafter = output.stats, self.engine
        counted = [item.name for item in fields(stats) if isinstance(getattr(drafter, item.name, None), Tensor)]  # what an engine counts
        both = {
            name: [one + other for one, other in zip(getattr(stats, name), getattr(drafter, name).tolist(), strict=True)]
            for name in counted
        }
        return replace(
            stats,
            **both,
            extra={
                "target_forwards": stats.nfe,
                "draft_forwards": drafter.nfe.tolist(),
                "target_lanes": stats.lanes,
                "draft_lanes": drafter.lanes.tolist(),
                "drafted": self.drafted.tolist(),
                "accepted": self.accepted.tolist(),
            },
        )


@dataclass(frozen=True)
class _Rules:
    """The two decisions of a round, each one graph without a host read."""

    target: BlockDecoder

    def draw(self, answer: Answer, view: State, window: Canvas) -> tuple[Tokens, Canvas, Float[Tensor, "B R V"]]:
        """Every drafted position drawn from its own distribution, all from one forward: tokens, where, the distributions."""
        q = self._distribution(answer.logits, view)
        drawn = _sample(q, _DRAFT, view, answer.positions)
        return lanes.to_canvas(drawn, answer.positions, view.tokens.shape[1], view.spec.pad_id), window, q

    def decide(
        self,
        answer: Answer,
        odds: Float[Tensor, "B R V"] | None,
        hypothesis: State,
        state: State,
        place: Int[Tensor, "B"],
        count: Int[Tensor, "B"],
    ) -> tuple[State, Canvas, Int[Tensor, "B"]]:
        """After the target's forward: the next state, positions whose K/V are final, and how many drafts were accepted."""
        length = state.tokens.shape[1]
        p = self._distribution(answer.logits, state)  # [B, R, V]
        lane = torch.arange(p.shape[1], device=p.device).unsqueeze(0)
        proposed = lane < count.unsqueeze(1)  # lane j holds the draft of position place + j
        drafts = lanes.to_lanes(hypothesis.tokens, answer.positions, 0)
        drafts = drafts.masked_fill(~proposed, 0).unsqueeze(-1)  # [B, R, 1]; what stands behind them may be no id
        q = _one_hot(drafts.squeeze(-1), p) if odds is None else odds[:, : p.shape[1]].to(p.dtype)
        q = F.pad(q, (0, 0, 0, p.shape[1] - q.shape[1]))
        q = q * proposed.unsqueeze(-1)  # where nothing was drafted, what (p - q)+ leaves is p
        luck = noise.uniform(*_keys(_ACCEPT, state, answer.positions)).to(p.dtype)
        chance = p.gather(-1, drafts).squeeze(-1)
        good = proposed & (luck * q.gather(-1, drafts).squeeze(-1) < chance)
        accepted = good.long().cumprod(1).sum(1)  # [B]
        last = (place + accepted).unsqueeze(1)  # the position of the round's own token
        here = accepted.view(-1, 1, 1).expand(-1, 1, p.shape[-1])
        own = p.gather(1, here)  # [B, 1, V]
        rest = (own - q.gather(1, here)).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, own)  # p <= q everywhere is rounding: p = q would not have refused
        token = _sample(rest, _COMMIT, state, last)  # [B, 1]
        tokens = torch.where(state.positions == last, token, hypothesis.tokens)
        after = state.write((state.positions >= place.unsqueeze(1)) & (state.positions <= last) & state.masked, tokens)
        sure = lanes.to_canvas(chance, answer.positions, length, float("-inf"))
        proposal = Proposal(tokens, sure, sure, answer.logits, answer.positions)
        after = after.finish(self.target.stop.check(proposal, _verify_region(state, place, count), after))
        after = after.advance(*self.target.schedule.advance(after))
        return after, state.positions < last, accepted

    def _distribution(self, logits: Float[Tensor, "B R V"], state: State) -> Float[Tensor, "B R V"]:
        """What a token is drawn from: the filtered softmax, or all on the argmax at temperature 0."""
        rule = self.target.propose
        assert isinstance(rule, Sample)
        filtered = rule.filtered(rule.clean(logits, state.spec))
        wide = filtered if filtered.dtype == torch.float64 else filtered.float()
        return wide.softmax(-1) if rule.temperature else _one_hot(filtered.argmax(-1), wide)


def _next_run(state: State, most: int) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """The first masked position, and how many may be drafted there: one less than stand in a row, since a round adds its own token."""
    length = state.masked.shape[1]
    place = torch.where(state.masked, state.positions, length).amin(1)
    behind = (state.positions >= place.unsqueeze(1)) & ~state.masked
    stop = torch.where(behind, state.positions, length).amin(1)
    return place, (stop - place - 1).clamp(min=0, max=most)


def _verify_region(state: State, place: Int[Tensor, "B"], count: Int[Tensor, "B"]) -> Region:
    """The target sees the prefix and the drafts, and answers for each draft and for the position behind them."""
    first, last = place.unsqueeze(1), (place + count).unsqueeze(1)
    here = (state.positions >= first) & (state.positions <= last) & state.masked
    return Region(
        read=here,
        eligible=here,
        group=torch.zeros_like(state.tokens),
        force=here,
        visible=state.positions < last,
        closed=state.positions < first,
        block=state.positions.expand_as(state.tokens),
        epoch=place,
    )


def _draft_region(view: State, window: Canvas, place: Int[Tensor, "B"], limit: Int[Tensor, "B"]) -> Region:
    """The drafter sees the prefix and masks to its `end`, and answers for the window."""
    length = view.tokens.shape[1]
    block = blocks_of(view, view.spec.block_size)
    visible = view.positions < view.end.unsqueeze(1)
    at = torch.stack((place, place + limit - 1), 1).clamp(min=0, max=length - 1)
    first, last = block.gather(1, at).unbind(1)
    if view.spec.attention != "full":
        visible = visible & (block <= last.unsqueeze(1))
    return Region(
        read=window,
        eligible=window,
        group=torch.zeros_like(view.tokens),
        force=window,
        visible=visible,
        closed=block < first.unsqueeze(1),
        block=block,
        epoch=place,
    )


def _one_hot(tokens: Int[Tensor, "B R"], like: Float[Tensor, "B R V"]) -> Float[Tensor, "B R V"]:
    ids = torch.arange(like.shape[-1], device=like.device)
    return (tokens.unsqueeze(-1) == ids).to(like.dtype)


def _sample(odds: Float[Tensor, "B R V"], salt: int, state: State, positions: Int[Tensor, "B R"]) -> Int[Tensor, "B R"]:
    """A draw from `odds` (they need not add up to 1) at each position."""
    ids = torch.arange(odds.shape[-1], device=odds.device)
    keys = [key.unsqueeze(-1) for key in _keys(salt, state, positions)]
    return (odds.log() + noise.gumbel(*keys, ids).to(odds.dtype)).argmax(-1)


def _keys(salt: int, state: State, positions: Int[Tensor, "B R"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.full_like(state.seed, salt)[:, None], state.seed[:, None], state.step[:, None], positions


def _target_of(decoder: Decoder) -> BlockDecoder:
    """The decoder, if it is one whose text can be verified token by token. Raises DecodeError otherwise."""
    if (
        isinstance(decoder, BlockDecoder)
        and isinstance(decoder.schedule, NextToken)
        and isinstance(decoder.propose, Sample)
        and isinstance(decoder.revise, Keep)
        and decoder.stop in (AtEos(), AtEos(fill=True), WhenFull())
    ):
        return decoder
    raise DecodeError(
        f"deer verifies what an autoregressive model would write token by token, got the decoder {type(decoder).__name__}. Write decoder: "
        "autoregressive; the drafter's decoder is the driver's argument draft."
    )


def _same_vocabulary(target: Model, drafter: Model) -> None:
    """Does an id mean the same to both? Raises DecodeError. A drafter may know words more (its mask token); the target never takes them."""
    one, other = target.spec, drafter.spec
    if one.vocab_size != other.vocab_size:
        raise DecodeError(
            f"target and drafter must share a vocabulary, got {one.vocab_size} and {other.vocab_size} rows. Drafts are token ids. "
            "Write models with one tokenizer."
        )
    words, others = (_words(model) for model in (target, drafter))
    if words is None or others is None:
        return
    differing = sorted(word for word, number in words.items() if others.get(word, -1) != number)
    if differing:
        raise DecodeError(
            f"target and drafter must share a vocabulary, got {len(differing)} words with other ids, such as {differing[0]!r} "
            f"({words[differing[0]]} and {others.get(differing[0])}). Drafts are token ids. Write models with one tokenizer."
        )


def _words(model: Model) -> dict[str, int] | None:
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tokenizer.get_vocab()
