"""Starting points of a sweep: those of its configuration, and trials of earlier sweeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.config_paths import class_and_arguments
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.search.searchers import is_plain, learns_from_results
from lightning_dpo.tuning.search.starting_points import EarlierSweep, Start, StartingPoint, complete
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["as_told", "load_start", "other_paths", "other_values"]

_UNIMPORTANT = (
    "data.",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "model.reference_cache",
)
"""Paths in which recipes may differ: the data have a fingerprint, and the others change no result."""


def load_start(config: SweepConfig, spec: TrialSpec, *, fingerprint: str) -> tuple[Start, list[str]]:
    """What a sweep begins with, and lines that say which way each point takes.

    Args:
        config: The sweep.
        spec: What its trials have in common.
        fingerprint: Which data it has.

    Returns:
        The points, and a line for each kind of them.

    Raises:
        ValueError: If an earlier sweep cannot be read, or its results do not hold for this one.
    """
    run: list[StartingPoint] = []
    told: list[StartingPoint] = []
    lines: list[str] = []
    learns, name = learns_from_results(config.search), class_and_arguments(config.search)[0]
    for entry in config.starting_points():
        if isinstance(entry, EarlierSweep):
            earlier = _loaded(entry)
            if entry.run is not None:
                run += _best_of(earlier, entry, spec)
                continue
            _check_same(earlier, entry, spec, fingerprint=fingerprint)
            if not learns:
                raise ValueError(
                    f"`{entry.origin}` gives results, and `search` {name} learns from none: use optuna, or "
                    f"run its best trials first, as in {{sweep: {entry.location}, run: 3}}"
                )
            points, told_lines = _results_of(earlier, entry, spec)
            told += points
            lines += told_lines
        elif entry.result is not None and learns:
            told.append(entry)
        else:
            run.append(entry)
    start = Start(tuple(_distinct(run)), tuple(told))
    if not is_plain(config.search) or not spec.space.grid:
        _check_number(start, config)
    return start, [*lines, *_lines(start, name, learns=learns)]


def as_told(trials: Sequence[TrialRecord], spec: TrialSpec) -> Start:
    """Results of a sweep's own trials, for another searcher that goes on with it.

    Args:
        trials: Those that have run.
        spec: What they have in common.
    """
    own = SweepResult(spec.location, spec.objective, tuple(trials))
    return Start(told=tuple(_told(own, trial, spec.location) for trial in trials if trial.is_complete))


def _loaded(entry: EarlierSweep) -> SweepResult:
    try:
        return load_result(entry.location)
    except ValueError as error:
        raise ValueError(f"`{entry.origin}` cannot be read: {error}") from error


def _check_same(earlier: SweepResult, entry: EarlierSweep, spec: TrialSpec, *, fingerprint: str) -> None:
    """Refuse results that are of other data or another objective."""
    way_out = f"its best trials can be run again first: {{sweep: {entry.location}, run: 3}}"
    if earlier.objective != spec.objective:
        theirs, ours = (
            ", ".join(f"{goal.metric} ({goal.mode})" for goal in objective.goals)
            for objective in (earlier.objective, spec.objective)
        )
        raise ValueError(
            f"`{entry.origin}` must be a sweep with the same objective, got {theirs} and not {ours}; "
            f"{way_out}"
        )
    told = earlier.settings
    others = [name for name in spec.objective.settings if name in told and told[name] != getattr(spec, name)]
    if others:
        raise ValueError(
            f"`{entry.origin}` must be a sweep whose completions are measured alike, got `{others[0]}` "
            f"{told[others[0]]} and not {getattr(spec, others[0])}; {way_out}"
        )
    if not earlier.data_fingerprint:
        raise ValueError(
            f"`{entry.origin}` must be a sweep on the same data, and {entry.location} does not say which it "
            f"had: an earlier version wrote it, or its module brings data of its own; {way_out}"
        )
    if earlier.data_fingerprint != fingerprint:
        raise ValueError(
            f"`{entry.origin}` must be a sweep on the same data, and the training or validation data of "
            f"{entry.location} are others ({earlier.data_fingerprint[:8]} and not {fingerprint[:8]}): other "
            f"files, or other settings under `data` that choose examples; {way_out}"
        )


def _results_of(
    earlier: SweepResult, entry: EarlierSweep, spec: TrialSpec
) -> tuple[list[StartingPoint], list[str]]:
    complete_trials = [trial for trial in earlier.trials if trial.is_complete]
    points = [point for point in _within(earlier, complete_trials, entry, spec) if point.result is not None]
    if not points:
        raise _none_within(entry, len(complete_trials))
    line = (
        f"start_from: {len(points)} results of {entry.location} are told to the searcher, and not run again"
    )
    outside = len(complete_trials) - len(points)
    if outside:
        line += f"; {outside} more lie outside of `space`"
    lines = [line]
    others = other_values(earlier, spec)
    if others:
        lines.append(
            f"start_from: LOOK: {entry.location} ran another recipe, so its results may not hold here. They "
            f"differ in {', '.join(others)}"
        )
    return points, lines


def _best_of(earlier: SweepResult, entry: EarlierSweep, spec: TrialSpec) -> list[StartingPoint]:
    assert entry.run is not None
    complete_trials = [trial for trial in earlier.trials if trial.is_complete]
    points = list(_within(earlier, complete_trials, entry, spec))[: entry.run]
    if not points:
        raise _none_within(entry, len(complete_trials))
    return [replace(point, result=None) for point in points]


def _none_within(entry: EarlierSweep, finished: int) -> ValueError:
    return ValueError(
        f"`{entry.origin}` must have finished trials within `space`, got {finished} finished in "
        f"{entry.location}, none of them within"
    )


def _within(
    earlier: SweepResult, trials: Sequence[TrialRecord], entry: EarlierSweep, spec: TrialSpec
) -> Iterator[StartingPoint]:
    """Those of the trials that lie in this sweep's space."""
    for trial in trials:
        values = {path: value for path, value in trial.overrides.items() if path in spec.space.paths}
        try:
            point = complete(values, space=spec.space, name=entry.origin)
        except ValueError:
            continue
        yield replace(_told(earlier, trial, entry.location), overrides=point)


