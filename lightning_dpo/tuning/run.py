"""`sweep`: check, prepare once, run the trials, and gather what they found."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import PopulationBasedTraining

from lightning_dpo.tuning.cluster.connect import DRIVER_CPUS, connected, node_resources, trials_at_once
from lightning_dpo.tuning.cluster.convert_policy import convert_policy
from lightning_dpo.tuning.cluster.prepare import Preparation, prepare
from lightning_dpo.tuning.cluster.retry import fit_all
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.objective import check_goals, known_metrics
from lightning_dpo.tuning.report.live_table import LiveTable
from lightning_dpo.tuning.report.summary import print_summary
from lightning_dpo.tuning.results.export import export_best
from lightning_dpo.tuning.results.folder import save_result
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.search.algorithms import make_scheduler, make_searcher
from lightning_dpo.tuning.search.pbt_checkpoints import KeepNewest
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.fit import TrialPlan
from lightning_dpo.tuning.trial.record import TrialRecord, load_records, lost_to
from lightning_dpo.tuning.trial.trainable import run_trial

__all__ = ["sweep"]

_RAY_FOLDER = "ray"


def sweep(
    config: SweepConfig, *, module: Any = None, data: Any = None, resume: bool = False, verbose: bool = True
) -> SweepResult:
    """Run a sweep.

    Args:
        config: What to run.
        module: A LightningModule class of your own, in the place of `config.module`.
        data: A LightningDataModule class of your own, in the place of `config.data`.
        resume: Go on with the sweep of this name: trials that have ended are not run again.
        verbose: Show the table of trials.

    Raises:
        ValueError: If the configuration is not valid, before anything starts; or if every trial went wrong.
    """
    began = time.time()
    recipe = config.to_recipe(module=module, data=data)
    space, objective = config.search_space(), config.goals()
    recipe.check(space.examples())
    if recipe.is_preference:
        metrics = known_metrics(kl=config.kl_prompts > 0)
        check_goals(objective, metrics=metrics, varied=space.paths)
    make_searcher(config.search, space=space, objective=objective, seed=config.seed)
    make_scheduler(config.scheduler, space=space, objective=objective)
    storage = Storage(config.storage) / (config.name or "sweep")
    _check_folder(storage, resume=resume)
    plan = TrialPlan(
        recipe=recipe,
        space=space,
        objective=objective,
        location=storage.location,
        cwd=str(Path.cwd()),
        import_path=tuple(sys.path),
        workers=config.workers,
        cpus=config.cpus,
        gpus=config.gpus,
        strategy=config.strategy,
        retries=config.retries,
        kl_prompts=config.kl_prompts,
        kl_tokens=config.kl_tokens,
    )
    if verbose:
        ahead = "what all trials share: tokens and the reference's log-probabilities"
        ahead = ahead if recipe.is_preference else "a few batches to see what is logged"
        print(f"starting Ray, then {ahead} ...", flush=True)
    with connected(config.ray_address, urls=(config.storage, config.reference_cache)):
        fits = trials_at_once(node_resources(), workers=config.workers, cpus=config.cpus, gpus=config.gpus)
        if recipe.is_preference:
            plan = convert_policy(plan)
        prepared = prepare(plan, config)
        plan = dataclasses.replace(plan, prepared=prepared.overrides)
        table = LiveTable(plan, samples=_trial_count(config), verbose=verbose)
        with table:
            tuner = _tuner(
                plan, config, storage, table, concurrency=config.concurrency or fits, resume=resume
            )
            outcome = fit_all(tuner, lambda: _restored(plan, storage))
        result = _gather(plan, config, storage, outcome, prepared, seconds=time.time() - began)
        if config.export and recipe.is_preference:
            result = dataclasses.replace(result, model=export_best(result))
    save_result(result)
    from lightning_dpo.tuning.report.page import write_report

    write_report(result)
    if verbose:
        print_summary(result)
    return result


def _tuner(
    plan: TrialPlan,
    config: SweepConfig,
    storage: Storage,
    table: LiveTable,
    *,
    concurrency: int,
    resume: bool,
) -> Tuner:
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    if resume and not (storage / _RAY_FOLDER).is_empty():
        return _restored(plan, storage)
    objective = plan.objective
    searcher = make_searcher(
        config.search, space=plan.space, objective=objective, seed=config.seed, concurrency=concurrency
    )
    scheduler = make_scheduler(config.scheduler, space=plan.space, objective=objective)
    callbacks: list[tune.Callback] = [table.callback]
    kept: int | None = 1
    if isinstance(scheduler, PopulationBasedTraining):
        kept = None
        # A trial may still want the checkpoint that another one had when it was last compared.
        callbacks.append(KeepNewest(2 + math.ceil(scheduler._perturbation_interval)))
    # Tune passes its metric on to the scheduler and to searchers that were given none.
    single = len(objective.goals) == 1
    is_plain = isinstance(searcher, tune.search.BasicVariantGenerator)
    return Tuner(
        _trainable(plan),
        param_space=plan.space.ray_config() if not _is_define_by_run(config) else {},
        tune_config=TuneConfig(
            metric=objective.primary.metric if single else None,
            mode=objective.primary.mode if single else None,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=config.samples,
            max_concurrent_trials=None if is_plain else concurrency,
            # The process that drives a trial keeps its workers for the next one.
            reuse_actors=config.reuse_processes,
        ),
        run_config=RunConfig(
            name=_RAY_FOLDER,
            storage_path=storage.path,
            failure_config=FailureConfig(max_failures=config.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=kept),
            callbacks=callbacks,
            verbose=0,
            **storage.ray_options(),
        ),
    )


def _trainable(plan: TrialPlan) -> Any:
    several = plan.workers > 1
    resources = {"cpu": DRIVER_CPUS} if several else {"cpu": plan.cpus, "gpu": plan.gpus}
    return tune.with_resources(tune.with_parameters(run_trial, plan=plan), resources)


def _restored(plan: TrialPlan, storage: Storage) -> Tuner:
    """Goes on with what another tuner left."""
    folder = storage / _RAY_FOLDER
    return Tuner.restore(
        folder.path, _trainable(plan), resume_unfinished=True, resume_errored=True, **storage.ray_options()
    )


def _is_define_by_run(config: SweepConfig) -> bool:
    return config.search == "optuna" or (
        isinstance(config.search, Mapping) and config.search.get("class_path") == "optuna"
    )


def _trial_count(config: SweepConfig) -> int:
    points = config.search_space().ray_config().get("grid")
    grid = len(points["grid_search"]) if points else 1
    return config.samples * (1 if _is_define_by_run(config) else grid)


def _check_folder(storage: Storage, *, resume: bool) -> None:
    if not resume and not storage.is_empty():
        raise ValueError(
            f"`name` must be new, got {storage.location}, which holds a sweep; go on with it by resume=True "
            "(--resume), or choose another name"
        )


def _gather(
    plan: TrialPlan,
    config: SweepConfig,
    storage: Storage,
    outcome: tune.ResultGrid,
    prepared: Preparation,
    *,
    seconds: float,
) -> SweepResult:
    """Put together what trials wrote and what only Ray knows: whom the scheduler stopped, what it gave up."""
    known = {record.id: record for record in load_records(plan.records)}
    trials = []
    for number, ray_trial in enumerate(outcome._experiment_analysis.trials):
        record = known.get(ray_trial.trial_id) or TrialRecord(
            ray_trial.trial_id, plan.space.overrides(ray_trial.config)
        )
        trials.append(_completed(record, outcome[number]))
    passes = prepared.reference_passes + sum(trial.reference_passes > 0 for trial in trials)
    result = SweepResult(
        location=storage.location,
        objective=plan.objective,
        trials=rank(trials, plan.objective),
        reference_passes=passes,
        seconds=round(seconds, 1),
        settings=dataclasses.asdict(config),
        environment=_environment(),
    )
    if not trials or not result.best.is_ranked:
        save_result(result)
        reasons = [f"{t.status}: {t.reason}" for t in trials if t.reason]
        raise ValueError(f"every trial went wrong; the first one: {reasons[0] if reasons else 'none ran'}")
    return dataclasses.replace(result, recipe=_recipe_text(plan, result))


def _completed(record: TrialRecord, ray_result: Any) -> TrialRecord:
    changes: dict[str, Any] = {}
    if ray_result.checkpoint is not None:
        changes["checkpoint"] = ray_result.checkpoint.path
    elif "checkpoint_path" in (ray_result.metrics or {}):
        changes["checkpoint"] = ray_result.metrics["checkpoint_path"]
    if ray_result.error is not None:
        changes["status"], changes["reason"] = lost_to(str(ray_result.error))
    elif record.status == "running":
        # Tune ends a trial that a scheduler stops, and does so at its last report too.
        changes["status"] = "finished" if 0 < record.total_steps <= record.step else "stopped"
    return dataclasses.replace(record, **changes)


def _recipe_text(plan: TrialPlan, result: SweepResult) -> str:
    goal = result.objective.primary
    value = result.best.metrics[goal.metric]
    header = (
        f"# The best trial ({result.best.id}) of {result.location}: {goal.metric} {value:.4f} at step "
        f"{result.best.step}.\n#\n#   lightning-dpo fit --config config.yaml\n"
    )
    if any(name in str(result.settings["scheduler"]) for name in ("pbt", "PopulationBased")):
        header += "#\n# Weights and values were handed on between trials; these are the values of its end.\n"
    return header + plan.recipe.resolved(result.best.overrides)


def _environment() -> dict[str, Any]:
    packages = ("lightning-dpo", "lightning", "torch", "transformers", "ray", "optuna")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machines = [{"CPU": node.get("CPU", 0), "GPU": node.get("GPU", 0)} for node in node_resources()]
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machines": machines,
    }
