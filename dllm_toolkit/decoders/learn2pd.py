"""Learn2PD: a tiny network learns which of the proposed tokens are final already.

    c <- confidences of all positions of the open block, decided ones too
    s <- sigmoid(filter(c))                      an MLP from block_length numbers to block_length numbers
    commit {i masked : s_i >= accept}  and  the k surest           k: LLaDA's quota, normally 1
    an end-of-text token is committed: the canvas ends there       (End-of-Text Prediction, `CutAtEos`)

The filter sees no token and no hidden state, only how confidence is spread over the block, so it belongs to one block length and one model.
It is trained on decodes in which an oracle commits exactly what is right already (`training/filter.py`), and kept as a directory:
filter.safetensors with the weights, filter.json with what they are for.

Reference: Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel Decoding, arXiv 2509.25188.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_toolkit.decoders.base import Commit, DecodeError, Decoder, Stop
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Quota
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AnyOf, AtEos, CutAtEos, WhenFull
from dllm_toolkit.registry import declare, register
from dllm_toolkit.state import Proposal, Region, State
from dllm_toolkit.types import Canvas, ModelSpec, PyTree, Scores, Tokens

Activation = Literal["relu", "gelu"]
Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Filter:
    """A trained filter and what it belongs to; two of them are equal when they are one object.

    layers: (weight [out, in], bias [out]) of each, from block_length numbers to block_length logits. model: traits of the model's spec that
    must agree (`traits`); None fits any. source: how the model was called when the filter was trained, for people.
    """

    layers: Layers = field(repr=False)
    block_length: int
    activation: Activation = "relu"
    model: Mapping[str, int | str] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        widths = [self.block_length] + [len(weight) for weight, _ in self.layers]
        shapes = [(tuple(weight.shape), tuple(bias.shape)) for weight, bias in self.layers]
        wanted = [((wide, narrow), (wide,)) for narrow, wide in zip(widths, widths[1:], strict=False)]
        if not self.layers or shapes != wanted or widths[-1] != self.block_length:
            raise DecodeError(
                f"a filter leads from block_length numbers to block_length numbers, got weights {[list(one) for one, _ in shapes]} for "
                f"block_length {self.block_length}. They belong to another block length. Train it again (recipes/train/filter.yaml)."
            )


declare("filter", Filter)


def traits(spec: ModelSpec) -> dict[str, int | str]:
    """What a filter remembers of the model that it was trained for, as far as a model's spec tells."""
    return {name: getattr(spec, name) for name in ("vocab_size", "layers", "width", "attention", "shift")}


def filter_logits(layers: Layers, activation: Activation, features: Float[Tensor, "*N n"]) -> Float[Tensor, "*N n"]:
    """The network: linear layers with an activation between them."""
    for number, (weight, bias) in enumerate(layers):
        if number:
            features = F.relu(features) if activation == "relu" else F.gelu(features)
        features = F.linear(features, weight, bias)
    return features


def save_filter(made: Filter, directory: Path) -> None:
    """Write filter.safetensors and filter.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for number, (weight, bias) in enumerate(made.layers):
        tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"] = weight.contiguous(), bias.contiguous()
    save_file(tensors, directory / "filter.safetensors", metadata={"format": "pt"})
    (directory / "filter.safetensors").chmod(0o644)
    signature = {
        "block_length": made.block_length,
        "hidden": [len(weight) for weight, _ in made.layers[:-1]],
        "activation": made.activation,
        "model": None if made.model is None else dict(made.model),
        "source": made.source,
    }
    (directory / "filter.json").write_text(json.dumps(signature, indent=2) + "\n", encoding="utf-8")


@register("filter", "load_filter")
def load_filter(path: str) -> Filter:
    """A trained filter (arXiv 2509.25188): a directory with filter.safetensors and filter.json, or asset:NAME.

    Raises DecodeError if there is none, or if the two files contradict each other.
    """
    directory = Path(path).expanduser()
    if path.startswith("asset:"):
        directory = Path(str(resources.files("dllm_toolkit") / "assets")) / Path(path.removeprefix("asset:")).name
    missing = [name for name in ("filter.json", "filter.safetensors") if not (directory / name).is_file()]
    if missing:
        raise DecodeError(
            f"no filter at {path}, got a place without {' and '.join(missing)}. Learn2PD needs a network trained for the model. "
            "Train one with recipes/train/filter.yaml, and write the directory of its export."
        )
    try:
        signature = json.loads((directory / "filter.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "filter.safetensors")
        count = len(signature["hidden"]) + 1
        layers = tuple((tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in range(count))
        made = Filter(layers, signature["block_length"], signature["activation"], signature["model"], signature["source"])
    except (ValueError, KeyError, TypeError, SafetensorError) as problem:
        if isinstance(problem, DecodeError):
            raise
        raise DecodeError(
            f"{path} is no filter, got {type(problem).__name__}: {problem}. It holds layers.N.weight and layers.N.bias, and a signature. "
            "Train it again with recipes/train/filter.yaml."
        ) from problem
    return made


def block_windows(values: Scores, block: Tokens, size: int, fill: float) -> tuple[Float[Tensor, "B G n"], Int[Tensor, "B L"]]:
    """Canvas values gathered by block: row g holds those of block g, `fill` where it is shorter than `size`.

    Also where each position went, as an index into the flattened windows; their length for positions that went nowhere (a block that is
    longer than `size`, as the prompt is where blocks count from its end).
    """
    rows, length = values.shape
    positions = torch.arange(length, device=values.device).expand(rows, length)
    opens = torch.ones_like(block, dtype=torch.bool)
    opens = torch.cat((opens[:, :1], block[:, 1:] != block[:, :-1]), dim=1)
    offset = positions - torch.where(opens, positions, 0).cummax(1).values
    groups = -(-length // size) + 2
    place = torch.where((offset < size) & (block < groups), block * size + offset, groups * size)
    windows = torch.full((rows, groups * size + 1), fill, dtype=values.dtype, device=values.device).scatter(1, place, values)
    return windows[:, :-1].reshape(rows, groups, size), place


def confidences(proposal: Proposal) -> Scores:
    """What the filter reads: the confidence of every position; 1 where nothing is read, because nothing is to be decoded there."""
    return torch.where(proposal.read, proposal.confidence, 1.0).double()


@dataclass(frozen=True)
class Filtering:
    """State of LearnedFilter: the weights on the canvas's device in float64 (constant), and the state of the inner rule."""

    layers: Layers
    rule: PyTree


