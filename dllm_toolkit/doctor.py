"""`dllm-toolkit doctor`: what this machine has, which checkpoints are in reach, whether they fit, and the line to type next.

Nothing is loaded: sizes come from the headers of the safetensors files, so a 16 GB checkpoint is judged in milliseconds. The network is
left alone unless --online asks for it. Each check is a function that returns findings; printing is the last function.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from dllm_toolkit import __version__
from dllm_toolkit.errors import ToolkitError

SPARE = 2**30
"""Memory left for activations and the runtime when a fit is judged."""

HUB = (
    # id, parameters, K/V numbers of one token, recipe
    ("GSAI-ML/LLaDA-8B-Instruct", 8_015_581_184, 262_144, "recipes/decode/llada.yaml"),
    ("Dream-org/Dream-v0-Instruct-7B", 7_615_616_512, 28_672, "recipes/decode/dream.yaml"),
)
"""The published checkpoints that the recipes name: what they would need, before they are downloaded."""

_PACKAGES = ("torch", "transformers", "lightning", "peft", "safetensors", "huggingface_hub", "tensorboard")
_RECIPES = {
    "llada": "recipes/decode/llada.yaml",
    "dream": "recipes/decode/dream.yaml",
    "native": "recipes/decode/llada.yaml",
    "llama": "recipes/decode/autoregressive.yaml",
    "qwen2": "recipes/decode/autoregressive.yaml",
    "qwen3": "recipes/decode/autoregressive.yaml",
}
"""By family, what answers a prompt."""
_EMBEDDINGS = ("embed.weight", "embed_tokens.weight", "wte.weight")
_STORY = (
    "dllm-toolkit generate recipes/decode/d2f_stories.yaml --trace "
    'prompt="Noah brings 32 magnets from home. Nora has 3 times as many magnets as Noah. What is the difference between Nora and Noah now?"'
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. fault: this stops something that was asked for. next: the command to type."""

    area: str
    text: str
    next: str | None = None
    fault: bool = False


@dataclass(frozen=True)
class Device:
    """Where a model could live. name: as a recipe writes it; free: bytes."""

    name: str
    free: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """A checkpoint's size: number of parameters, bytes on disk, and numbers of keys and values that one token needs (0: not known).

    kept: parameters that stay as they are when the linear maps go into 8 bits (embeddings and norms); None: not known.
    """

    parameters: int
    stored: int
    kv: int
    kept: int | None = None

    def needs(self, dtype: str, tokens: int = 0) -> int:
        """Bytes of the weights, and of the keys and values of `tokens` tokens, in `dtype`; `fp8` is bfloat16 with `weights: fp8`."""
        if dtype == "fp8":
            assert self.kept is not None
            return self.parameters + self.kept + self.kv * tokens * 2
        return (self.parameters + self.kv * tokens) * (4 if dtype == "float32" else 2)


def run_doctor(checkpoints: Sequence[str] = (), *, online: bool = False) -> int:
    """Print the report to stdout; 0, or 1 if a package, a named checkpoint or the hub is not usable."""
    found = devices()
    findings = [*versions(), *hardware(found)]
    if checkpoints:
        for path in checkpoints:
            findings += examine(path, found)
    else:
        findings += in_reach(found)
    if online:
        findings.append(hub())
    _print(findings)
    return 1 if any(finding.fault for finding in findings) else 0


def versions() -> list[Finding]:
    """Python, this package and what it stands on, against the ranges that the package asks for."""
    from packaging.requirements import Requirement

    findings = [Finding("versions", f"python {platform.python_version()}, dllm-toolkit {__version__}")]
    try:
        wanted = {item.name: item for line in metadata.requires("dllm-toolkit") or () if (item := Requirement(line)).marker is None}
    except metadata.PackageNotFoundError:
        findings.append(Finding("versions", "dllm-toolkit runs from its source folder, it is not installed", "pip install -e ."))
        wanted = {}
    present = []
    for name in _PACKAGES:
        needed = wanted.get(name)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding("versions", f"{name} is missing", f'pip install "{needed or name}"', fault=True))
            continue
        present.append(f"{name} {version}")
        if needed is not None and not needed.specifier.contains(version, prereleases=True):
            findings.append(Finding("versions", f"{name} {version} is outside {needed.specifier}", f'pip install "{needed}"', fault=True))
    findings.insert(1, Finding("versions", ", ".join(present)))
    return findings


