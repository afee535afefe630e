"""Which weights a model has, in a line: by content, or for a hub repository by its commit."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lightning_dpo.files import cache_folder, write_file
from lightning_dpo.models.load import resolve_source
from lightning_dpo.models.unwrap import causal_lm

__all__ = ["file_hash", "module_identity", "source_identity"]

_log = logging.getLogger(__name__)

_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Entries of a config that saving a model sets, and that say nothing about its weights."""

_KNOWN_PACKAGES = ("torch", "transformers", "peft")

SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago could change again without its time stamp showing it."""


def source_identity(source: str, *, trust_remote_code: bool = False) -> str:
    """Identity of a model that is named, without loading it.

    A folder or a GGUF file is known by its content: overwriting it gives another identity, whatever its size
    and dates. Contents are read once and remembered by path, size, inode and both time stamps, of which the
    change time cannot be set; so 140 GB are read at the first start and not at the next. A hub repository is
    known by its commit.

    Args:
        source: See `lightning_dpo.models.load.resolve_source`.
        trust_remote_code: Run configuration code that comes with a hub repository.

    Raises:
        ValueError: If there are no weights to be found.
    """
    name, gguf_file = resolve_source(source)
    if gguf_file:
        return f"gguf:{file_hash(Path(name) / gguf_file)}"
    if Path(name).is_dir():
        return _folder_identity(Path(name), source, trust_remote_code=trust_remote_code)
    return _hub_identity(name, trust_remote_code=trust_remote_code)


def module_identity(model: nn.Module) -> str:
    """Identity of a model in memory: every parameter and buffer, its config, and what its classes say.

    Reads all weights once, at about a gigabyte a second.
    """
    digest = hashlib.sha256()
    config: Any = getattr(causal_lm(model), "config", None)
    if hasattr(config, "to_dict"):
        digest.update(_plain_config(config.to_dict()))
    for text in sorted({_class_text(part) for part in model.modules()}):
        digest.update(text.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            content: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
            digest.update(content.data)
    return f"module:{digest.hexdigest()}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, from memory if the file has not changed since it was last read."""
    real = path.resolve()
    memory = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    stamp = _stamp(real)
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    began = time.time_ns()
    with real.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(real) == stamp and began - max(stamp[1:3]) > SETTLED_NS:
        _remember(memory, {"path": str(real), "stamp": stamp, "sha256": value})
    return value


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remember(memory: Path, content: dict[str, Any]) -> None:
    """Write a small file whole or not at all; where that is not permitted, files are read again next time."""
    try:
        write_file(memory, json.dumps(content))
    except OSError as error:
        _log.warning("weights are read again at every start: %s cannot be written (%s)", memory, error)


def _folder_identity(folder: Path, source: str, *, trust_remote_code: bool) -> str:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*model*.bin"))
    if not weights:
        raise ValueError(f"a model folder must hold .safetensors or .bin files, got none in {source!r}")
    others = [*folder.glob("*.index.json"), *folder.glob("*.py")]
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update(_plain_config(json.loads((folder / name).read_text(encoding="utf-8"))))
    files = [*weights, *sorted(others)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, value in zip(files, pool.map(file_hash, files), strict=True):
            digest.update(f"{path.name} {value};".encode())
    digest.update(_base_identity(folder, trust_remote_code=trust_remote_code).encode())
    return f"folder:{digest.hexdigest()}"


def _base_identity(folder: Path, *, trust_remote_code: bool) -> str:
    """Of a folder that holds an adapter: the model that it belongs to."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or (folder / "config.json").is_file():
        return ""
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return source_identity(base, trust_remote_code=trust_remote_code) if base else ""


def _hub_identity(name: str, *, trust_remote_code: bool) -> str:
    """The commit that transformers loads now: looked up at the hub, or in its cache without a network."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model could be found under {name!r}: {error}") from error
    path = try_to_load_from_cache(name, "config.json")
    if not isinstance(path, str):
        raise ValueError(
            f"the commit of {name!r} is not known to huggingface_hub's cache; pass a local folder"
        )
    snapshot = Path(path).parent
    base = _base_identity(snapshot, trust_remote_code=trust_remote_code)
    return f"hub:{name}@{snapshot.name}{base and ' on '}{base}"


def _plain_config(values: dict[str, Any]) -> bytes:
    kept = {name: value for name, value in values.items() if name not in _VOLATILE}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def _class_text(part: nn.Module) -> str:
    """A module's class and settings, and its code where it is the user's own."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return ""  # off in a reference, whatever its rate
    kind = type(part)
    package = kind.__module__.partition(".")[0]
    text = f"{kind.__module__}.{kind.__qualname__}({part.extra_repr()})"
    if package in _KNOWN_PACKAGES:
        return text
    try:
        return text + inspect.getsource(kind)
    except (OSError, TypeError):
        return text
