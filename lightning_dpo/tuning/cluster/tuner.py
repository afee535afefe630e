"""Ray's Tuner of a sweep: a new one, or one that goes on with what an earlier one left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import BasicVariantGenerator

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.search.checkpoint_retention import retention
from lightning_dpo.tuning.search.ray_callbacks import make_callbacks
from lightning_dpo.tuning.search.stops import SweepStopper
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.trainable import run_trial
from lightning_dpo.tuning.workers.packed.packing import packed_trainable

__all__ = ["has_begun", "new_tuner", "ray_folder", "restored_tuner"]

_RAY_FOLDER = "ray"


def new_tuner(
    spec: TrialSpec,
    config: SweepConfig,
    *,
    searcher: Any,
    scheduler: TrialScheduler,
    concurrency: int,
    callback: tune.Callback,
    param_space: Mapping[str, Any] | None = None,
    samples: int | None = None,
    time_budget: float | None = None,
) -> Tuner:
    """The tuner of a sweep that has not begun.

    Args:
        spec: What the sweep's trials have in common.
        config: The sweep.
        searcher: Chooses values.
        scheduler: Stops trials early.
        concurrency: Trials at once.
        callback: Is told what happens to trials.
        param_space: What Tune itself knows of the space; None takes all of it.
        samples: That Tune asks for; None takes the sweep's.
        time_budget: Seconds after which no trial goes on.
    """
    storage = Storage(spec.location)
    is_plain = isinstance(searcher, BasicVariantGenerator)
    if is_plain:
        searcher.max_concurrent = concurrency  # Tune limits all other searchers itself
    checkpoints, callbacks = retention(scheduler)
    # Tune passes its metric on to the scheduler and to searchers that were given none.
    single = len(spec.objective.goals) == 1
    goal = spec.objective.primary
    return Tuner(
        _trainable(spec),
        param_space=dict(spec.space.ray_config() if param_space is None else param_space),
        tune_config=TuneConfig(
            metric=goal.metric if single else None,
            mode=goal.mode if single else None,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=config.samples if samples is None else samples,
            max_concurrent_trials=None if is_plain else concurrency,
            # The process that drives a trial keeps its workers for the next one.
            reuse_actors=config.reuse_processes,
            time_budget_s=time_budget,
        ),
        run_config=RunConfig(
            name=_folder(spec),
            storage_path=storage.path,
            failure_config=FailureConfig(max_failures=config.retries),
            checkpoint_config=checkpoints,
            callbacks=[callback, *callbacks, *make_callbacks(config.callbacks)],
            stop=SweepStopper(
                config.stop_rules(),
                objective=spec.objective,
                location=spec.location,
                fail_fast=config.fail_fast,
            ),
            verbose=0,
            **storage.ray_options(),
        ),
    )


def has_begun(spec: TrialSpec) -> bool:
    """Whether an earlier tuner left a state to go on with."""
    return not ray_folder(spec).is_empty()


def restored_tuner(spec: TrialSpec) -> Tuner:
    """The tuner that goes on with what another one left, trials with errors included.

    Args:
        spec: What the sweep's trials have in common.
    """
    folder = ray_folder(spec)
    return Tuner.restore(
        folder.path, _trainable(spec), resume_unfinished=True, resume_errored=True, **folder.ray_options()
    )


def ray_folder(spec: TrialSpec) -> Storage:
    """Where Ray keeps the state of the search, or of a further round of trials.

    Args:
        spec: What the round's trials have in common.
    """
    return Storage(spec.location) / _folder(spec)


def _folder(spec: TrialSpec) -> str:
    """The name of that folder."""
    return f"{_RAY_FOLDER}_{spec.round}" if spec.round else _RAY_FOLDER


def _trainable(spec: TrialSpec) -> Any:
    resources = spec.resources
    if resources.workers > 1:
        taken = {"cpu": resources.driver_cpus}
    else:
        taken = {"cpu": resources.share.cpus, "gpu": resources.share.gpus}
    is_packed = resources.packed > 1
    trainable = packed_trainable(spec) if is_packed else tune.with_parameters(run_trial, spec=spec)
    return tune.with_resources(trainable, taken)