def devices() -> list[Device]:
    """The GPUs that torch sees, then the CPU, with what is free on each."""
    import torch

    from dllm_toolkit.models.memory import free_memory

    found = []
    for index in range(torch.cuda.device_count()):
        free = free_memory(torch.device("cuda", index)) or 0
        dtypes = ("bfloat16", "float32") if torch.cuda.is_bf16_supported() else ("float16", "float32")
        found.append(Device("cuda" if index == 0 else f"cuda:{index}", free, dtypes))
    return [*found, Device("cpu", free_memory(torch.device("cpu")) or 0, ("float32", "bfloat16"))]


def hardware(found: Sequence[Device]) -> list[Finding]:
    """Cores, memory and GPUs, and the quickstart for what is there."""
    import torch

    from dllm_toolkit.models.memory import gibibytes

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [device for device in found if device.name != "cpu"]
    findings = [
        Finding(
            "devices",
            f"cpu: {cores} core{'s' if cores > 1 else ''}, {gibibytes(found[-1].free)} of memory free",
            None if gpus else "dllm-toolkit compare recipes/quickstart.yaml",
        )
    ]
    for index, device in enumerate(gpus):
        total = torch.cuda.get_device_properties(index).total_memory
        text = (
            f"{device.name}: {torch.cuda.get_device_name(index)}, {gibibytes(device.free)} of {gibibytes(total)} free, {device.dtypes[0]}"
        )
        line = f"dllm-toolkit compare recipes/quickstart.yaml run.device={device.name} run.batch_size=8 output=runs/gpu"
        findings.append(Finding("devices", text, None if index else line))
    if not gpus:
        driver = Path("/proc/driver/nvidia/version").exists()
        built = torch.version.cuda is not None
        if driver and not built:
            findings.append(
                Finding("devices", "there is an NVIDIA driver, but this torch is built for the CPU", "pip install --force-reinstall torch")
            )
        else:
            findings.append(Finding("devices", "no CUDA device" + (": nvidia-smi says why" if driver else "")))
    return findings


def in_reach(found: Sequence[Device]) -> list[Finding]:
    """Shipped models, the folder checkpoints/, the hub's cache, and what the recipes name but is not here."""
    from dllm_toolkit.models.hub import CONFIGURATIONS
    from dllm_toolkit.models.memory import gibibytes

    findings = []
    assets = Path(str(resources.files("dllm_toolkit") / "assets"))
    for directory in sorted(path for path in assets.iterdir() if any((path / name).is_file() for name in CONFIGURATIONS)):
        kind = "adapter" if _is_adapter(directory) else "model"
        text = f"asset:{directory.name}: shipped {kind}, {_count(measure(directory).parameters)} parameters"
        findings.append(Finding("checkpoints", text, _STORY if kind == "adapter" else None))
    here = set()
    for name, directory in (*_local(), *_cached()):
        findings += _judge(name, directory, found)
        here.add(Path(name).name)
    for name, parameters, kv, recipe in HUB:
        if Path(name).name not in here:
            size = Size(parameters, 2 * parameters, kv)
            text = f"{name}: not here; {_count(parameters)} parameters, {gibibytes(size.stored)} to download; {_fit(size, found)[0]}"
            local = f"checkpoints/{Path(name).name}"
            findings.append(Finding("checkpoints", text, f"hf download {name} --local-dir {local}   # then {recipe}, model.path={local}"))
    return findings


