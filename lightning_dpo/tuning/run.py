"""`sweep`: check, prepare once, run the trials, and gather what they found."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dpo.tuning.cluster.connect import connected, node_resources, trials_at_once
from lightning_dpo.tuning.cluster.prepare import prepare
from lightning_dpo.tuning.cluster.tuner import has_begun
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.objective import KL, WIN_RATE, check_goals, check_logged
from lightning_dpo.tuning.recipe.command_line import ParsedRecipe
from lightning_dpo.tuning.recipe.data_fingerprint import data_fingerprint
from lightning_dpo.tuning.recipe.judge import judged_metrics
from lightning_dpo.tuning.recipe.module_traits import ModuleTraits
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.report.page import write_report
from lightning_dpo.tuning.report.summary import print_summary
from lightning_dpo.tuning.results.export import export_to_sweep
from lightning_dpo.tuning.results.extension import finished_before
from lightning_dpo.tuning.results.folder import save_result
from lightning_dpo.tuning.results.gather import gather, is_interrupted
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.results.warm_start import load_start
from lightning_dpo.tuning.rounds.begun import check_same_sweep, note_beginning
from lightning_dpo.tuning.rounds.rerun import check_seeds
from lightning_dpo.tuning.rounds.run import run_rounds
from lightning_dpo.tuning.rounds.search import run_search, scheduler_for
from lightning_dpo.tuning.search.checkpoint_retention import checkpoint_plan
from lightning_dpo.tuning.search.ray_callbacks import make_callbacks
from lightning_dpo.tuning.search.schedulers import check_workers, copies_checkpoints, scheduler_class
from lightning_dpo.tuning.search.searchers import is_plain, make_searcher
from lightning_dpo.tuning.search.starting_points import Start
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.packed.packing import check_packed, packing, packing_line

__all__ = ["sweep"]

_HANDED_ON = "Weights and values were handed on between trials; these are the values of its end."


def sweep(
    config: SweepConfig, *, module: Any = None, data: Any = None, resume: bool = False, verbose: bool = True
) -> SweepResult:
    """Run a sweep.

    Args:
        config: What to run.
        module: A LightningModule class of your own, in the place of `config.module`.
        data: A LightningDataModule class of your own, in the place of `config.data`.
        resume: Go on with the sweep of this name: trials that have ended are not run again, and where
            `config.samples` is larger than it was, those that are missing from it are run.
        verbose: Show the table of trials.

    Raises:
        ValueError: If the configuration is not valid, before anything starts; or if every trial went wrong.
    """
    began = time.time()
    spec = _checked_spec(config, module=module, data=data)
    traits = spec.recipe.traits
    check_workers(scheduler_class(config.scheduler), workers=config.workers)
    _check_folder(spec, resume=resume)
    fingerprint = data_fingerprint(spec.recipe.parse(), varied=spec.space.paths)
    extension = finished_before(spec, config, fingerprint=fingerprint) if resume else None
    is_new_round = extension is not None and config.samples > extension.samples
    if extension is not None:
        config = extension.applied_to(config)
    if resume:
        unused = check_same_sweep(spec, config, fingerprint=fingerprint, is_new_round=is_new_round)
        if unused and verbose:
            print(f"resume: the search goes on as it began, without the new {', '.join(unused)}", flush=True)
    start, searcher = Start(), None
    if not has_begun(spec):
        start, lines = load_start(config, spec, fingerprint=fingerprint)
        searcher = make_searcher(
            config.search,
            space=spec.space,
            objective=spec.objective,
            seed=config.seed,
            name=config.name or "sweep",
            start=start,
        )
        if verbose and lines:
            print("\n".join(lines), flush=True)
    elif is_plain(config.search):
        start, _ = load_start(config, spec, fingerprint=fingerprint)
    scheduler = scheduler_for(config, spec, searcher)
    plan = checkpoint_plan(scheduler, full_state_every=config.full_state_every)
    spec = dataclasses.replace(spec, checkpoint_plan=plan)
    if verbose:
        print(f"starting Ray, then {_first_work(traits)} ...", flush=True)
    urls = (config.storage, config.reference_cache)
    with Storage(spec.location).claimed(), connected(config.ray_address, urls=urls):
        fits = trials_at_once(node_resources(), spec.resources.share)
        at_once = config.concurrency or fits
        prepared = prepare(spec, config)
        note_beginning(spec, config, fingerprint=fingerprint)
        spec = dataclasses.replace(spec, prepared=prepared.overrides)
        searching = time.time()
        line = packing_line(spec.resources, at_once=at_once)
        if verbose and line:
            print(line, flush=True)
        with packing(spec, verbose=verbose):
            trials = run_search(
                spec,
                config,
                start=start,
                searcher=searcher,
                extension=extension,
                concurrency=at_once,
                verbose=verbose,
            )
            budget = config.time_budget
            reruns = run_rounds(
                spec,
                trials,
                config,
                concurrency=at_once,
                time_left=None if budget is None else budget - (time.time() - searching),
                verbose=verbose,
            )
        result = gather(
            spec,
            trials,
            settings=dataclasses.asdict(config),
            machines=node_resources(),
            reference_passes=prepared.reference_passes,
            seconds=time.time() - began + (extension.seconds if extension else 0),
            reruns=reruns,
            data_fingerprint=fingerprint,
            note=_HANDED_ON if copies_checkpoints(type(scheduler)) else "",
        )
        if config.export and traits.exports:
            result = _with_models(result)
    save_result(result)
    write_report(result)
    if verbose:
        print_summary(result)
        if is_interrupted([*result.trials, *result.reruns]):
            print("interrupted: this is what there is; go on with the sweep by --resume (resume=True)")
    return result


def _with_models(result: SweepResult) -> SweepResult:
    """Export the best trial's model, and that of the recommended one where it is another trial."""
    model = export_to_sweep(result, result.best, "best/model")
    recommended = result.recommended
    other = None if recommended is result.best else export_to_sweep(result, recommended, "recommended/model")
    return dataclasses.replace(result, model=model, recommended_model=other)


