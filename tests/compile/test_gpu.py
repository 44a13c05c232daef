"""The fast path on a real GPU: the tokens of eager code, its logits within bf16, and nothing compiled after the warm-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dllm_toolkit import rounds, workspace
from dllm_toolkit.cache.policies import BlockCausalCache, DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.d2f import d2f
from dllm_toolkit.decoders.fast_dllm import fast_dllm
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.engine import Engine
from dllm_toolkit.models.fused import at_once, gated, in_parts
from dllm_toolkit.models.guidance import Guided
from dllm_toolkit.models.transformer import Transformer, TransformerConfig, rotate
from dllm_toolkit.ops import attention, parts
from dllm_toolkit.state import begin_state
from dllm_toolkit.stream import decode_stream
from dllm_toolkit.types import Attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def model_of(attention: Attention, dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 256, "layers": 3, "heads": 4, "mlp_width": 512} | options
    config = TransformerConfig(
        vocab_size=512, mask_id=511, eos_ids=(510,), pad_id=510, max_positions=600, attention=attention,
        block_size=16 if attention == "block_causal" else None, **sizes,
    )  # fmt: skip
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.92 * config.width**-0.5)
    return model.to("cuda", dtype).eval()


def prompts_of(count: int, least: int, most: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most, (count,), generator=generator).tolist()
    return [torch.randint(0, 500, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("attention", "decoder", "cache"),
    [
        ("block_causal", d2f(block_length=16, threshold=0.3), BlockCausalCache()),
        ("full", fast_dllm(block_length=16, threshold=0.3), DualCache()),
        ("full", fast_dllm(block_length=16, threshold=0.3), PrefixCache()),
        ("full", vanilla(temperature=0.7), NoCache()),
        ("causal", autoregressive(), BlockCausalCache()),
    ],
    ids=["d2f", "dual", "prefix", "vanilla", "autoregressive"],
)
def test_compiled_tokens_are_eager_tokens(attention: Any, decoder: Any, cache: Any) -> None:
    model = model_of(attention, shift=1 if attention == "causal" else 0)
    for rows, seed in ((1, 0), (3, 1), (3, 2)):
        arguments: dict[str, Any] = {"max_new_tokens": 48, "cache": cache, "seed": seed}
        prompts = prompts_of(rows, 5, 60, seed)
        compiled = decode(model, decoder, prompts, compile=True, **arguments)
        eager = decode(model, decoder, prompts, **arguments)
        assert compiled.tokens == eager.tokens and compiled.result == eager.result
        assert (compiled.stats.nfe, compiled.stats.lanes) == (eager.stats.nfe, eager.stats.lanes)


def test_lanes_of_many_rows_one_behind_the_other() -> None:
    """64 rows, so that more than ten thousand lanes are counted at once."""
    model, decoder, cache = model_of("block_causal"), d2f(block_length=16, threshold=0.3), BlockCausalCache()
    arguments: dict[str, Any] = {"max_new_tokens": [32, 8, 48, 16] * 16, "cache": cache}
    prompts = prompts_of(64, 5, 320, 4)
    compiled = decode(model, decoder, prompts, compile=True, **arguments)
    assert compiled.tokens == decode(model, decoder, prompts, **arguments).tokens
    (space,) = next(iter(model.__dict__["_workspaces"].values()))
    assert any(name[0] == "forward" and name[4] is not None for name in space.units if isinstance(name, tuple))


WIDE = {"width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 8256, "layers": 2}  # wide enough for products of our own


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, WIDE)], ids=str)
def test_compiled_logits_are_eager_logits(dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    """Both against float64, as far from it as the type allows, and each other."""
    model, decoder = model_of("block_causal", dtype, **sizes), d2f(block_length=16)
    rows: list[Any] = [(prompt, [None] * 40) for prompt in prompts_of(1, 20, 60, 3)]
    answers = []
    with torch.inference_mode():
        for compile, held in ((True, model), (False, model), (False, model_of("block_causal", torch.float64, **sizes))):
            state = decoder.init(begin_state(model.spec, rows, [0], length=128, device="cuda"))
            region = decoder.region(state)
            answer = Engine(held, BlockCausalCache(), state, max_reads=40, compile=compile).ask(state, region)
            live = answer.positions[0] < 128
            answers.append(answer.logits[0][live].double())
    exact = answers[2] if dtype == torch.float32 else answers[1]
    error = ((answers[0] - exact).norm() / exact.norm()).item()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_nothing_is_compiled_after_the_warm_up() -> None:
    model, decoder, cache = model_of("block_causal"), d2f(block_length=16, threshold=0.3), BlockCausalCache()
    arguments: dict[str, Any] = {"max_new_tokens": 48, "cache": cache, "compile": True}
    for prompt in prompts_of(20, 5, 400, 1):
        decode(model, decoder, [prompt], **arguments)
    before = counters["stats"]["unique_graphs"]
    warm_up = 0.0
    for prompt in prompts_of(20, 5, 400, 2):
        warm_up += decode(model, decoder, [prompt], **arguments).stats.warm_up
    assert counters["stats"]["unique_graphs"] == before
    assert warm_up == 0.0, "a graph was recorded again"


def test_rows_of_a_stream_that_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins anew in a recorded forward of its own, which serves every row."""
    monkeypatch.setattr(rounds, "LANES_OF_A_FLOOR", 1)
    model, decoder, prompts = model_of("block_causal"), d2f(block_length=16, threshold=0.3), prompts_of(12, 60, 400, 4)
    arguments: dict[str, Any] = {"rows": 4, "max_new_tokens": 48, "cache": BlockCausalCache()}
    first, again = (decode_stream(model, decoder, prompts, compile=True, **arguments) for _ in range(2))
    eager = decode_stream(model, decoder, prompts, **arguments)
    assert first.tokens == again.tokens == eager.tokens and first.stats.nfe == eager.stats.nfe
    assert first.stats.warm_up > 0 == again.stats.warm_up
    units = [unit for several in model.__dict__["_workspaces"].values() for space in several for unit in space.units.items()]
    assert any(name[0] == "alone" and len(unit.recordings) == 1 for name, unit in units)