def examine(path: str, found: Sequence[Device]) -> list[Finding]:
    """One checkpoint that was asked for: a directory, a .gguf file, a hub id in the cache, or asset:NAME."""
    from dllm_toolkit.models.memory import gibibytes

    if path.startswith("asset:"):
        from dllm_toolkit.models.hub import resolve

        try:
            return _judge(path, resolve(path, None), found)
        except ToolkitError as problem:
            return [Finding("checkpoints", str(problem), fault=True)]
    directory = Path(path).expanduser()
    if directory.is_file() and directory.suffix == ".gguf":
        text = f"{path}: GGUF file, {gibibytes(directory.stat().st_size)} on disk, read as a dense model"
        return [Finding("checkpoints", text, f'dllm-toolkit generate recipes/decode/autoregressive.yaml model.path={path} prompt="..."')]
    if directory.is_dir():
        return _judge(path, directory, found)
    cached = dict(_cached()).get(path)
    if cached is not None:
        return _judge(path, cached, found)
    known = next((name for name, *_ in HUB if Path(name).name == directory.name), None)
    if known is not None and path != known:
        return [Finding("checkpoints", f"{path}: no such directory", f"hf download {known} --local-dir {path}", fault=True)]
    if path.count("/") == 1 and not path.startswith((".", "/", "~", "checkpoints/")):
        local = f"checkpoints/{directory.name}"
        text = f"{path}: no such directory, and no such id in the hub's cache on this machine"
        return [Finding("checkpoints", text, f"hf download {path} --local-dir {local}", fault=True)]
    return [Finding("checkpoints", f"{path}: no such directory", "dllm-toolkit doctor", fault=True)]


def measure(directory: Path) -> Size:
    """The size of a checkpoint, from the headers of its safetensors files. CheckpointError for a missing or damaged file."""
    from dllm_toolkit.models.weights import stored_tensors

    tensors = stored_tensors(directory, "adapter_model" if _is_adapter(directory) else "model").values()
    kv = sum(tensor.shape[0] for tensor in tensors if tensor.name.endswith(("k_proj.weight", "v_proj.weight")))
    kept = sum(math.prod(one.shape) for one in tensors if len(one.shape) < 2 or one.name.endswith(_EMBEDDINGS))
    return Size(sum(math.prod(tensor.shape) for tensor in tensors), sum(tensor.size for tensor in tensors), kv, kept)


