"""LoRA: injection, the teacher behind it, the PEFT directory, and the official D2F loss with its gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import Transformer, TransformerConfig, transformer
from dllm_toolkit.training.composed import Copy
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.lora import Lora, LoraError, adapter_off, inject, save_adapter
from dllm_toolkit.training.objectives import D2FDistillation

GOLDEN = Path(__file__).parents[1] / "golden" / "vectors"
CASES = json.loads((GOLDEN / "training" / "d2f_training.json").read_text())["cases"]
TOKENS = torch.arange(20).view(2, 10) % 9


def tiny() -> Transformer:
    return transformer(
        vocab_size=11, mask_id=10, eos_ids=[9], pad_id=8, width=16, layers=2, heads=2, mlp_width=32, max_positions=32, seed=1
    )


def trained(model: Transformer) -> Transformer:
    """An adapter that does something: PEFT starts with B = 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_only_the_adapter_is_trained_and_switching_it_off_gives_the_base() -> None:
    base = tiny()
    before = base.logits(TOKENS)
    model = trained(inject(base, Lora(rank=4, alpha=8)))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 4 * 2 and all("lora_" in name for name in trainable)
    with torch.no_grad(), adapter_off(model):
        assert torch.equal(model.logits(TOKENS), before)
    assert (model.logits(TOKENS) - before).abs().max() > 0.01
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


def test_a_target_that_exists_nowhere_is_an_error_that_lists_what_does() -> None:
    with pytest.raises(LoraError, match=r"\['attn_out'\].*down_proj.*q_proj"):
        inject(tiny(), Lora(targets=("q_proj", "attn_out")))


def test_without_an_adapter_there_is_no_teacher_to_switch_to_and_nothing_to_save(tmp_path) -> None:
    with pytest.raises(LoraError, match="without an adapter"), adapter_off(tiny()):
        pass
    with pytest.raises(LoraError, match="no adapter to save"):
        save_adapter(tiny(), tmp_path, attention="block_causal", block_size=4)


def test_round_trip_through_the_peft_directory(tmp_path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    model = trained(inject(base, Lora(rank=4, alpha=12, targets=("q_proj", "down_proj"))))
    expected = model.logits(TOKENS)
    save_adapter(model, tmp_path / "adapter", attention="block_causal", block_size=4)
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.layers.1.down_proj.lora_B.weight" in names and len(names) == 8
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 12, ["down_proj", "q_proj"])
    loaded = load(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert (loaded.spec.attention, loaded.spec.block_size) == ("block_causal", 4)
    everyone = torch.ones(1, 10, 10, dtype=torch.bool)
    assert torch.allclose(loaded.logits(TOKENS, everyone), expected, atol=1e-5)


def test_peft_itself_reads_what_was_saved(tmp_path) -> None:
    from peft import PeftModel

    model = trained(inject(tiny(), Lora(rank=4)))
    expected = model.logits(TOKENS)
    save_adapter(model, tmp_path, attention="block_causal", block_size=4)
    other = PeftModel.from_pretrained(tiny(), str(tmp_path))
    assert torch.allclose(other.base_model.model.logits(TOKENS), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_official_loss_and_its_gradients(case) -> None:
    """Loss within 1e-4, gradient norm of every LoRA tensor within 1e-3, mask exactly; LLaDA (shift 0) and Dream (shift 1)."""
    tensors = {
        name.removeprefix(case["name"] + "."): value
        for name, value in load_file(GOLDEN / "training" / "d2f_training.safetensors").items()
        if name.startswith(case["name"] + ".")
    }
    adapter = GOLDEN / case["adapter"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    model = load(str(GOLDEN / "llada-tiny")) if case["checkpoint"] == "llada-tiny" else _dream()
    inject(model, Lora(rank=config["r"], alpha=config["lora_alpha"]))
    official = _fill(model, load_file(adapter / "adapter_model.safetensors"))
    arguments = case["args"]
    prompt = torch.tensor(arguments["question_length"])
    # Answers run to the end of the row, whatever the prompt's length.
    batch = Batch(tensors["input_ids"], prompt, tensors["input_ids"].shape[1] - int(prompt.min()))
    masked = tensors["masked_indices"]
    weight = masked / torch.where(masked, tensors["p_mask"], 1.0)
    objective = D2FDistillation(block_length=arguments["block_size"], self_align=arguments["self_align"])
    view = objective.shown(batch, [Copy(tensors["noisy_batch"], weight)], model.spec, torch.Generator(), 1.0)
    assert view.seen.allow is not None and torch.equal(view.seen.allow, tensors["attention_allowed"])
    if objective.needs_teacher:
        with torch.no_grad(), adapter_off(model):
            view = objective.teach(model, batch, view)
    loss = objective.loss(model, batch, view).value
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-4)
    loss.backward()
    for name, parameter in official.items():
        assert float(parameter.grad.norm()) == pytest.approx(case["lora_grad_l2"][name], rel=1e-3), name


def _dream() -> Transformer:
    """dream-tiny in the native model: Qwen2 layout with q/k/v biases, grouped keys and logits one position early."""
    config = json.loads((GOLDEN / "dream-tiny" / "config.json").read_text())
    model = Transformer(
        TransformerConfig(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            mlp_width=config["intermediate_size"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            mask_id=config["mask_token_id"],
            eos_ids=(config["eos_token_id"],),
            pad_id=config["pad_token_id"],
            qkv_bias=True,
            shift=1,
        )
    )
    renamed = {
        "self_attn.": "", "mlp.": "", "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
        "model.embed_tokens": "embed", "model.": "",
    }  # fmt: skip
    state = {}
    for name, value in load_file(GOLDEN / "dream-tiny" / "model.safetensors").items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = value
    model.load_state_dict(state)
    return model


def _fill(model: Transformer, tensors: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """Copy an adapter in the official layout into the injected one; returns our parameters under the names of the gradient table."""
    own = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    used: dict[str, torch.nn.Parameter] = {}
    for name, value in tensors.items():
        parts = name.removeprefix("base_model.model.").split(".")
        layer = next(part for part in parts if part.isdigit())
        module = parts[-3].replace("attn_out", "o_proj")
        parameter = own[f"layers.{layer}.{module}.{parts[-2]}.default.weight"]
        parameter.data.copy_(value)
        used[name.removeprefix("base_model.model.")] = parameter
    assert len(used) == len(own)
    return used
