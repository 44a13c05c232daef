"""Where a checkpoint lies: a directory, a hub id, or a model that ships with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from dllm_toolkit.models.families.base import CheckpointError

WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def resolve(path: str, revision: str | None, argument: str = "path") -> Path:
    """The local directory of a path, an `asset:NAME`, or a hub id (downloaded: safetensors, JSON and tokenizer files only).

    argument: how the caller's own argument is called, for the message. Raises CheckpointError.
    """
    if path.startswith("asset:"):
        return _asset(path)
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    looks_like_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not local.exists()
    if not looks_like_hub_id:
        raise CheckpointError(
            f"no checkpoint directory at {path!r}. A directory with config.json and model.safetensors is expected. "
            "Write an existing directory, a hub id such as GSAI-ML/LLaDA-8B-Instruct, or asset:teacher."
        )
    return _download(path, revision, argument)


CONFIGURATIONS = ("config.json", "adapter_config.json")
"""What makes a directory a model or an adapter; other shipped weights, such as a filter, are loaded by their own kind."""


def _asset(path: str) -> Path:
    assets = Path(str(resources.files("dllm_toolkit") / "assets"))
    shipped = sorted(item.name for item in assets.iterdir() if any((item / name).is_file() for name in CONFIGURATIONS))
    directory = assets / path.removeprefix("asset:")
    if directory.name not in shipped or directory.parent != assets:
        raise CheckpointError(
            f"no shipped model is called {path!r}. Shipped: {', '.join(f'asset:{name}' for name in shipped)}. Write one of these."
        )
    return directory


def _download(name: str, revision: str | None, argument: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        folder = f"checkpoints/{name.split('/')[1]}"
        pinned = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"the hub id {name!r} is not in the local cache and could not be fetched, got {type(error).__name__}: "
            f"{str(error).splitlines()[0]}. Its *.safetensors and *.json files are needed. Check the name and the connection; or, where "
            f"there is a connection, run `hf download {name}{pinned} --local-dir {folder}`, copy that folder here, and write "
            f"{argument}: {folder}."
        ) from error
