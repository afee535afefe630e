"""A round of reruns, run like a sweep in which nothing is chosen and no scheduler stops a trial."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ray import tune

from lightning_dpo.tuning.cluster.retry import fit_with_retries
from lightning_dpo.tuning.cluster.tuner import has_begun, new_tuner, restored_tuner
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.report.live_table import LiveTable
from lightning_dpo.tuning.results.gather import completed_trials, is_interrupted
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.rounds.rerun import Rerun, RerunSpace, confirmations, repetitions
from lightning_dpo.tuning.search.schedulers import make_scheduler
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["run_rounds"]


def run_rounds(
    spec: TrialSpec,
    searched: Sequence[TrialRecord],
    config: SweepConfig,
    *,
    concurrency: int,
    time_left: float | None = None,
    verbose: bool = True,
) -> tuple[TrialRecord, ...]:
    """Run again what `repeats` and `confirm` ask for, after the search.

    Args:
        spec: What the sweep's trials have in common, with what preparation found.
        searched: The search's trials.
        config: The sweep.
        concurrency: Trials at once.
        time_left: Seconds that are left of the sweep's budget; None where it has none.
        verbose: Show the table of trials.

    Returns:
        The reruns, those that went wrong too.
    """
    found: list[TrialRecord] = []
    ends_at = None if time_left is None else time.time() + time_left
    if config.repeats > 1 and not is_interrupted(searched):
        again = repetitions(searched, repeats=config.repeats, recipe=spec.recipe)
        found += _run(
            spec, config, again, name="repeats", concurrency=concurrency, ends_at=ends_at, verbose=verbose
        )
    if config.confirm and not is_interrupted([*searched, *found]):
        again = confirmations(
            rank(searched, spec.objective, found),
            confirm=config.confirm,
            seeds=config.confirm_seeds,
            first_seed=config.repeats,
            recipe=spec.recipe,
        )
        found += _run(
            spec, config, again, name="confirm", concurrency=concurrency, ends_at=ends_at, verbose=verbose
        )
    return tuple(found)


def _run(
    spec: TrialSpec,
    config: SweepConfig,
    reruns: Sequence[Rerun],
    *,
    name: str,
    concurrency: int,
    ends_at: float | None,
    verbose: bool,
) -> list[TrialRecord]:
    """Go on with the rounds of this name that have begun, then run what they lack."""
    if not reruns:
        if verbose:
            print(f"{name}: no trial ran to its end, so none is run again", flush=True)
        return []
    found: list[TrialRecord] = []
    number = 1
    while has_begun(own := replace(spec, space=RerunSpace((), tuple(reruns)), round=_name(name, number))):
        with LiveTable(own, samples=len(reruns) - len(found), verbose=verbose):
            outcome = fit_with_retries(restored_tuner(own), partial(restored_tuner, own), trials=len(reruns))
        found += completed_trials(own, outcome)
        number += 1
        if is_interrupted(found):
            return found
    known = [(record.rerun_of, dict(record.overrides)) for record in found]
    missing = tuple(one for one in reruns if (one.trial, dict(one.overrides)) not in known)
    if not missing:
        return found
    if ends_at is not None and ends_at <= time.time():
        if verbose:
            print(f"{name}: nothing is left of `time_budget`, so no trial is run again", flush=True)
        return found
    own = replace(spec, space=RerunSpace((), missing), round=_name(name, number))
    if verbose:
        trials = len({rerun.trial for rerun in missing})
        print(f"{name}: {len(missing)} runs of {trials} trials with other seeds", flush=True)
    with LiveTable(own, samples=len(missing), verbose=verbose) as table:
        tuner = new_tuner(
            own,
            replace(config, samples=1, search="grid", start_from=None),
            searcher=tune.search.BasicVariantGenerator(),
            scheduler=make_scheduler("none", space=own.space, objective=own.objective),
            concurrency=concurrency,
            callback=table.callback,
            time_budget=None if ends_at is None else ends_at - time.time(),
        )
        outcome = fit_with_retries(tuner, partial(restored_tuner, own), trials=len(missing))
    return [*found, *completed_trials(own, outcome)]


def _name(name: str, number: int) -> str:
    return name if number == 1 else f"{name}{number}"
