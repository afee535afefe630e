"""The part of a search space that charts show: the config paths whose values differ between trials."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dpo.tuning.report.formatting import format_value
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["is_numeric", "varied_paths"]


def varied_paths(trials: Sequence[TrialRecord]) -> list[str]:
    """Paths that differ between trials: beta and the learning rate first, then numbers, then choices."""
    values: dict[str, set[str]] = {}
    for trial in trials:
        for path, value in trial.overrides.items():
            values.setdefault(path, set()).add(format_value(value))
    varied = [
        path
        for path, found in values.items()
        if len(found) > 1 or any(path not in trial.overrides for trial in trials)
    ]
    return sorted(
        varied,
        key=lambda path: (
            not path.endswith(".beta"),
            not path.endswith(".lr"),
            not is_numeric(trials, path),
        ),
    )


def is_numeric(trials: Sequence[TrialRecord], path: str) -> bool:
    """Whether trials set a path to numbers, and not all to the same one."""
    found = [t.overrides[path] for t in trials if path in t.overrides]
    return len({str(value) for value in found}) > 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in found
    )
