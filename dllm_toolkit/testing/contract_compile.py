"""D11: everything after the forward is one graph, compiled once for a whole decode, and says what eager code says.

The states and answers of a recorded decode are put through `BlockDecoder.decide` under `torch.compile(fullgraph=True)` with a backend
that counts graphs and runs them as they are, so no C++ or CUDA compiler is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.ops import lanes
from dllm_toolkit.state import Answer, Shadow
from dllm_toolkit.testing.contract_decoder import Bench, Violation, fail_where
from dllm_toolkit.testing.record import Ask
from dllm_toolkit.types import Canvas

COMPARED = ("tokens", "masked", "born", "begin", "end", "step", "settled", "done", "result", "forced", "edits")


class GraphCounter:
    """A torch.compile backend that counts graphs and runs them unchanged."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


def static_answer(ask: Ask, width: int) -> Answer:
    """The answer as a compiling engine gives it: as many read lanes in every step."""
    logits, positions = _widened(ask.logits, ask.read, width)
    if ask.shadow is None or ask.shaded is None:
        return Answer(logits, positions)
    return Answer(logits, positions, Shadow(*_widened(ask.shadow, ask.shaded, width)))


def _widened(logits: Tensor, read: Canvas, width: int) -> tuple[Tensor, Tensor]:
    positions = lanes.pack(read, width)
    where = positions.clamp(max=read.shape[1] - 1).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    return logits.gather(1, where), positions


def d11_one_graph(bench: Bench) -> None:
    """`decide` compiles to one graph without recompiling during a decode, and agrees with eager execution."""
    decoder = bench.decoder
    if not isinstance(decoder, BlockDecoder):
        return
    recording = bench.recording
    width = min(decoder.max_reads(max(map(len, bench.batch.templates))), recording.first.tokens.shape[1])
    import torch._dynamo.exc as dynamo_errors  # a second: the other checks do without

    torch._dynamo.reset()
    counter = GraphCounter()
    compiled = torch.compile(decoder.decide, fullgraph=True, dynamic=False, backend=counter)
    try:
        with torch.inference_mode():
            for number, moment in enumerate(recording.moments):
                (ask,) = moment.asks
                answer = static_answer(ask, width)
                try:
                    after = compiled(answer, ask.region, moment.before)
                except dynamo_errors.TorchDynamoException as problem:
                    reason = str(problem).strip().splitlines()[0]
                    raise Violation(
                        f"step {number}: `decide` is not one graph: {reason}. No .item(), no `if` on a tensor, no numpy in a rule."
                    ) from problem
                if counter.graphs != 1:
                    raise Violation(
                        f"step {number}: {counter.graphs} graphs. Something besides tensor values changes from step to step: a Python "
                        "number in a part's state, a shape, or two fields that were one tensor at first (clone one of them in init)."
                    )
                eager = decoder.decide(answer, ask.region, moment.before)
                for name in COMPARED:
                    mine, theirs = getattr(after, name), getattr(eager, name)
                    if mine.ndim == 2:
                        fail_where(mine != theirs, number, f"`{name}` differs between compiled and eager.")
                    elif not torch.equal(mine, theirs):
                        raise Violation(f"step {number}: `{name}` is {mine.tolist()} compiled and {theirs.tolist()} eager.")
    finally:
        torch._dynamo.reset()