@register("commit", "learned_filter")
@dataclass(frozen=True)
class LearnedFilter(Commit):
    """Commit what `rule` commits, and every position that the filter says is final with probability `accept` or more.

    The schedule's blocks must be as long as the filter's. Positions of a block that hold nothing to decode (pinned, prompt, behind the end)
    count as sure.

    Reference: Learn2PD, arXiv 2509.25188.
    """

    cite = ("2509.25188",)
    looks_back = True  # a feature of every position of the block, decided or not

    filter: Filter
    accept: float = 0.96
    rule: Commit = field(default_factory=Quota)

    def __post_init__(self) -> None:
        if self.accept < 0:
            raise DecodeError(f"accept must be 0 or more, got {self.accept}. Above 1 nothing passes. Write accept: 0.96.")

    def check_model(self, spec: ModelSpec) -> None:
        if self.filter.model is not None and dict(self.filter.model) != traits(spec):
            raise DecodeError(
                f"the filter was trained for another model ({self.filter.source or 'unnamed'}), got one with {traits(spec)} where it has "
                f"{dict(self.filter.model)}. What a confidence is worth differs. Train one for this model (recipes/train/filter.yaml)."
            )

    def check_decoder(self, decoder: Decoder, spec: ModelSpec) -> None:
        schedule = getattr(decoder, "schedule", None)
        if schedule is None:
            return
        length = getattr(schedule, "block_length", None)
        if length is None and spec.block_anchor == "absolute":
            length = spec.block_size
        wanted = self.filter.block_length
        if length != wanted:
            raise DecodeError(
                f"block_length must be that of the filter, {wanted}, got {length}. The filter reads the confidences of one whole block. "
                f"Write block_length: {wanted}, or train a filter for this length (recipes/train/filter.yaml)."
            )

    def init(self, state: State) -> Filtering:
        device = state.tokens.device
        layers = tuple((weight.to(device, torch.float64), bias.to(device, torch.float64)) for weight, bias in self.filter.layers)
        return Filtering(layers, self.rule.init(state))

    def select(self, proposal: Proposal, region: Region, state: State) -> Canvas:
        own: Filtering = state.parts.commit
        chosen = self.rule.select(proposal, region, state.with_part(commit=own.rule))
        return chosen | (region.eligible & self._final(own.layers, proposal, region))

    def _final(self, layers: Layers, proposal: Proposal, region: Region) -> Bool[Tensor, "B L"]:
        windows, place = block_windows(confidences(proposal), region.block, self.filter.block_length, 1.0)
        logits = filter_logits(layers, self.filter.activation, windows).flatten(1)
        nowhere = torch.full_like(logits[:, :1], float("-inf"))
        return torch.cat((logits, nowhere), dim=1).gather(1, place).sigmoid() >= self.accept

    def carry(self, proposal: Proposal, region: Region, state: State) -> Filtering:
        own: Filtering = state.parts.commit
        return Filtering(own.layers, self.rule.carry(proposal, region, state.with_part(commit=own.rule)))


@register("decoder", "learn2pd")
def learn2pd(
    filter: Filter | str,
    accept: float = 0.96,
    steps: int | None = None,
    cut: Literal["never", "committed", "predicted"] = "committed",
    temperature: float = 0.0,
    stop_at_eos: bool = True,
) -> BlockDecoder:
    """Learn2PD (arXiv 2509.25188): a quota of tokens a step, and whatever a trained filter says is final.

    filter: the directory of a trained filter, asset:NAME, or one that is loaded; blocks are as long as those that it was trained on. steps:
    forwards of the whole answer (None: one token a step). cut: End-of-Text Prediction, the canvas ends at the first committed end-of-text,
    or (predicted) at the surest one that is proposed; never: off. stop_at_eos false: decode all of what is left of the canvas.
    """
    trained = load_filter(filter) if isinstance(filter, str) else filter
    stop: Stop = AtEos() if stop_at_eos else WhenFull()
    if cut != "never":
        stop = AnyOf((stop, CutAtEos(predicted=cut == "predicted")))
    return BlockDecoder(
        schedule=SemiAutoregressive(trained.block_length),
        commit=LearnedFilter(trained, accept, Quota(steps)),
        propose=Sample(temperature=temperature),
        stop=stop,
    )