def hub() -> Finding:
    """Whether the hub answers. Only this check uses the network."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    name = HUB[0][0]
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)
    except Exception as problem:  # whatever goes wrong is the finding: the client's own errors have no common base
        text = f"the hub does not answer, got {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else 'no message'}"
        if constants.is_offline_mode():
            return Finding("network", text, "unset HF_HUB_OFFLINE", fault=True)
        return Finding(
            "network", text, f"hf download {name} --local-dir checkpoints/{Path(name).name}   # elsewhere, then copy it", fault=True
        )
    return Finding("network", "the hub answers", f"hf download {name} --local-dir checkpoints/{Path(name).name}")


def _judge(name: str, directory: Path, found: Sequence[Device]) -> list[Finding]:
    """What a directory holds, whether it is whole and known, and where it fits."""
    from dllm_toolkit.models.families import family_of
    from dllm_toolkit.models.memory import gibibytes
    from dllm_toolkit.models.weights import read_json

    try:
        size = measure(directory)
        if _is_adapter(directory):
            config = read_json(directory / "adapter_config.json")
            base = config.get("base_model_name_or_path")
            text = f"{name}: LoRA adapter of {base}, rank {config.get('r')}, {_count(size.parameters)} parameters, {gibibytes(size.stored)}"
            recipe = f"recipes/decode/d2f_{'dream' if 'dream' in str(base).lower() else 'llada'}.yaml"
            line = f'dllm-toolkit generate {recipe} model.path={base} model.adapter={name} prompt="..."'
            return [Finding("checkpoints", text, _STORY if name.startswith("asset:") else line)]
        config = read_json(directory / "config.json")
        family = family_of(config).name
    except ToolkitError as problem:
        again = (
            f"hf download {name} --local-dir checkpoints/{Path(name).name}" if name.count("/") == 1 and not Path(name).is_dir() else None
        )
        return [Finding("checkpoints", f"{name}: {problem}", again, fault=True)]
    room, device, dtype = _fit(size, found)
    text = f"{name}: {family}, {_count(size.parameters)} parameters, {gibibytes(size.stored)} on disk; {room}"
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer.model").is_file():
        text += "; no tokenizer, so prompts are ids"
        prompt = "prompt_ids=[1,2,3]"
    else:
        prompt = 'prompt="..."'
    if device is None:
        smaller = "dllm-toolkit compare recipes/quickstart.yaml"
        return [Finding("checkpoints", text, smaller, fault=True)]
    recipe = "recipes/decode/autoregressive.yaml" if config.get("attention") == "causal" else _RECIPES.get(family)
    short = " run.max_new_tokens=64" if (config.get("max_positions") or 4096) < 1024 else ""
    line = f"dllm-toolkit generate {recipe} model.path={name} model.dtype={dtype} model.device={device.name}{short} {prompt}"
    return [Finding("checkpoints", text, line if recipe else "dllm-toolkit list decoder")]


def _fit(size: Size, found: Sequence[Device], tokens: int = 4096) -> tuple[str, Device | None, str]:
    """In words, where a model of this size fits with the keys and values of `tokens` tokens; the first such device and type."""
    from dllm_toolkit.models.memory import gibibytes

    host = next((device.free for device in found if device.name == "cpu"), 0)
    for device in found:
        for dtype in device.dtypes:
            if size.needs(dtype, tokens) + SPARE <= device.free:
                slow = " (slowly: a forward reads all of it)" if device.name == "cpu" and size.parameters > 1e9 else ""
                text = f"fits on {device.name} in {dtype}{slow}: {gibibytes(size.needs(dtype))} of {gibibytes(device.free)} free"
                cache = f", and {gibibytes(size.needs(dtype, 1024) - size.needs(dtype))} of keys and values for 1024 tokens"
                return text + (cache if size.kv else ""), device, dtype
        # 8 bits are made on the way, from full weights in host memory.
        made = device.name != "cpu" and size.kept is not None and size.needs("bfloat16") + SPARE <= host
        if made and "bfloat16" in device.dtypes and size.needs("fp8", tokens) + SPARE <= device.free:
            need = gibibytes(size.needs("fp8"))
            text = f"fits on {device.name} with 8-bit weights: {need} of {gibibytes(device.free)} free"
            return text, device, "bfloat16 model.weights=fp8"
    most = max(found, key=lambda device: device.free)
    short = size.needs("bfloat16", tokens) + SPARE
    return (
        f"does not fit: {gibibytes(short)} are needed in bfloat16 with {tokens} tokens, {most.name} has {gibibytes(most.free)} free",
        None,
        "",
    )


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def _local() -> Iterator[tuple[str, Path]]:
    for directory in sorted(Path("checkpoints").glob("*")):
        if any(directory.glob("*.safetensors")) or (directory / "config.json").is_file():
            yield str(directory), directory


def _cached() -> Iterator[tuple[str, Path]]:
    """Models of the hub's cache: their id, and the newest revision's folder. Only those with weights that this package could read."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        revisions = sorted(repository.revisions, key=lambda one: one.last_modified)
        if repository.repo_type == "model" and revisions and any(revisions[-1].snapshot_path.glob("*.safetensors*")):
            yield repository.repo_id, revisions[-1].snapshot_path


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _print(findings: Sequence[Finding]) -> None:
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            print(area)
        print(f"  {'!!' if finding.fault else 'ok' if finding.next is None else '->'} {finding.text}")
        if finding.next:
            print(f"       {finding.next}")
