"""Config paths as a user writes them, and the nearest one where there is none of that name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["as_arguments", "config_paths", "nearest", "parse_arguments"]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one; of equals the one whose last part agrees."""
    last = name.rpartition(".")[2]

    def likeness(other: str) -> float:
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
    """Overrides as a command line; classes first, since their arguments belong to them."""
    import json

    ordered = sorted(overrides.items(), key=lambda item: not item[0].endswith("class_path"))
    return [f"--{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in ordered]


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """The inverse: ``--a.b=1`` and ``--a.b 1`` as values by path.

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
