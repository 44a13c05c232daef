"""8-bit weights: rounding within its bound, products equal to what they say, and what a quantised model refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dllm_toolkit import doctor, recipe
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.models import memory
from dllm_toolkit.models.base import Query
from dllm_toolkit.models.eight_bit import EightBitError, QuantisedLinear, eight_bit_memory, format_of, quantise
from dllm_toolkit.models.families import CheckpointError
from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import ModelError, Transformer, TransformerConfig
from dllm_toolkit.ops import eight_bit
from dllm_toolkit.training import run as training

SMALL = {"vocab_size": 40, "mask_id": 39, "eos_ids": (38,), "pad_id": 38, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}


def small(**changes: Any) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(TransformerConfig(**{**SMALL, **changes})).eval()


def half_step(scaled: torch.Tensor, format: str) -> torch.Tensor:
    """Half the distance of the format's numbers around a number of it: at most that is lost by rounding to nearest."""
    if format == "int8":
        return torch.full_like(scaled, 0.5)
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()  # subnormals are as far apart as the smallest normal numbers
    return torch.exp2(exponent - 4)  # three bits of mantissa


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12), min_size=1, max_size=4).filter(
        lambda rows: len({len(row) for row in rows}) == 1
    ),
    format=st.sampled_from(eight_bit.FORMATS),
)
def test_rounding_loses_half_a_step(values: list[list[float]], format: eight_bit.Format) -> None:
    weight = torch.tensor(values, dtype=torch.float64)
    numbers, scale = eight_bit.quantise(weight, format)
    assert numbers.dtype == eight_bit.DTYPES[format] and scale.shape == (len(values), 1) and scale.dtype == torch.float32
    wide = scale.double()
    lost = (weight - numbers.double() * wide).abs()
    # float32 turns the quotient by a few units in its last place, and rounding may then fall to the other side.
    assert (lost <= wide * half_step(weight / wide, format) * (1 + 1e-5) + weight.abs() * 1e-6).all()
    assert (numbers.double().abs() <= eight_bit.LARGEST[format]).all()


@pytest.mark.parametrize("format", eight_bit.FORMATS)
def test_largest_numbers_and_zeros(format: eight_bit.Format) -> None:
    numbers, scale = eight_bit.quantise(torch.tensor([[0.0, 0.0], [3.0, -6.0], [-1e-30, 1e30]]), format)
    largest = eight_bit.LARGEST[format]
    assert numbers.float().tolist() == [[0, 0], [64 if format == "int8" else 224, -largest], [0, largest]]
    assert scale.isfinite().all() and (scale > 0).all()


def test_products_are_those_of_the_rounded_numbers() -> None:
    """The formulas against float64 products of the same rounded numbers: what differs is the order of float32 sums."""
    torch.manual_seed(1)
    x, weight = torch.randn(5, 64), torch.randn(24, 64)
    for format in eight_bit.FORMATS:
        numbers, scale = eight_bit.quantise(weight, format)
        own = eight_bit.dequantise(*eight_bit.quantise(x, "fp8"), torch.float64) if format == "fp8" else x.double()
        expected = own @ (numbers.double() * scale.double()).t()
        made = eight_bit.FORMULAS[format](x, numbers, scale.squeeze(1))
        magnitude = own.abs() @ (numbers.double().abs() * scale.double()).t()
        assert ((made.double() - expected).abs() <= 64 * 2.0**-24 * magnitude).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), format=st.sampled_from(eight_bit.FORMATS))