def _told(result: SweepResult, trial: TrialRecord, origin: str) -> StartingPoint:
    means = [result.mean(trial, goal.metric) for goal in result.objective.goals]
    values = tuple(mean.mean for mean in means if mean is not None)
    return StartingPoint(
        trial.overrides, values if len(values) == len(means) else None, origin, trial=trial.id
    )


def _distinct(points: Sequence[StartingPoint]) -> Iterator[StartingPoint]:
    seen: list[Mapping[str, Any]] = []
    for point in points:
        if point.overrides not in seen:
            seen.append(point.overrides)
            yield point


def _check_number(start: Start, config: SweepConfig) -> None:
    if len(start.run) > config.samples:
        raise ValueError(
            f"`samples` must be at least the {len(start.run)} points that `start_from` runs first, got "
            f"{config.samples}"
        )


def _lines(start: Start, name: str, *, learns: bool) -> list[str]:
    """Which way points take that the configuration itself names."""
    lines = []
    own = [point for point in start.told if not point.trial]
    if own:
        lines.append(f"start_from: results of {_points(own)} are told to {name}, and not run")
    if start.run:
        verb = "is" if len(start.run) == 1 else "are"
        line = f"start_from: {_points(start.run)} {verb} run first"
        if any(point.result is not None for point in start.run) and not learns:
            line += f", those with results too: {name} learns from none"
        lines.append(line)
    return lines


def _points(points: Sequence[StartingPoint]) -> str:
    return f"{len(points)} point{'' if len(points) == 1 else 's'}"


def other_values(earlier: SweepResult, spec: TrialSpec) -> list[str]:
    """Config paths in which the recipe of an earlier sweep differs, apart from what is varied.

    Args:
        earlier: The sweep.
        spec: What the trials of the present one have in common.
    """
    best = {path: value for path, value in earlier.best.overrides.items() if path in spec.space.paths}
    varied = {*earlier.best.overrides, *spec.space.paths}
    return other_paths(earlier.recipe, spec.recipe.parse(best).to_yaml(), varied=varied)


def other_paths(earlier: str, recipe: str, *, varied: Collection[str]) -> list[str]:
    """Config paths in which two recipes differ, apart from some and from those that change no result.

    Args:
        earlier: A complete recipe, as YAML.
        recipe: Another one.
        varied: Paths that do not count.
    """
    theirs, ours = (_flat(yaml.safe_load(text or "{}") or {}) for text in (earlier, recipe))
    # Paths that one of them alone has may be of another version.
    return sorted(
        path
        for path in theirs.keys() & ours.keys() - set(varied)
        if theirs[path] != ours[path] and not path.startswith(_UNIMPORTANT)
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by config path, without the word `init_args`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
        if isinstance(value, Mapping):
            found |= _flat(value, path)
        else:
            found[path] = value
    return found
