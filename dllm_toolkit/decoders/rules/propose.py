"""Which token would each read position take, and how sure is the model?

Order of things, as in LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487): the mask id is never proposed; suppressed ids lose their
logits; filters act on z / T; the token is a Gumbel-max sample or the argmax; its confidence is read from the clean distribution
(`evidence: clean`) or from the filtered one (`evidence: filtered`, Dream).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Propose, check_ids
from dllm_toolkit.ops import lanes, noise, sample, score
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Proposal, State
from dllm_toolkit.types import ModelSpec

Score = Literal["probability", "margin", "negative_entropy", "random"]
Special = int | Literal["eos"]


@register("propose", "sample")
@dataclass(frozen=True)
class Sample(Propose):
    """Propose the argmax (temperature 0) or a sample, ranked by a confidence score.

    score: probability c = p(token) | margin p1 - p2 | negative_entropy sum p ln p | random U(0, 1).
    suppress: ids that are never proposed; defer: ids whose confidence is 0, so that they are committed last
    (LLaDA's two end-of-text options; "eos" names the model's own ids). top_k 0 and top_p 1 are off. order_temperature > 0 ranks by
    score / T + Gumbel noise, which draws positions without replacement from softmax(score / T) (Dream's alg_temp).
    """

    cite = ("2502.09992", "2508.15487")

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    score: Score = "probability"
    evidence: Literal["clean", "filtered"] = "clean"
    suppress: tuple[Special, ...] = ()
    defer: tuple[Special, ...] = ()
    order_temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.order_temperature < 0:
            raise DecodeError(
                f"order_temperature must be 0 or more, got {self.order_temperature}. 0 commits in the order of the score. "
                "Write order_temperature: 0.1."
            )
        if not (self.temperature == 0 or 1e-4 <= self.temperature <= 1e4):
            raise DecodeError(
                f"temperature must be 0 or between 0.0001 and 10000, got {self.temperature}. 0 is the argmax; beyond these bounds logits "
                "divided by it leave float32. Write temperature: 0.7."
            )
        if not 0 < self.top_p <= 1:
            raise DecodeError(f"top_p must be in (0, 1], got {self.top_p}. It is a probability mass. Write top_p: 0.95.")
        if self.top_k < 0:
            raise DecodeError(f"top_k must be 0 (off) or more, got {self.top_k}. It is a number of tokens. Write top_k: 50.")

    def check_model(self, spec: ModelSpec) -> None:
        check_ids(spec, "suppress", self.suppress)
        check_ids(spec, "defer", self.defer)

    def clean(self, logits: Tensor, spec: ModelSpec) -> Tensor:
        """Logits [B, R, V] without the mask id and the suppressed ones."""
        hidden = (spec.mask_id,) if spec.mask_id < spec.vocab_size else ()  # causal models may have no mask token
        return _without(logits, (*hidden, *_ids(self.suppress, spec.eos_ids)))

    def filtered(self, clean: Tensor) -> Tensor:
        """z / T [B, R, V] with what the filters drop at -inf: a token is drawn from its softmax (at temperature 0 it is the argmax)."""
        filtered = clean / self.temperature if self.temperature else clean
        if self.top_p < 1:
            filtered = sample.filter_top_p(filtered, self.top_p)
        return sample.filter_top_k(filtered, self.top_k) if self.top_k else filtered

    def __call__(self, answer: Answer, state: State) -> Proposal:
        spec = state.spec
        length = state.tokens.shape[1]
        logits = self.clean(answer.logits, spec)
        filtered = self.filtered(logits)
        # z / T is already in the logits, so what is left is one draw at temperature 1, or the argmax.
        draw = 1.0 if self.temperature else 0.0
        tokens = sample.gumbel_argmax(filtered, draw, state.seed, state.step, answer.positions)  # [B, R]
        evidence = logits if self.evidence == "clean" else filtered
        if self.defer:
            evidence = _without(evidence, _ids(self.defer, spec.eos_ids))
        confidence = score.probability(evidence, tokens)  # [B, R]
        ranked = self._rank(evidence, confidence, answer, state)
        spread = lanes.to_canvas(confidence, answer.positions, length, float("-inf"))
        rank = spread if ranked is confidence else lanes.to_canvas(ranked, answer.positions, length, float("-inf"))
        chosen = lanes.to_canvas(tokens, answer.positions, length, spec.mask_id)
        return Proposal(chosen, spread, rank, answer.logits, answer.positions)

    def _rank(self, evidence: Tensor, confidence: Tensor, answer: Answer, state: State) -> Tensor:
        # The salts keep these draws apart from the token noise of the same position.
        if self.score == "probability":
            ranked = confidence
        elif self.score == "margin":
            ranked = score.margin(evidence)
        elif self.score == "negative_entropy":
            ranked = -score.entropy(evidence)
        else:
            ranked = noise.uniform(*_keys(0x5EED, answer, state))
        if self.order_temperature == 0:
            return ranked
        return ranked / self.order_temperature + noise.gumbel(*_keys(0x02DE, answer, state))


def _keys(salt: int, answer: Answer, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.full_like(state.seed, salt)[:, None], state.seed[:, None], state.step[:, None], answer.positions


def _ids(wanted: tuple[Special, ...], eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(one for item in wanted for one in (eos_ids if item == "eos" else (int(item),)))


def _without(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits with some ids at -inf. Each id is a column, so nothing is copied from the host."""
    if len(ids) == 0:
        return logits
    logits = logits.clone()
    for one in ids:
        logits[..., one] = float("-inf")
    return logits
