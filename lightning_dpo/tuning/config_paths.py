"""Config paths and class paths as a user writes them, and the nearest path to one that is misspelt."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "as_arguments",
    "class_and_arguments",
    "config_paths",
    "import_object",
    "nearest",
    "parse_arguments",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one, whatever its case; of equals one whose last part agrees."""
    name = name.lower()
    last = name.rpartition(".")[2]

    def likeness(other: str) -> float:
        other = other.lower()
        ratio = difflib.SequenceMatcher(None, name, other).ratio()
        return ratio + 0.5 * difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()

    return max(sorted(known), key=likeness)


def config_paths(config: Any, prefix: str = "") -> set[str]:
    """Every path that a parsed configuration has, inner ones too, without the word `init_args`.

    Args:
        config: jsonargparse's namespace, or a dict.
        prefix: Put before each.
    """
    paths: set[str] = set()
    entries = vars(config) if hasattr(config, "__dict__") else config
    for name, value in entries.items():
        inner = prefix if name == "init_args" else f"{prefix}{name}"
        if inner != prefix:
            paths.add(inner)
        if isinstance(value, Mapping) or hasattr(value, "as_dict"):
            paths |= config_paths(value, inner if inner.endswith(".") or not inner else f"{inner}.")
    return {path.rstrip(".") for path in paths}


def as_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as a command line; classes first, outer ones before inner ones, then their arguments."""
    import json

    classes = sorted((path for path in overrides if path.endswith("class_path")), key=lambda p: p.count("."))
    ordered = {**{path: overrides[path] for path in classes}, **overrides}.items()
    return [f"--{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in ordered]


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Values by config path from a command line of ``--a.b=1`` and ``--a.b 1``.

    Raises:
        ValueError: If an argument has no value.
    """
    import yaml

    overrides: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).removeprefix("--").partition("=")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ValueError(f"`--{name}` must have a value, as in --{name}=VALUE")
            value = waiting.pop(0)
        overrides[name] = yaml.safe_load(value)
    return overrides


def import_object(path: str) -> Any:
    """What a dotted path names.

    Args:
        path: Such as ``package.module.Class``.

    Raises:
        ValueError: If it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} must be importable as package.module.name: {error}") from error


def class_and_arguments(choice: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a searcher or a scheduler.

    Args:
        choice: A name, or ``{class_path: name, init_args: {...}}``.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(choice, str):
        return choice, {}
    if "class_path" not in choice or set(choice) - {"class_path", "init_args"}:
        raise ValueError(
            f"a searcher or scheduler must be a name or {{class_path, init_args}}, got {dict(choice)}"
        )
    return str(choice["class_path"]), dict(choice.get("init_args") or {})
