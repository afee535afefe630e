"""`run_frontier`: train each method over its strengths and seeds, measure every policy, and compare."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from lightning_dpo.tuning.cluster.connect import connected
from lightning_dpo.tuning.cluster.task import run_preparation
from lightning_dpo.tuning.config_paths import import_object
from lightning_dpo.tuning.frontier.config import FrontierConfig
from lightning_dpo.tuning.frontier.measure import Measuring, scoring_judge
from lightning_dpo.tuning.frontier.methods import BestOfMethod, RealignedMethod, TrainedMethod
from lightning_dpo.tuning.frontier.page import write_page
from lightning_dpo.tuning.frontier.prompts import validation_prompts
from lightning_dpo.tuning.frontier.result import Failure, FrontierResult, PolicyPoint, to_parquet
from lightning_dpo.tuning.frontier.sampling import Run, Sampler
from lightning_dpo.tuning.frontier.settings import check_settings, save_settings
from lightning_dpo.tuning.frontier.table import print_result, to_markdown
from lightning_dpo.tuning.frontier.train import sweeps_at_once, train_methods
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["run_frontier"]


def run_frontier(config: FrontierConfig, *, resume: bool = False, verbose: bool = True) -> FrontierResult:
    """Compare methods.

    Args:
        config: What to compare.
        resume: Go on with the comparison of this name: what was trained and measured is not done again, and
            methods may have been added.
        verbose: Say what goes on, and print the table.

    Raises:
        ValueError: If the configuration is not valid, before anything is trained; or if no policy was made.
    """
    began = time.time()
    say = _say if verbose else _nothing
    scoring_judge(config.judge)
    check_settings(config, resume=resume)
    setup = None if config.setup is None else import_object(config.setup)
    methods = config.picked_methods()
    trained_methods = [method for method in methods.values() if isinstance(method, TrainedMethod)]
    sweeps = [config.method_sweep(method) for method in trained_methods]
    for sweep in sweeps:
        sweep.to_recipe().check(sweep.search_space().examples())
    save_settings(config)
    with connected(config.sweep.get("ray_address"), urls=(config.storage,)):
        if setup is not None:
            say("making what the recipes name, unless that was done before ...")
            setup(config.folder.location, list(config.seeds))
        sampler = _sampler(config, say)
        runs: list[Run] = []
        failures: list[Failure] = []
        at_once = sweeps_at_once(sweeps)
        if sweeps:
            how = "two at a time" if at_once > 1 else "one after the other"
            say(f"training {len(sweeps)} methods, {how} ...")
        training = train_methods(sampler.spec, trained_methods, sweeps, at_once=at_once)
        for number, done in enumerate(training, start=1):
            runs += done.runs
            failures += done.failures
            say(f"[{number}/{len(sweeps)}] {done.method}: {len(done.runs)} policies, {done.seconds:.0f} s")
        if not runs and not any(isinstance(method, BestOfMethod) for method in methods.values()):
            raise ValueError(f"every run went wrong; the first one: {failures[0].reason}")
        say(f"sampling {len(runs)} policies, and what tells the best reachable reward ...")
        fit = config.fit_settings()
        waits_for_none = not config.limit_policies
        with sampler.fitting(fit) if fit and waits_for_none else nullcontext(_nothing) as fitted:
            trained = list(sampler.runs(runs))
            drawn: list[PolicyPoint | Failure] = []
            for method in methods.values():
                if isinstance(method, RealignedMethod):
                    drawn += sampler.realigned(method, runs)
                elif isinstance(method, BestOfMethod):
                    sampler.reference(config.seeds, samples_per_prompt=method.samples_per_prompt)
            fitted()
        limit = sampler.limit(
            runs,
            trained,
            kl=max(config.kls, default=math.inf),
            policies=config.limit_policies,
            samples_per_prompt=config.limit_samples_per_prompt or config.samples_per_prompt,
            rounds=config.limit_rounds,
            fit=fit,
        )
        for method in methods.values():
            if isinstance(method, BestOfMethod):
                drawn += sampler.best_of(method, config.seeds, limit)
    failures += [found for found in drawn if isinstance(found, Failure)]
    points = [
        dataclasses.replace(point, share_of_limit=limit.share(point.reward, kl=point.kl))
        for point in _in_order([*trained, *drawn], list(methods))
    ]
    if not points:
        raise ValueError(f"no policy could be measured; the first one: {failures[0].reason}")
    result = FrontierResult(
        location=config.folder.location,
        points=tuple(points),
        limit=limit,
        kls=tuple(config.kls),
        failures=tuple(failures),
        seconds=round(time.time() - began, 1),
        settings=dataclasses.asdict(config),
        strengths={name: method.label for name, method in methods.items()},
    )
    config.folder.write("frontier.parquet", to_parquet(points))
    config.folder.write("frontier.md", to_markdown(result))
    write_page(result)
    if verbose:
        print_result(result)
    return result


def _sampler(config: FrontierConfig, say: Callable[[str], None]) -> Sampler:
    """What samples policies, once the reference's own samples have shown that prompts and judge work."""
    shared = config.shared_sweep()
    spec = TrialSpec(
        recipe=shared.to_recipe(),
        space=shared.search_space(),
        objective=shared.goals(),
        location=config.folder.location,
        cwd=str(Path.cwd()),
        import_path=tuple(sys.path),
        resources=dataclasses.replace(config.resources(), workers=1),
    )
    say("sampling the reference ...")
    prompts, tokenizer = run_preparation(spec, validation_prompts, config.prompts)
    measuring = Measuring(
        reference=str(spec.recipe.parse().get("model.policy")),
        tokenizer=tokenizer,
        prompts=prompts,
        judge=config.judge,
        samples_per_prompt=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    sampler = Sampler(spec, measuring, config.folder / "measured")
    sampler.reference(config.seeds[:1], samples_per_prompt=config.samples_per_prompt)
    return sampler


def _in_order(found: Sequence[PolicyPoint | Failure], methods: list[str]) -> list[PolicyPoint]:
    points = [point for point in found if isinstance(point, PolicyPoint)]
    return sorted(points, key=lambda point: (methods.index(point.method), point.strength, point.seed))


def _say(text: str) -> None:
    print(text, flush=True)


def _nothing(*texts: str) -> None:
    del texts
