"""Which data a recipe trains and validates on, in a few characters: equal for equal content."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_dpo.training.cli import class_arguments
from lightning_dpo.tuning.recipe.command_line import ParsedRecipe

__all__ = ["data_fingerprint"]

_ROWS = ("train", "validation")
_CHANGES_NO_EXAMPLE = (
    *("batch_size", "tokens_per_batch", "validation_batch_size", "shuffle", "shuffle_seed"),
    *("num_workers", "num_processes", "cache_dir", "trust_remote_code", "tokenizer"),
)
"""Arguments of data modules that decide how examples are batched and read, and not which there are."""


def data_fingerprint(recipe: ParsedRecipe, *, varied: Iterable[str] = ()) -> str:
    """A digest of the data's files and of the arguments that choose examples from them.

    Files count by their content, wherever they lie and whatever they are called; a hub id counts by its
    name. The tokenizer is not part of it: it belongs to the policy.

    Args:
        recipe: The recipe.
        varied: Config paths that differ between trials, which are left out.

    Returns:
        32 hexadecimal digits; nothing where the module brings data of its own.
    """
    section = recipe.config.get("data")
    if section is None:
        return ""
    arguments = class_arguments(section)
    left_out = {path.partition(".")[2] for path in varied if path.startswith("data.")}
    chosen = {
        name: _by_content(value, are_rows=name in _ROWS)
        for name, value in sorted(arguments.items())
        if name not in _CHANGES_NO_EXAMPLE and name not in left_out
    }
    if "class_path" in section:
        chosen["class_path"] = section["class_path"]
    text = json.dumps(chosen, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _by_content(value: Any, *, are_rows: bool) -> Any:
    """A value in which digests stand for files; a word is a file's name only where rows are expected."""
    if isinstance(value, str):
        files = _files(value) if are_rows or "/" in value or "." in value else []
        return [_digest(file) for file in files] if files else value
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(name): _by_content(one, are_rows=are_rows) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(one, are_rows=are_rows) for one in value]
    return value


def _files(name: str) -> list[Path]:
    """The files that a text names, if it is that of a file, a folder or a glob pattern."""
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(one for one in path.rglob("*") if one.is_file())
    except (OSError, ValueError, RuntimeError):
        return []  # no name of a file, such as a template's text
    if glob.has_magic(name) and "\n" not in name:
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
        return sorted(one for one in map(Path, found) if one.is_file())
    return []


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
