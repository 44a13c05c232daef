"""What compiled decodes leave on a model: later ones must not notice, whatever happened to the model meanwhile.

As in test_graphs.py, graphs are emulated and nothing is compiled.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dllm_toolkit import graphs, workspace
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache
from dllm_toolkit.decode import Output, decode, start
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.freedave import SelfDraft, freedave
from dllm_toolkit.decoders.rules.stop import WhenFull
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.stream import decode_stream
from dllm_toolkit.testing.models import tiny_transformer
from dllm_toolkit.training import lora

PROMPTS = [[1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with graphs.emulated():
        yield


def model() -> Transformer:
    """With biases of q, k and v; its weights can be trained."""
    plain = tiny_transformer(2, attention="block_causal", block_size=4)
    biased = Transformer(replace(plain.config, qkv_bias=True)).double().eval()
    biased.load_state_dict(plain.state_dict(), strict=False)
    for layer in biased.layers:
        nn.init.normal_(layer.q_proj.bias)  # type: ignore[arg-type, union-attr]
    return biased


def run(model: Any, compile: bool, cache: Any = None) -> Output:
    decoder = d2f(block_length=4, threshold=0.5)  # a new one every time, as in a script
    return decode(model, decoder, PROMPTS, max_new_tokens=12, cache=cache or BlockCausalCache(), compile=compile)


def agree(model: Any, cache: Any = None) -> bool:
    return run(model, True, cache).tokens == run(model, False, cache).tokens


def test_equal_decoders_share_their_graphs() -> None:
    one = model()
    assert run(one, True).stats.warm_up > 0 and run(one, True).stats.warm_up == 0
    one.to("cpu")  # where it is
    assert run(one, True).stats.warm_up == 0
    workspace.forget(one)
    assert run(one, True).stats.warm_up > 0


def test_a_decoder_made_in_every_step_is_recorded_once() -> None:
    one, decoder = model(), freedave(block_length=4)
    assert isinstance(decoder, SelfDraft)
    decode(one, replace(decoder, official_loop=True), PROMPTS, max_new_tokens=12, cache=BlockCausalCache(), compile=True)
    (space,) = [space for spaces in one.__dict__["_workspaces"].values() for space in spaces]
    assert sum(isinstance(name, tuple) and name[0] == "rule" for name in space.units) == 2


def test_memory_is_given_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector: what is deleted must make room on a GPU. And idle workspaces make room for a new one."""
    gc.collect()
    gc.disable()
    try:
        one = model()
        run(one, True)
        gone = weakref.ref(one.__dict__["_workspaces"].popitem()[1].pop())
        assert gone() is None
        run(one, True)
        idle = weakref.ref(next(iter(one.__dict__["_workspaces"].values()))[0])
        made = Transformer.buffer

        def buffer(self: Transformer, rows: int, slots: int) -> Any:
            if idle() is not None:
                raise torch.OutOfMemoryError
            return made(self, rows, slots)

        monkeypatch.setattr(Transformer, "buffer", buffer)
        run(one, True, NoCache())
        gone = weakref.ref(one)
        del one
        assert gone() is None
    finally:
        gc.enable()


def test_inference_mode_leaves_no_trace() -> None:
    """A decode or a stream inside it, then one outside, then training."""
    one = model()
    with torch.inference_mode():
        run(one, True)
    decode_stream(one, d2f(block_length=4), PROMPTS, rows=2, max_new_tokens=12, cache=BlockCausalCache(), compile=True)
    assert agree(one)
    one.logits(torch.tensor([[1, 2, 3]])).sum().backward()
    torch.optim.SGD(one.parameters(), lr=0.1).step()
    assert agree(one)


def test_replaced_weights_count() -> None:
    one, other = model(), model()
    run(one, True)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-1.7)
    one.load_state_dict(other.state_dict(), assign=True)
    assert run(one, False).tokens == run(other, False).tokens and agree(one)
    with torch.no_grad():
        for weight in one.parameters():
            weight.data = weight * -0.6
    assert agree(one) and agree(copy.deepcopy(one))


def test_a_hook_on_a_map_is_called() -> None:
    one, seen = model(), []
    run(one, True)
    one.layers[0].k_proj.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator, union-attr]
    with torch.no_grad():
        one.logits(torch.tensor([[1, 2, 3]]))
    assert seen == [1]


def test_settings_count() -> None:
    """An adapter that is off and the strength of guidance are constants of a graph, so there must be another one."""
    one = model()
    lora.inject(one, lora.Lora(rank=2, targets=("q_proj", "v_proj", "up_proj")))
    assert agree(one) and run(one, True).stats.warm_up == 0
    with lora.adapter_off(one):
        assert run(one, True).stats.warm_up > 0
    assert run(one, True).stats.warm_up == 0
    guided = Guided(one, 0.5)
    assert agree(guided, NoCache()) and run(guided, True, NoCache()).stats.warm_up == 0
    guided.scale = 8.0
    assert run(guided, True, NoCache()).stats.warm_up > 0


def test_nan_does_not_outlive_its_decode() -> None:
    one = model()
    run(one, True)
    for spaces in one.__dict__["_workspaces"].values():
        for space in spaces:
            space.kv.keys.fill_(float("nan"))
            space.kv.values.fill_(float("nan"))
    assert agree(one)


def test_a_buffer_that_grew_is_read_by_every_forward() -> None:
    """A decoder that asks for shadows now and then: plain forwards in between go on with the new buffer, and so does the next decode."""
    one, decoder = tiny_transformer(2), replace(semi_ar(block_length=4), stop=WhenFull())
    prompts = [list(range(1, 15)) * 2, list(range(2, 15)) * 2]
    answers = []
    for compile in (False, True, True):
        begun = start(one, decoder, prompts, max_new_tokens=20, cache=DualCache(), compile=compile)
        state, said = begun.state, []
        with torch.inference_mode():
            for number in range(10):
                region = decoder.region(state)
                answer = begun.engine.ask(state, region, ~state.masked if number in (4, 8) else None)
                said += [row[:reads] for row, reads in zip(answer.logits, region.read.sum(1).tolist(), strict=True)]
                state = decoder.decide(replace(answer, shadow=None), region, state)
        answers.append(said)
        del begun  # gives its workspace back
    for others in answers[1:]:
        for mine, other in zip(answers[0], others, strict=True):
            torch.testing.assert_close(mine, other)


def test_who_listens_may_keep_what_it_hears() -> None:
    begun = start(model(), d2f(block_length=4), PROMPTS, max_new_tokens=12, cache=BlockCausalCache(), compile=True)
    heard, masks = [], []
    begun.engine.listen = heard.append
    state = begun.state
    with torch.inference_mode():
        for _ in range(3):
            masks.append(int(state.masked.sum()))
            state = begun.decoder.step(begun.engine, state)
    assert [int(one.state.masked.sum()) for one in heard] == masks and len(set(masks)) > 1
