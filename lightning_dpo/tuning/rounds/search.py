"""The search of a sweep: its first round of trials, and further ones where a finished sweep goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray.tune.search import Searcher

from lightning_dpo.tuning.cluster.retry import fit_with_retries
from lightning_dpo.tuning.cluster.tuner import has_begun, new_tuner, ray_folder, restored_tuner
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.config_paths import class_and_arguments
from lightning_dpo.tuning.report.live_table import LiveTable
from lightning_dpo.tuning.results.extension import Extension
from lightning_dpo.tuning.results.gather import completed_trials, is_interrupted
from lightning_dpo.tuning.results.warm_start import as_told
from lightning_dpo.tuning.search.schedulers import make_scheduler
from lightning_dpo.tuning.search.searchers import (
    has_pruner,
    is_plain,
    learns_from_results,
    make_searcher,
    ray_space,
    trials_of,
)
from lightning_dpo.tuning.search.starting_points import Start
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["run_search", "scheduler_for"]


def run_search(
    spec: TrialSpec,
    config: SweepConfig,
    *,
    start: Start,
    searcher: Any,
    extension: Extension | None,
    concurrency: int,
    verbose: bool = True,
) -> list[TrialRecord]:
    """Run the trials of a search: go on with rounds that have begun, and begin one where trials are missing.

    Args:
        spec: What the sweep's trials have in common, with what preparation found.
        config: The sweep.
        start: Points that it starts from.
        searcher: For a sweep that has not begun; None for one that has.
        extension: What a finished sweep had when it is asked for more; None where none was finished.
        concurrency: Trials at once.
        verbose: Show the table of trials.

    Returns:
        All trials of the search, those of earlier rounds too.
    """
    ends_at = None if config.time_budget is None else time.time() + config.time_budget
    total = trials_of(config.search, spec.space, samples=config.samples, start=start)
    records: list[TrialRecord] = []
    number = 1
    while has_begun(own := _round(spec, number)):
        with LiveTable(own, samples=total - len(records), verbose=verbose) as table:
            outcome = fit_with_retries(restored_tuner(own), partial(restored_tuner, own), trials=total)
        records += completed_trials(own, outcome)
        number += 1
        if is_interrupted(records):
            return records
    missing = total - len(records)
    is_first = number == 1
    if is_first:
        space = ray_space(config.search, spec.space, start)
    elif missing < 1 or not _may_go_on(records, config, extension, ends_at):
        return records
    else:
        if verbose:
            print(
                f"samples: {total} trials in all; {len(records)} have run, {missing} more run now", flush=True
            )
        searcher, space = _searcher_that_knows(
            records, spec, config, extension, start, _round(spec, number - 1), missing
        )
    with LiveTable(own, samples=missing, verbose=verbose) as table:
        tuner = new_tuner(
            own,
            config,
            searcher=searcher,
            scheduler=scheduler_for(config, spec, searcher),
            concurrency=concurrency,
            callback=table.callback,
            param_space=space,
            samples=config.samples if is_first or is_plain(config.search) else missing,
            time_budget=None if ends_at is None else ends_at - time.time(),
        )
        outcome = fit_with_retries(tuner, partial(restored_tuner, own), trials=missing)
    return [*records, *completed_trials(own, outcome)]


def scheduler_for(config: SweepConfig, spec: TrialSpec, searcher: Any) -> Any:
    """The scheduler, which is the pruner of Optuna's study where it has one.

    Args:
        config: The sweep.
        spec: What its trials have in common.
        searcher: The searcher.

    Raises:
        ValueError: If both a scheduler and a pruner would stop trials.
    """
    scheduler = make_scheduler(config.scheduler, space=spec.space, objective=spec.objective)
    if not has_pruner(config.search):
        return scheduler
    if class_and_arguments(config.scheduler)[0] != "none":
        raise ValueError(
            '`scheduler` must be "none" where `search.init_args.pruner` stops trials, got '
            f"{config.scheduler!r}: leave one of the two out"
        )
    if searcher is None:
        return scheduler
    from lightning_dpo.tuning.search.pruning import PrunerScheduler

    return PrunerScheduler(searcher)


def _round(spec: TrialSpec, number: int) -> TrialSpec:
    """The trials of a round have the folder of the sweep, and Ray a folder of its own for each."""
    return spec if number == 1 else replace(spec, round=f"more{number}")


def _may_go_on(
    records: Sequence[TrialRecord], config: SweepConfig, extension: Extension | None, ends_at: float | None
) -> bool:
    """Whether trials that are missing are wanted: not where the budget or equal failures ended the search."""
    if ends_at is not None and (extension is None or ends_at <= time.time()):
        return False  # the budget may be what ended those that are missing
    is_wanted = extension is None or config.samples > extension.samples
    return is_wanted and any(record.is_ranked for record in records)


def _searcher_that_knows(
    records: Sequence[TrialRecord],
    spec: TrialSpec,
    config: SweepConfig,
    extension: Extension | None,
    start: Start,
    before: TrialSpec,
    missing: int,
) -> tuple[Any, dict[str, Any]]:
    """A searcher that knows what ran, and what Tune is to know of the space."""
    is_same = extension is None or extension.search == config.search
    made: dict[str, Any] = {
        "space": spec.space,
        "objective": spec.objective,
        "seed": config.seed,
        "name": config.name or "sweep",
    }
    if is_plain(config.search):
        searcher = make_searcher(
            config.search, **made, start=start, done=[record.overrides for record in records], limit=missing
        )
        return searcher, ray_space(config.search, spec.space, start)
    if is_same:
        searcher = make_searcher(config.search, **made, goes_on=True)
        _restore(searcher, before)
        # A searcher that Tune told the space has it in its state.
        return searcher, {}
    told = as_told(records, spec) if learns_from_results(config.search) else Start()
    return make_searcher(config.search, **made, start=told), ray_space(config.search, spec.space, told)


def _restore(searcher: Searcher, before: TrialSpec) -> None:
    """Give a searcher the state that it had at the end of an earlier round."""
    folder = ray_folder(before)
    with TemporaryDirectory() as local:
        for name in folder.names(".pkl"):
            if name.startswith("searcher-state-"):
                content = folder.read_bytes(name)
                assert content is not None
                (Path(local) / name).write_bytes(content)
        try:
            searcher.restore_from_dir(local)
        except RuntimeError as error:
            raise ValueError(
                f"`samples` cannot grow: {type(searcher).__name__} left no state in {folder.location}; "
                f"start a new sweep with start_from: {{sweep: {before.location}}}"
            ) from error
