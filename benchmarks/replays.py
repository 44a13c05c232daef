"""Times of the recorded graphs that a compiled decode leaves behind: the forward by lanes and reads, the decision, the look at what comes.

Read by decode_speed.py. `forward` holds lanes, layers, LM head and the engine's account; `decide` holds the confidence, the choice of
positions and what parts remember; `look` holds the region, the cache's plan and the counts that the host reads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dllm_toolkit.graphs import Replayed
from dllm_toolkit.models.transformer import Layer, Transformer
from dllm_toolkit.workspace import Workspace


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, by events on the device."""
    run()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def workspaces(model: Transformer) -> list[Workspace]:
    return [space for several in model.__dict__.get("_workspaces", {}).values() for space in several]


def forget(model: Transformer) -> None:
    """Give the graphs and buffers of earlier decodes back."""
    model.__dict__.pop("_workspaces", None)


def steps(model: Transformer, repeats: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds of every recorded graph, by kind and by "lanes, reads" (a median over `repeats` replays).

    In the state that the decode left: lanes are dead. Narrow forwards wait for the weights whatever is in them; wide ones seem faster than
    in the decode itself, since equal rows draw less power.
    """
    found: dict[str, dict[str, float]] = {"forward": {}, "decide": {}, "look": {}}
    for space in workspaces(model):
        for name, unit in space.units.items():
            if not isinstance(unit, Replayed):
                continue
            for recording in unit.recordings.values():
                milliseconds = round(seconds_of(recording.replay, repeats) * 1e3, 4)
                kind = name[0] if isinstance(name, tuple) else None
                if kind == "forward":
                    _, _, lanes, reads, flat, whole = name
                    note = ("" if flat is None else f", {flat} flat") + ("" if whole else ", rest")
                    found["forward"][f"{lanes}, {reads}{note}"] = milliseconds
                elif kind == "alone":
                    found["forward"][f"{name[2]}, {name[3]}, one row of a batch"] = milliseconds
                elif kind == "look":
                    found["look"]["plan"] = milliseconds
                elif kind == "rule":
                    reads = next((one.shape[1] for one in recording.inputs if one.ndim == 3), None)
                    if reads is not None:
                        found["decide"][f"{reads}"] = milliseconds
                    elif name[-1].__name__ == "look":
                        found["look"]["region"] = milliseconds
    return found


def products(model: Transformer, lanes: int, reads: int, repeats: int = 20) -> float:
    """Milliseconds of the matrix products alone that a forward of so many lanes and reads is made of, replayed as one graph."""
    layers = cast("list[Layer]", list(model.layers))
    x = torch.randn(lanes, model.config.width, dtype=model.dtype, device=model.device)
    mixed = torch.randn(lanes, layers[0].heads * layers[0].head_dim, dtype=model.dtype, device=model.device)
    wide = torch.randn(lanes, model.config.mlp_width, dtype=model.dtype, device=model.device)

    def run() -> list[Tensor]:
        made = []
        for layer in layers:
            for whole, maps in (
                (layer.fused_attention, (layer.q_proj, layer.k_proj, layer.v_proj)),
                (layer.fused_transform, (layer.gate_proj, layer.up_proj)),
            ):
                made = [whole(x)] if whole is not None else [one(x) for one in maps]
            made += [layer.o_proj(mixed), layer.down_proj(wide)]
        return [*made, model.lm_head(x[:reads])]

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return round(seconds_of(graph.replay, repeats) * 1e3, 4)