def test_a_quantised_map_is_near_the_exact_one(seed: int, rows: int, format: eight_bit.Format) -> None:
    """Within what rounding may lose: half a step of every weight, and of every activation where those are rounded too."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 32, generator=generator))
    x = torch.randn(rows, 3, 32, generator=generator)
    module = QuantisedLinear(linear.weight, linear.bias, format)
    with torch.no_grad():
        difference = (module(x) - linear(x)).abs()
    weight, scale = linear.weight.detach(), module.scale.unsqueeze(1)
    lost_w = scale * half_step(weight / scale, format) * 1.01
    lost_x = torch.zeros_like(x)
    if format == "fp8":
        own = x.abs().amax(-1, keepdim=True) / 448
        lost_x = own * half_step(x / own, "fp8") * 1.01
    bound = (x.abs() + lost_x) @ lost_w.t() + lost_x @ weight.abs().t() + 1e-5
    assert (difference <= bound).all()


@pytest.mark.parametrize("format", eight_bit.FORMATS)
def test_fused_maps_are_the_single_ones(format: eight_bit.Format) -> None:
    torch.manual_seed(2)
    for bias in (True, False):
        maps = [nn.Linear(24, outputs, bias=bias) for outputs in (8, 16, 3)]
        x = torch.randn(4, 24)
        alone = [QuantisedLinear(one.weight, one.bias, format) for one in maps]
        whole = QuantisedLinear.fused([maps[0], alone[1], maps[2]], format)
        assert whole.out_features == 27 and torch.equal(whole.bits, torch.cat([one.bits for one in alone]))
        assert torch.equal(whole.scale, torch.cat([one.scale for one in alone]))
        with torch.no_grad():  # a wider product may sum in another order
            torch.testing.assert_close(whole(x), torch.cat([one(x) for one in alone], dim=1), rtol=1e-6, atol=1e-6)
    with pytest.raises(EightBitError, match="read one input, have a bias or have none"):
        QuantisedLinear.fused([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], format)
    with pytest.raises(EightBitError, match="input widths"):
        QuantisedLinear.fused([nn.Linear(4, 4), nn.Linear(8, 4)], format)


@pytest.mark.parametrize("format", eight_bit.FORMATS)
@pytest.mark.parametrize("head", [True, False])
def test_a_quantised_model_answers_as_its_rounded_weights(format: eight_bit.Format, head: bool) -> None:
    model, rounded = small(), small()
    quantise(model, format, head=head)
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Linear) and (head or name != "lm_head"):
            module.weight.data = eight_bit.dequantise(*eight_bit.quantise(module.weight.data, format))
    assert isinstance(model.lm_head, QuantisedLinear) == head and isinstance(model.layers[0].q_proj, QuantisedLinear)
    query = Query(torch.arange(20).view(2, 10), torch.arange(10).expand(2, -1))
    with torch.inference_mode():
        made, expected = model(query), rounded(query)
    if format == "int8":
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    else:  # activations are rounded too: at most 1 / 16 of each, less on average
        assert float((made - expected).norm() / expected.norm()) < 0.05


def test_casts_keep_bits_and_scales() -> None:
    model = quantise(small(), "fp8")
    module = model.layers[1].down_proj
    bits, scale = module.bits.clone(), module.scale.clone()
    model.to(torch.bfloat16).to(torch.float32).to(torch.bfloat16)
    assert torch.equal(module.bits, bits) and module.bits.dtype == torch.uint8
    assert torch.equal(module.scale, scale) and module.scale.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        assert model(Query(torch.zeros(1, 4, dtype=torch.long), torch.arange(4).unsqueeze(0))).dtype == torch.bfloat16


def test_tied_embeddings_part_ways() -> None:
    model = small(tie_embeddings=True)
    need, exact = eight_bit_memory(model, torch.bfloat16), model.embed.weight.detach().clone()
    quantise(model.to(torch.bfloat16), "int8")
    assert not model.config.tie_embeddings and memory.required_memory(model, torch.bfloat16) == need
    model.to(torch.float32)  # would tie them again
    assert isinstance(model.lm_head, QuantisedLinear) and torch.equal(model.embed.weight, exact.bfloat16().float())
    kept = quantise(small(tie_embeddings=True), "int8", head=False)
    assert kept.config.tie_embeddings and kept.lm_head.weight is kept.embed.weight


@pytest.mark.parametrize("head", [True, False])
def test_memory_is_half(head: bool) -> None:
    """The estimate is what the model has, and at the shape of LLaDA-8B 8.5 GiB of 15."""
    model = small().to(torch.bfloat16)
    need = eight_bit_memory(model, torch.bfloat16, head)
    assert memory.required_memory(quantise(model, "fp8", head=head), torch.bfloat16) == need
    with torch.device("meta"):
        large = Transformer(
            TransformerConfig(
                vocab_size=126464, width=4096, layers=32, heads=32, mlp_width=12288, mask_id=126336, eos_ids=(126081,), pad_id=126081
            )
        )
    full, narrow = memory.required_memory(large, torch.bfloat16), eight_bit_memory(large, torch.bfloat16, head)
    assert narrow / full < (0.54 if head else 0.57)
    size = doctor.Size(sum(one.numel() for one in large.parameters()), 0, 0, 126464 * 4096)
    assert math.isclose(size.needs("fp8"), eight_bit_memory(large, torch.bfloat16), rel_tol=1e-2)


def test_where_a_model_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, card = small(), torch.device("cuda")
    full, narrow = memory.required_memory(model, torch.float32), eight_bit_memory(model, torch.float32)
    for free, expected in ((full, "cuda"), (full - 1, "cpu"), (narrow, "cpu")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.staging(model, torch.float32, card).type == expected
    monkeypatch.setattr(memory, "free_memory", lambda device: narrow - 1)
    with pytest.raises(CheckpointError, match="with its weights in 8 bits the model needs"):
        memory.staging(model, torch.float32, card)
    with pytest.raises(CheckpointError, match="not enough memory"):
        memory.check_memory(model, torch.float32, card)
    half = memory.required_memory(model, torch.bfloat16) - 1
    monkeypatch.setattr(memory, "free_memory", lambda device: half)
    with pytest.raises(CheckpointError, match="weights: fp8"):
        memory.check_memory(model, torch.float32, card)


def test_doctor_offers_eight_bits() -> None:
    gib = 2**30
    llada = doctor.Size(8_015_581_184, 0, 262_144, 126464 * 4096)
    card, host = doctor.Device("cuda", 14 * gib, ("bfloat16", "float32")), doctor.Device("cpu", 24 * gib, ("float32", "bfloat16"))
    text, device, dtype = doctor._fit(llada, [card, host])
    assert device is card and dtype == "bfloat16 model.weights=fp8" and "fits on cuda with 8-bit weights: 7.9 GiB of 14.0 GiB free" in text
    assert doctor._fit(llada, [card, doctor.Device("cpu", 8 * gib, ("float32", "bfloat16"))])[1] is None  # nowhere to make them


def test_load_and_decode() -> None:
    """From a checkpoint, with the adapter merged first; a decode is that of a model quantised in memory."""
    model = load("asset:teacher", adapter="asset:d2f", weights="int8")
    other = quantise(load("asset:teacher", adapter="asset:d2f"), "int8")
    assert format_of(model) == "int8" and all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    prompt = [[5, 6, 7]]
    first = decode(model, semi_ar(block_length=8), prompt, max_new_tokens=16)
    assert first.tokens == decode(other, semi_ar(block_length=8), prompt, max_new_tokens=16).tokens
    assert isinstance(load("asset:teacher", weights="fp8", quantise_head=False).lm_head, nn.Linear)


def test_refusals(tmp_path: Path) -> None:
    model = quantise(small(), "fp8")
    with pytest.raises(ModelError, match="8 bits is not saved, got fp8"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(EightBitError, match="in 8 bits already"):
        quantise(model, "int8")
    with pytest.raises(EightBitError, match="cannot be trained through"):
        model.layers[0].q_proj(torch.ones(1, 32, requires_grad=True))
    with pytest.raises(EightBitError, match="NaN or infinity"):
        QuantisedLinear(torch.tensor([[1.0, float("nan")]]), None, "fp8")
    with pytest.raises(EightBitError, match="weights must be fp8 or int8, got 'int4'"):
        load("asset:teacher", weights="int4")  # type: ignore[arg-type]
    with pytest.raises(EightBitError, match="Write weights: fp8 too"):
        load("asset:teacher", quantise_head=False)
    with pytest.raises(EightBitError, match="merge_adapter: true"):
        load("asset:teacher", adapter="asset:d2f", merge_adapter=False, weights="fp8")
    with pytest.raises(EightBitError, match="adapter that is not merged"):
        quantise(load("asset:teacher", adapter="asset:d2f", merge_adapter=False), "fp8")
    with pytest.raises(EightBitError, match="unknown kernel, got 'fast'"):
        QuantisedLinear(torch.ones(2, 2), None, "fp8", kernel="fast")


def test_training_refuses() -> None:
    found = recipe.load("recipes/train/d2f.yaml", ["model.weights=fp8"])
    with pytest.raises(training.TrainError, match="only exact weights are trained, got a model with weights: fp8") as caught:
        training._prepare(found, found.build(training.TrainRecipe))
    assert "d2f.yaml" in str(caught.value)


def test_what_runs_where() -> None:
    """On a CPU the formulas run, for every precision; the names of the best kernels exist."""
    for format in eight_bit.FORMATS:
        numbers, _ = eight_bit.quantise(torch.ones(16, 128), format)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            best = eight_bit.best_on(format, numbers.device, *numbers.shape)
            assert eight_bit.choose(format, torch.ones(1, 128, dtype=dtype), best) is eight_bit.FORMULAS[format]
        assert eight_bit.BEST[format] in eight_bit.KERNELS


def test_int_mm_is_the_formula_of_int8_activations() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    numbers, scale = eight_bit.quantise(weight, "int8")
    own = eight_bit.dequantise(*eight_bit.quantise(x, "int8"))
    made = eight_bit.int_mm(x, numbers, scale.squeeze(1))
    torch.testing.assert_close(made, F.linear(own, eight_bit.dequantise(numbers, scale)), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(eight_bit.KERNELS))
@pytest.mark.parametrize("rows", [1, 16, 50, 200])
def test_kernels_are_their_formulas(name: str, rows: int) -> None:
    """Every kernel against the formula of the same rounded numbers, at half precision's own error."""
    torch.manual_seed(4)
    x, weight = torch.randn(rows, 1024).bfloat16().cuda(), torch.randn(528, 1024).cuda() * 0.02
    format: eight_bit.Format = "fp8" if "fp8" in name or name.startswith("scaled_mm") else "int8"
    numbers, scale = eight_bit.quantise(weight, format)
    made = eight_bit.KERNELS[name](x, numbers, scale.squeeze(1)).float()
    if name == "int_mm":
        expected = F.linear(eight_bit.dequantise(*eight_bit.quantise(x, "int8")), eight_bit.dequantise(numbers, scale))
    else:
        expected = eight_bit.FORMULAS[format](x.float(), numbers, scale.squeeze(1))
    assert float((made - expected).norm() / expected.norm()) < 4e-3
