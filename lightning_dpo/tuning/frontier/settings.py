"""Whether a frontier's folder may be gone on with: it must hold what this configuration would make."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lightning_dpo.tuning.frontier.config import FrontierConfig

__all__ = ["check_settings", "save_settings"]

_FILE = "settings.json"
_MAY_CHANGE = (
    "methods",
    "only",
    "kls",
    "limit_policies",
    "limit_samples_per_prompt",
    "limit_rounds",
    "limit_fits",
    "limit_fit_lr",
    "sweep",
    "storage",
    "name",
)


def check_settings(config: FrontierConfig, *, resume: bool) -> None:
    """Look at what lies in the folder.

    Args:
        config: The comparison.
        resume: Whether to go on with what is there.

    Raises:
        ValueError: If there is a comparison that is not to be gone on with, or one of other settings.
    """
    text = config.folder.read(_FILE)
    if text is None:
        return
    location = config.folder.location
    if not resume:
        raise ValueError(
            f"`name` must be new, got {location}, which holds a comparison; go on with it by resume=True "
            "(--resume), or choose another name"
        )
    earlier, wanted = json.loads(text), _plain(config)
    for name, value in wanted.items():
        if name not in _MAY_CHANGE and earlier.get(name) != value:
            raise ValueError(
                f"`{name}` must be that of the comparison in {location}, {earlier.get(name)!r}, got "
                f"{value!r}; choose another name"
            )
    for name, entry in wanted["methods"].items():
        if earlier["methods"].get(name, entry) != entry:
            raise ValueError(
                f"`methods` must say the same of {name!r} as the comparison in {location}, "
                f"{earlier['methods'][name]!r}, got {entry!r}; give the changed method another name"
            )


def save_settings(config: FrontierConfig) -> None:
    """Write down what the folder is made from, methods of an earlier run included."""
    text = config.folder.read(_FILE)
    earlier = {} if text is None else json.loads(text)["methods"]
    settings = _plain(config)
    settings["methods"] = {**earlier, **settings["methods"]}
    config.folder.write(_FILE, json.dumps(settings, indent=1))


def _plain(config: FrontierConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain
