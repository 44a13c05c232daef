"""Saving: shards, original names, and that what was saved loads back as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_toolkit.models.load import load
from dllm_toolkit.models.transformer import ModelError, RopeScaling, Transformer
from tests.unit.test_families import DECODER_ONLY, LLADA, write
from tests.unit.test_load import CONFIG, build, same_weights

VECTORS = Path(__file__).parents[1] / "golden" / "vectors"
KINDS: dict[str, dict[str, Any]] = {
    "llada": {**LLADA},
    "dream": {**DECODER_ONLY, "model_type": "Dream", "mask_token_id": 60},
    "sdar": {**DECODER_ONLY, "model_type": "sdar", "mask_token_id": 60},
    "fast_dllm_v2": {**DECODER_ONLY, "model_type": "Fast_dLLM_Qwen", "mask_token_id": 60, "tie_word_embeddings": True},
    "llama": {**DECODER_ONLY, "model_type": "llama"},
    "qwen2": {**DECODER_ONLY, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**DECODER_ONLY, "model_type": "qwen3", "head_dim": 20},
}


def same(one: Transformer, other: Transformer) -> bool:
    return one.config == other.config and same_weights(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_original_and_native_round_trips(tmp_path: Path, kind: str) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", KINDS[kind])
    model = load(str(tmp_path / "source"))
    for names in ("original", "native"):
        model.save_pretrained(tmp_path / names, names=names)
        again = load(str(tmp_path / names))
        assert same(again, model)
    before, after = (load_file(str(tmp_path / name / "model.safetensors")) for name in ("source", "original"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert {**KINDS[kind], "torch_dtype": "float32"}.items() <= config.items()


def test_golden_checkpoints_keep_their_names_and_files(tmp_path: Path) -> None:
    for name in ("llada-tiny", "dream-tiny"):
        load(str(VECTORS / name)).save_pretrained(tmp_path / name, names="original")
        before, after = (load_file(str(folder / name / "model.safetensors")) for folder in (VECTORS, tmp_path))
        assert before.keys() == after.keys()
        assert json.loads((VECTORS / name / "config.json").read_text()) == json.loads((tmp_path / name / "config.json").read_text())
    assert (tmp_path / "dream-tiny" / "generation_config.json").exists()


def test_transformers_reads_what_was_saved_under_original_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", {**KINDS["qwen2"], "rope_theta": 1e5})
    model = load(str(tmp_path / "source"))
    model.save_pretrained(tmp_path / "saved", names="original", shard_bytes=40_000)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    tokens = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(model.logits(tokens)[:, 1:], theirs(tokens).logits[:, :-1].detach(), atol=1e-4, rtol=0)


def test_what_the_original_format_cannot_say_is_kept(tmp_path: Path) -> None:
    """A merged D2F student is its teacher's checkpoint under another attention rule."""
    adapter = str(VECTORS / "lora-llada-tiny")
    model = load(str(VECTORS / "llada-tiny"), adapter=adapter, attention="block_causal", block_size=8)
    model.save_pretrained(tmp_path / "student", names="original")
    again = load(str(tmp_path / "student"))
    assert (again.spec.attention, again.spec.block_size) == ("block_causal", 8)
    assert same(again, model)
    # Saved once more, now as what it was made from.
    load(str(tmp_path / "student"), attention="full").save_pretrained(tmp_path / "other", names="original")
    assert load(str(tmp_path / "other")).spec.attention == "full"


def test_a_mask_id_that_was_given_is_kept(tmp_path: Path) -> None:
    config = {key: value for key, value in KINDS["dream"].items() if key != "mask_token_id"}
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", config)
    load(str(tmp_path / "source"), mask_id=57).save_pretrained(tmp_path / "saved", names="original")
    assert load(str(tmp_path / "saved")).spec.mask_id == 57


def test_shards(tmp_path: Path) -> None:
    model = build(tie_embeddings=True, qkv_bias=True)
    model.save_pretrained(tmp_path, shard_bytes=20_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert same(load(str(tmp_path)), model)
    # Saved again as one file: no shard of the first save is left to be read.
    build().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert same(load(str(tmp_path)), build())


def test_every_new_switch_survives(tmp_path: Path) -> None:
    model = build(qk_norm=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), attention="causal", shift=1, mask_id=CONFIG.vocab_size)
    model.save_pretrained(tmp_path)
    assert same(load(str(tmp_path)), model)


def test_a_new_model_has_no_original_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there are no original names"):
        build().save_pretrained(tmp_path, names="original")
    with pytest.raises(ModelError, match="names must be native or original, got 'llada'"):
        build().save_pretrained(tmp_path, names="llada")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
