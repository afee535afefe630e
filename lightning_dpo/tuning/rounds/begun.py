"""What a sweep was when it began, so that it goes on as the same sweep."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.results.warm_start import other_paths
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["check_same_sweep", "note_beginning"]

_FILE = "begun.json"

_FIXED = ("space", "objective", "keep", "judge", "kl_prompts", "kl_tokens")
"""Settings without which trials that have run cannot stand beside those that are still to run."""

_PROCESSES = ("workers", "strategy", "packed_trials")
"""Settings of how a trial runs, which trials that Tune has written down cannot change."""

_KEPT_BY_TUNE = (
    *("search", "start_from", "seed", "scheduler", "stop", "time_budget", "fail_fast", "concurrency"),
    *("cpus", "gpus", "retries", "callbacks", "reuse_processes"),
)
"""Settings that Tune wrote down: a search that goes on has those it began with, until all its trials ran."""


def note_beginning(spec: TrialSpec, config: SweepConfig, *, fingerprint: str) -> None:
    """Write down what a sweep is, before its first trial; what was written stays.

    Args:
        spec: What the sweep's trials have in common.
        config: The sweep.
        fingerprint: Which data it has.
    """
    storage = Storage(spec.location)
    if storage.read(_FILE) is None:
        begun = {
            "settings": dataclasses.asdict(config),
            "data": fingerprint,
            "recipe": _recipe(spec),
        }
        storage.write(_FILE, json.dumps(begun, indent=1, default=str))


def check_same_sweep(
    spec: TrialSpec, config: SweepConfig, *, fingerprint: str, is_new_round: bool = False
) -> list[str]:
    """Refuse to go on with a sweep as with another one.

    Args:
        spec: What the sweep's trials have in common now.
        config: The sweep as it is now.
        fingerprint: Which data it has now.
        is_new_round: Whether all trials of the search ended, and further ones are asked for.

    Returns:
        Names of settings that are others now, and that trials of the search that began do not see.

    Raises:
        ValueError: If its trials could not be compared with those that have run.
    """
    text = Storage(spec.location).read(_FILE)
    if text is None:
        return []  # an older version began it
    begun = json.loads(text)
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    changed = [name for name, value in begun["settings"].items() if now.get(name, value) != value]
    fixed = _FIXED if is_new_round else (*_FIXED, *_PROCESSES)
    others = [f"`{name}`" for name in changed if name in fixed]
    others += other_paths(begun["recipe"], _recipe(spec), varied=spec.space.paths)
    if begun["data"] and begun["data"] != fingerprint:
        others.append("the training or validation data")
    if others:
        raise ValueError(
            f"{spec.location} must be resumed as the sweep that it is, and {', '.join(others)} changed since "
            "it began. Leave that as it was, or start another sweep"
        )
    return [] if is_new_round else [name for name in changed if name in _KEPT_BY_TUNE]


def _recipe(spec: TrialSpec) -> str:
    """The recipe with an example of the space, whose paths are not compared."""
    return spec.recipe.parse(next(spec.space.examples())).to_yaml()
