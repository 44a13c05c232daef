"""PC-sampler: rank positions by where they are and by how much their token says, not by probability alone.

    score_i <- exp(-decay * i) * min(c_i * -ln f(token_i), cap)       i: offset in the answer, f: the token's frequency in a corpus
    commit     the k_t best-scored positions                          k_t: LLaDA's quota

Why: by probability alone, commas and other frequent tokens all over the answer are committed first. A decay keeps decoding roughly left to
right, and a surprising token counts more than a frequent one at the same probability.

Offsets count from the answer's first position. Inside one open block that ranks as an offset in the block does, because the difference is
one factor for all. Scores are kept as logarithms, so that far positions do not underflow to one tie.

Reference: PC-Sampler: Position-Aware Calibration of Decoding Bias in Masked Diffusion Models, arXiv 2508.13021.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_toolkit.decoders.base import DecodeError, Propose
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.registry import register
from dllm_toolkit.state import Answer, Proposal, Region, State
from dllm_toolkit.types import PyTree


def save_counts(path: str | Path, sequences: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Count the tokens of a corpus and write the table that `counts` reads, as safetensors."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sequence in sequences:
        counts += torch.bincount(torch.tensor(sequence, dtype=torch.long), minlength=vocab_size)
    save_file({"counts": counts}, path)


def read_counts(path: str | Path, vocab_size: int) -> Float[Tensor, "V"]:
    """A table of token counts: safetensors with one tensor `counts` [V], or a JSON object of token id to count.

    Raises DecodeError if it is neither, is of another vocabulary, or counts nothing.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            table = {int(token): float(count) for token, count in json.loads(path.read_text(encoding="utf-8")).items()}
            counts = torch.zeros(max([vocab_size, *(token + 1 for token in table)]))
            counts[list(table)] = torch.tensor(list(table.values()))
        else:
            counts = load_file(path)["counts"].float()
    except (ValueError, KeyError, IndexError, AttributeError, SafetensorError) as problem:
        raise DecodeError(
            f"{path} is no table of counts, got {type(problem).__name__}: {problem}. It holds one tensor `counts`, or a JSON object of "
            "token id to count. Write it with save_counts."
        ) from problem
    if counts.shape != (vocab_size,):
        raise DecodeError(
            f"{path} counts tokens 0 .. {len(counts) - 1}, got a model with {vocab_size} tokens. The table belongs to another tokenizer. "
            "Count again with this model's tokenizer (save_counts)."
        )
    if float(counts.min()) < 0 or float(counts.sum()) <= 0:
        raise DecodeError(f"counts must be 0 or more and not all 0, got {path}. They are a corpus. Count again (save_counts).")
    return counts


@dataclass(frozen=True)
class Calibration:
    """State of PositionAndCorpus: -ln f of every token (the same for every row), and the state of the inner proposal."""

    surprise: Float[Tensor, "_ V"]  # one row for all
    inner: PyTree


@register("propose", "position_and_corpus")
@dataclass(frozen=True)
class PositionAndCorpus(Propose):
    """Propose as `inner` does, ranked by position and by how surprising the token is in a corpus.

    score = ln min(c * -ln f, cap) - decay * offset. counts: a file with the corpus' token counts (.json or .safetensors, see
    `read_counts`); None: all tokens are equally frequent. A token that the corpus lacks counts as seen once.

    Reference: PC-sampler, arXiv 2508.13021.
    """

    cite = ("2508.13021",)

    decay: float = 0.25
    cap: float = 10.0
    counts: str | None = None
    inner: Propose = field(default_factory=Sample)

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise DecodeError(f"decay must be 0 or more, got {self.decay}. 0 leaves the position out. Write decay: 0.25.")
        if self.cap <= 0:
            raise DecodeError(f"cap must be above 0, got {self.cap}. It bounds c * -ln f. Write cap: 10.")
        if self.counts is not None and Path(self.counts).suffix not in (".json", ".safetensors"):
            raise DecodeError(f"counts must be a .json or .safetensors file, got {self.counts}. It is a table. Write it with save_counts.")
        if self.counts is not None and not Path(self.counts).is_file():
            raise DecodeError(f"cannot find the counts, got {self.counts}. They are token counts of a corpus. Write them with save_counts.")

    def init(self, state: State) -> Calibration:
        size = state.spec.vocab_size
        counts = torch.ones(size) if self.counts is None else read_counts(self.counts, size)
        surprise = (counts.sum().log() - counts.clamp(min=1).log()).clamp(min=0)
        return Calibration(surprise.to(state.tokens.device).unsqueeze(0), self.inner.init(state))

    def __call__(self, answer: Answer, state: State) -> Proposal:
        own: Calibration = state.parts.propose
        proposal = self.inner(answer, state.with_part(propose=own.inner))
        offset = (state.positions - state.begin.unsqueeze(1)).to(proposal.confidence.dtype)
        said = (proposal.confidence.clamp(min=0) * own.surprise[0, proposal.tokens]).clamp(max=self.cap)
        read = proposal.confidence > float("-inf")
        return replace(proposal, score=torch.where(read, said.log() - self.decay * offset, float("-inf")))

    def carry(self, proposal: Proposal, region: Region, state: State) -> Calibration:
        own: Calibration = state.parts.propose
        return replace(own, inner=self.inner.carry(proposal, region, state.with_part(propose=own.inner)))


@register("decoder", "pc_sampler")
def pc_sampler(
    block_length: int | None = None,
    steps: int | None = None,
    decay: float = 0.25,
    cap: float = 10.0,
    counts: str | None = None,
    temperature: float = 0.0,
) -> BlockDecoder:
    """PC-sampler (arXiv 2508.13021): a quota of tokens a step, ranked by position and corpus frequency.

    decay: the paper has 0.25, 0 for Sudoku, 0.5 for Countdown. counts: a file of the tokenizer's token counts, see `PositionAndCorpus`.
    steps: forwards of the whole answer (None: one token a step).
    """
    return BlockDecoder(
        schedule=SemiAutoregressive(block_length),
        commit=Quota(steps),
        propose=PositionAndCorpus(decay, cap, counts, Sample(temperature=temperature)),
    )