def few_lanes(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q as a fused product leaves it, k, v, who sees whom, cosines and sines; with the queries rotated, and what they find, in float64."""
    rows, heads, groups, width, slots, size = sizes
    torch.manual_seed(0)
    q = torch.randn(rows, width, 3 * heads * size, device="cuda").to(dtype)[..., : heads * size].view(rows, width, heads, size)
    k, v = (torch.randn(rows, slots, groups, size, device="cuda").to(dtype).transpose(1, 2) for _ in range(2))
    allow = torch.rand(rows, 1, width, slots, device="cuda") > 0.5
    allow[:, :, 1:4, 64:] = False
    allow[:, :, :, 3] = True
    allow[:, :, 0] = False
    allow[:, :, 0, slots - 1] = True  # the only one, in the last part
    angle = torch.rand(rows, width, size // 2, device="cuda").repeat(1, 1, 2) * 6
    turned = rotate(q, angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)).transpose(1, 2)
    exact = torch.nn.functional.scaled_dot_product_attention(turned.double(), k.double(), v.double(), attn_mask=allow, enable_gqa=True)
    return q.transpose(1, 2), k, v, allow, angle.cos(), angle.sin(), turned, exact


def error_of(made: Tensor, exact: Tensor) -> float:
    return ((made.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("way", ["products", "triton", "triton, rotating"])
@pytest.mark.parametrize(
    "sizes", [(1, 4, 4, 64, 528, 128), (3, 4, 2, 100, 130, 32), (1, 8, 8, 5, 70, 64), (1, 2, 2, 16, 272, 256)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_few_lanes(way: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v, allow, cos, sin, turned, exact = few_lanes(sizes, dtype)
    name: Any = way.removesuffix(", rotating")
    given: tuple[Any, ...] = (name, turned, k, v, allow) if name == way else (name, q, k, v, allow, (cos, sin))
    torch._dynamo.reset()  # every shape is a graph of its own, as in a decode
    run = torch.compile(attention.few, fullgraph=True, dynamic=False)
    made = run(*given)
    assert error_of(made, exact) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(made, run(*given)), "a decode must repeat itself bit for bit"


@pytest.mark.skipif(not attention.has_triton(), reason="needs Triton")
@pytest.mark.parametrize("tile", [(64, 4, 128, 8, 2), (64, 3, 32, 4, 4), (64, 1, 64, 8, 4), (32, 2, 32, 4, 4), (16, 8, 64, 4, 1)], ids=str)
def test_attention_of_few_lanes_however_the_work_is_cut(tile: tuple[int, ...]) -> None:
    from dllm_toolkit.ops.attention_triton import Tiling, attend

    q, k, v, allow, cos, sin, turned, exact = few_lanes((2, 4, 2, 60, 528, 128), torch.bfloat16)
    assert error_of(attend(q, k, v, allow, cos, sin, Tiling(*tile)), exact) < 1e-2
    assert error_of(attend(turned, k, v, allow, tiling=Tiling(*tile)), exact) < 1e-2


@pytest.mark.parametrize("way", ["library", *(["triton"] if attention.has_triton() else [])])
@pytest.mark.parametrize("lanes", [1, 23, 64, 100])
def test_products_of_few_lanes(way: Any, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, as a whole, and joined to SwiGLU; the last tile is not full."""
    monkeypatch.setattr(parts, "BEST", way)
    torch.manual_seed(0)
    torch._dynamo.reset()
    one = torch.nn.Linear(4096, 4128, bias=False, device="cuda", dtype=torch.bfloat16)
    both = torch.nn.Linear(1024, 2 * 4256, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, lanes, 4096, device="cuda").to(torch.bfloat16)
    with torch.inference_mode():
        assert (parts.tile_for(x, one.weight) is None) == (way == "library" or lanes > 64)
        terms, whole = (torch.compile(run, fullgraph=True, dynamic=False)(one, x) for run in (in_parts, at_once))
        joined = torch.compile(gated, fullgraph=True, dynamic=False)(x[..., :1024], both, one, one)
        exact = x.double() @ one.weight.double().T
        gate, up = (x[..., :1024].double() @ both.weight.double().T).chunk(2, -1)
    assert parts.cuts(*one.weight.shape) == 2 and terms.shape == (2, 1, lanes, 4128) and whole.dtype == joined.dtype == x.dtype
    for made in (terms.sum(0), whole):
        assert error_of(made, exact) < 1e-2
    assert error_of(joined, torch.nn.functional.silu(gate) * up) < 1e-2


def test_what_a_decode_leaves_does_not_harm_the_next() -> None:
    """Recorded in inference mode and outside, with other weights, with other settings; then the memory is given back."""
    model, decoder, prompts = model_of("block_causal"), d2f(block_length=16, threshold=0.3), prompts_of(2, 5, 60, 0)
    arguments: dict[str, Any] = {"max_new_tokens": 32, "cache": BlockCausalCache()}

    def agree(model: Any) -> bool:
        return decode(model, decoder, prompts, compile=True, **arguments).tokens == decode(model, decoder, prompts, **arguments).tokens

    decode_stream(model, decoder, prompts, rows=2, compile=True, **arguments)
    assert agree(model)
    with torch.inference_mode():
        assert agree(model)
    model.logits(torch.tensor([[1, 2, 3]], device="cuda")).sum().backward()
    model.zero_grad()
    other = model_of("block_causal", qkv_bias=False)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-1.2)
    model.load_state_dict(other.state_dict(), assign=True)
    assert agree(model)
    guided = Guided(model, 0.5)
    arguments["cache"] = NoCache()
    assert agree(guided)
    guided.scale = 2.0
    assert agree(guided)
    held = torch.cuda.memory_allocated()
    for one in (model, guided):
        workspace.forget(one)
    assert torch.cuda.memory_allocated() < held
