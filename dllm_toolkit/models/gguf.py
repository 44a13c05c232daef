"""GGUF files through transformers' own reader (which needs the `gguf` package): Llama, Qwen2 and Qwen3 baselines.

GGUF weights are quantised. transformers turns them back into float32 on the host, so this path holds the model twice for a moment; it is
meant for small baselines such as SmolLM2. The result is an ordinary config.json and ordinary names, which the families understand.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from dllm_toolkit.models.families.base import CheckpointError


def gguf_file(path: str) -> Path | None:
    """The GGUF file meant by a path: the file itself, or the only one of a directory without config.json; None if there is none."""
    where = Path(path).expanduser()
    if where.is_file() and where.suffix == ".gguf":
        return where
    if not where.is_dir() or (where / "config.json").exists():
        return None
    files = sorted(where.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{where} holds {len(files)} GGUF files, got {', '.join(file.name for file in files[:4])}. Each is a whole model. "
            "Write the path of one of them."
        )
    return files[0] if files else None


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """config.json as transformers would write it, the dequantised tensors under their Hugging Face names, and the tokenizer."""
    if find_spec("gguf") is None:
        raise CheckpointError(
            f"{file} is a GGUF file and the gguf package is not installed. It turns quantised weights back into "
            "numbers. Run pip install gguf, or use the safetensors checkpoint."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} cannot be read, got {type(error).__name__}: {str(error).splitlines()[0]}. The file is damaged or of "
            "an architecture that transformers does not read from GGUF. Use the safetensors checkpoint."
        ) from error
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    return config, dict(model.state_dict()), tokenizer
