"""What a finished sweep had, where it is asked for more trials."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["Extension", "finished_before"]

_FIXED = ("space", "objective", "start_from")


class Extension(NamedTuple):
    """The settings of a sweep that has ended, which is resumed.

    Attributes:
        samples: Its number of samples.
        search: Its searcher, as YAML says it.
        seconds: Wall time that it took.
    """

    samples: int
    search: Any
    seconds: float


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
    if config.samples > samples:
        way_out = (
            "more trials of a sweep must be comparable with those that it has. Start another one, with "
            f"start_from: {{sweep: {spec.location}}} if that one is to learn from it"
        )
        for name in _FIXED:
            if name in settings and settings[name] != json.loads(
                json.dumps(getattr(config, name), default=str)
            ):
                raise ValueError(f"`{name}` must stay as it was, {settings[name]!r}: {way_out}")
        if earlier.data_fingerprint and earlier.data_fingerprint != fingerprint:
            raise ValueError(
                f"the data must stay as they were, and files or settings under `data` changed: {way_out}"
            )
    return Extension(samples, settings.get("search", config.search), earlier.seconds)