def _checked_spec(config: SweepConfig, *, module: Any, data: Any) -> TrialSpec:
    """What trials have in common, once recipe, space and objective are known to go together."""
    recipe = config.to_recipe(module=module, data=data)
    space, objective = config.search_space(), config.goals()
    check_seeds(space, repeats=config.repeats, confirm=config.confirm)
    recipe.check(space.examples())
    _check_validates(recipe.parse(next(space.examples())))
    traits = recipe.traits
    judged = judged_metrics(config.judge)
    if judged and not traits.samples_completions:
        raise ValueError(
            f"`judge` needs a module whose policy completes prompts, got {recipe.module_class.__name__}; "
            "leave it out"
        )
    _check_reference(recipe, config, judged)
    metrics = traits.metrics(kl=config.kl_prompts > 0, judged=judged)
    if metrics is not None:
        check_goals(objective, metrics=metrics, incomparable=traits.incomparable_metrics, varied=space.paths)
        check_logged("stop.threshold", config.stop_rules().metrics, metrics=metrics)
    make_callbacks(config.callbacks)
    if config.keep == "best":
        _check_keep(config, traits, metric=objective.primary.metric)
    spec = TrialSpec(
        recipe=recipe,
        space=space,
        objective=objective,
        location=(Storage(config.storage) / (config.name or "sweep")).location,
        cwd=str(Path.cwd()),
        import_path=tuple(sys.path),
        resources=config.resources(),
        retries=config.retries,
        kl_prompts=config.kl_prompts,
        kl_tokens=config.kl_tokens,
        judge=config.judge,
        judged=judged,
        stop=config.stop_rules(),
        keeps_best=config.keep == "best",
    )
    check_packed(spec)
    return spec


def _check_validates(recipe: ParsedRecipe) -> None:
    """Refuse data of this package that leaves nothing to validate on: trials would train for nothing."""
    names = ("data.validation", "data.validation_split")
    is_ours = recipe.data_class.__module__.startswith("lightning_dpo.")
    if is_ours and not any(recipe.get(name, default=True) for name in names):
        raise ValueError(
            "trials are ranked by what they find on validation pairs: give the recipe `data.validation` or "
            "`data.validation_split`, got neither"
        )


def _check_reference(recipe: Recipe, config: SweepConfig, judged: Sequence[str]) -> None:
    """Refuse goals and judges that need a reference where a trial has none."""
    needing = [goal.metric for goal in config.goals().goals if goal.metric in (KL, WIN_RATE)]
    if judged == (WIN_RATE,):
        needing.append("judge")
    for example in config.search_space().examples() if needing else ():
        parsed = recipe.parse(example)
        if parsed.get("model.reference") == "none" and parsed.get("model.lora") is None:
            raise ValueError(
                f"{needing[0]} is measured against the reference, and `model.reference` is none: take "
                "model.reference: frozen, whose log-probabilities the loss need not use, or another objective"
            )


def _check_keep(config: SweepConfig, traits: ModuleTraits, *, metric: str) -> None:
    """Refuse to keep the best step where it is another trial's, or where nothing is known of single pairs."""
    if copies_checkpoints(scheduler_class(config.scheduler)):
        raise ValueError(
            f"`keep: best` needs trials whose steps are their own, got {config.scheduler}: there weights are "
            "handed on between trials. Use keep: last, or another scheduler"
        )
    if traits.pair_metrics is not None and metric not in traits.pair_metrics:
        raise ValueError(
            f"`keep: best` needs an objective that is measured for each validation pair, got {metric!r}: one "
            "half of the pairs chooses the step, and the other half ranks the trial. Take one of "
            f"{', '.join(traits.pair_metrics) or 'a module that learns from pairs'}, or keep: last"
        )


def _first_work(traits: ModuleTraits) -> str:
    if traits.shares_reference:
        return "what all trials share: tokens and the reference's log-probabilities"
    if traits.logged_metrics is None:
        return "a few batches to see what is logged"
    return "the trials"


def _check_folder(spec: TrialSpec, *, resume: bool) -> None:
    if not resume and not Storage(spec.location).is_empty():
        raise ValueError(
            f"`name` must be new, got {spec.location}, which holds a sweep; go on with it by resume=True "
            "(--resume), or choose another name"
        )
