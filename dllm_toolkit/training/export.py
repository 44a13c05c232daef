"""What a run leaves behind: weights that load without Lightning, and a card that says where they come from.

A card is two files: card.json for programs, README.md for people (rendered from card.json, never edited).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.transformer import Transformer
from dllm_toolkit.training.corruptors import Batch
from dllm_toolkit.training.layouts import full_allow
from dllm_toolkit.training.lora import has_adapter, save_adapter

if TYPE_CHECKING:
    from dllm_toolkit.recipe import Recipe


class ExportError(ToolkitError):
    """Weights that would not survive being written."""


def cast_report(model: Transformer, batch: Batch, dtype: torch.dtype) -> dict[str, float]:
    """How much rounding the weights to `dtype` (and back to float32) changes the logits of one batch.

    Returns the largest absolute change, the share of answer positions with the same argmax, and the share where the new best token was
    the best before or its equal (its probability within 0.05 of the best one's): where the data leaves the word open, rounding breaks a
    tie, and that is no damage.
    """
    allow = None if model.spec.attention == "causal" else full_allow(batch)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model.logits(batch.tokens, allow).float()
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        after = model.logits(batch.tokens, allow).float()
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    chosen, probability = after.argmax(-1), before.softmax(-1)
    same = (before.argmax(-1) == chosen)[batch.answer]
    loss = probability.amax(-1) - probability.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return {
        "largest_change_of_a_logit": float((after - before).abs().max()),
        "same_argmax": float(same.float().mean()),
        "as_good_argmax": float((loss <= 0.05)[batch.answer].float().mean()),
    }


def export(model: Transformer, directory: Path, batch: Batch, *, attention: str, block_size: int | None) -> dict[str, float]:
    """Write `model` (float16), or its adapter (float32) if it has one, to `directory`. Returns the cast report ({} for adapters).

    Raises ExportError, and writes nothing, if float16 cannot hold the weights or changes what the model says.
    """
    if has_adapter(model):
        save_adapter(model, directory, attention=attention, block_size=block_size)
        _readable(directory)
        return {}
    report = cast_report(model, batch, torch.float16)
    # `not >=` also catches NaN, which an overflow would give.
    if not report["as_good_argmax"] >= 0.99:
        raise ExportError(
            f"float16 changes the model, got an argmax as good at a share of {report['as_good_argmax']:.4f} of the positions. Weights "
            "beyond 65504 or a diverged run do that. Look at the loss in TensorBoard; nothing was exported."
        )
    model.save_pretrained(directory, torch.float16)
    _readable(directory)
    return report


def _readable(directory: Path) -> None:
    """safetensors writes files that only their owner can read; these are to be installed and shared."""
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)


def write_training_card(
    directory: Path,
    recipe: Recipe,
    *,
    summary: str,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    device: torch.device,
) -> None:
    """The card of what a recipe trained. training, metrics: by name, what only this kind of training has."""
    import lightning.pytorch as pl

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__}
    write_card(
        directory,
        {
            "name": directory.name,
            "summary": summary,
            "command": f"dllm-toolkit train {recipe.path}",
            "recipe_hash": recipe.hash(),
            "training": {**training, "device": where, "versions": versions},
            "metrics": dict(metrics),
            "recipe": recipe.to_yaml(),
        },
    )


def write_card(directory: Path, card: Mapping[str, Any]) -> None:
    """Write card.json and README.md into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_readme(card), encoding="utf-8")


def update_card(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Add measured results (accuracies and the like) to the card in `directory`; present names are replaced."""
    path = directory / "card.json"
    if not path.is_file():
        raise ExportError(f"there is no card to update, got {path}. Cards are written by training. Run `dllm-toolkit train` first.")
    card = json.loads(path.read_text(encoding="utf-8"))
    card["metrics"] = {**card.get("metrics", {}), **metrics}
    write_card(directory, card)


def _readme(card: Mapping[str, Any]) -> str:
    def table(rows: Mapping[str, Any]) -> list[str]:
        return ["| | |", "| --- | --- |", *(f"| {key.replace('_', ' ')} | {_text(value)} |" for key, value in rows.items())]

    lines = [
        f"# {card['name']}",
        "",
        card["summary"],
        "",
        "## How it was made",
        "",
        *table(card["training"]),
        "",
        "## Measured",
        "",
        *table(card["metrics"]),
        "",
        "## Recipe",
        "",
        f"Retrain with `{card['command']}`. The resolved recipe:",
        "",
        "```yaml",
        card["recipe"].rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_text(inner)}" for key, inner in value.items())
    return str(value)
