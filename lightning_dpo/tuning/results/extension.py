"""What a finished sweep had, where it is asked for more trials."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.results.warm_start import other_values
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["Extension", "finished_before"]

_FIXED = ("space", "objective")


class Extension(NamedTuple):
    """The settings of a sweep that has ended, which is resumed.

    Attributes:
        samples: Its number of samples.
        search: Its searcher, as YAML says it.
        seconds: Wall time that it took.
        start_from: Where it started, as YAML says it.
    """

    samples: int
    search: Any
    seconds: float
    start_from: Any = None

    def applied_to(self, config: SweepConfig) -> SweepConfig:
        """The configuration with what a sweep has already: where it started, and no fewer trials.

        Args:
            config: Of the present run.
        """
        return replace(config, start_from=self.start_from, samples=max(config.samples, self.samples))


def finished_before(spec: TrialSpec, config: SweepConfig, *, fingerprint: str) -> Extension | None:
    """What the sweep in this folder had when it ended; None where it has not ended yet.

    Args:
        spec: What the sweep's trials have in common.
        config: The sweep.
        fingerprint: Which data it has now.

    Raises:
        ValueError: If more trials are asked for, and their results could not be compared with the others'.
    """
    try:
        earlier = load_result(spec.location)
    except ValueError:
        return None
    settings = earlier.settings
    samples = int(settings.get("samples", config.samples))
    start_from = settings.get("start_from")
    if config.samples > samples:
        start = () if config.start_from is None else ("start_from",)
        asked = (*_FIXED, *spec.objective.settings, *start)
        changed = [
            name for name in asked if name in settings and settings[name] != _plain(getattr(config, name))
        ]
        values = other_values(earlier, spec)
        if earlier.data_fingerprint and earlier.data_fingerprint != fingerprint:
            values.append("the training or validation data")
        if changed or values:
            names = ", ".join([*(f"`{name}`" for name in changed), *values])
            raise ValueError(
                f"more trials of {spec.location} must be comparable with those that it has, and {names} "
                "changed since. Leave that as it was, or start another sweep, with "
                f"start_from: {{sweep: {spec.location}}} if it is to learn from this one"
            )
    return Extension(samples, settings.get("search", config.search), earlier.seconds, start_from)


def _plain(value: Any) -> Any:
    """A value as it is read from a sweep's file."""
    return json.loads(json.dumps(value, default=str))
