"""SweepConfig: everything that decides a sweep, as one YAML file says it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.config_paths import parse_arguments
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.search.schedulers import check_workers, scheduler_class
from lightning_dpo.tuning.search.space import SearchSpace
from lightning_dpo.tuning.search.starting_points import EarlierSweep, StartingPoint, parse_start
from lightning_dpo.tuning.search.stops import StopRules

__all__ = ["SweepConfig", "split_arguments", "sweep_parser"]


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep.

    Attributes:
        space: What varies, by config path; see `SearchSpace.parse`.
        recipe: A YAML file for `fit`, or several laid over each other.
        overrides: Fixed values by config path, laid over the recipe.
        objective: A metric to maximise, or ``{maximize: ..., minimize: ...}``, each one or a list.
        samples: Trials in all; with a grid, times that each of its points is tried. A finished sweep that is
            resumed with a larger number runs what is missing from it, and no trial again.
        search: "random" (with a grid where the space has one), "optuna", or any Ray searcher as
            ``{class_path: ..., init_args: {...}}``. Optuna takes ``sampler`` and ``pruner`` by class path,
            ``storage`` (such as ``sqlite:///study.db``) and ``study_name`` (else the sweep's name); what its
            pruner ends is stopped early, so it needs ``scheduler: none``.
        start_from: Where the search starts: values by config path of points that are known to be good, with
            their ``result`` beside them where it is known, ``{sweep: FOLDER}`` for an earlier sweep, or a
            list of these. Points are run first, and count as samples. A searcher that learns from results
            (optuna, and Ray's with `add_evaluated_point`) is told those that are known, and they are not
            run; grid and random run such points too. The results of an earlier sweep need the same data and
            objective; ``{sweep: FOLDER, run: 3}`` runs its best three first, whatever they were.
        repeats: Runs of each point that ran to its end, each with another seed; the mean ranks them.
        confirm: How many of the best trials are run again at the end with new seeds; 0 runs none. Only the
            new runs count for them then, and the best of them wins.
        confirm_seeds: New runs of each of these.
        scheduler: "none", "asha", "hyperband", "median", "pbt", or ``{class_path: ..., init_args: {...}}``
            with such a name or any Ray scheduler.
        workers: Processes of one trial.
        cpus: CPUs of each worker; with several workers leave a few hundredths of a machine's CPUs for the
            processes that drive trials.
        gpus: GPUs of each worker; a fraction lets trials share one.
        strategy: How several workers share a model: "ddp", "fsdp2" or "fsdp1".
        packed_trials: Trials that share one process, what it takes (`cpus`, `gpus`) and the weights of one
            frozen base model, each with an adapter and an optimizer of its own; they train in turn, a batch
            each. Needs `model.lora` and one worker, and a space that leaves base model and precision alone.
        concurrency: Trials at once; None takes what the cluster holds.
        stop: What ends a trial: ``{steps: 500, threshold: {val/kl: {above: 50}}, plateau: {patience: 3,
            min_delta: 0.002}}``, any of them, looked at with each report; the plateau is the first goal's. By
            hand, a file of the trial's id in the sweep's folder ``stop`` ends it at its next report.
        time_budget: Seconds that the trials may take; those that run then end with what they have reported. A
            sweep that is resumed has them anew.
        fail_fast: End the sweep if so many of its first trials fail with the same error; 0 tries them all.
        callbacks: Callbacks of Ray Tune, each a class path or ``{class_path: ..., init_args: {...}}``. The
            recipe's loggers need none: each trial is a run of its own in them.
        retries: How often a trial starts again from its checkpoint after one of its processes died.
        reuse_processes: Let trials follow each other in warm processes; those of several workers too.
        share_reference: Compute the reference's log-probabilities once for all trials.
        reference_cache: Folder or URL that keeps the reference's log-probabilities from sweep to sweep; None
            keeps them in the sweep's own folder.
        confidence: With which trials are compared with the best one on the same validation pairs; those that
            cannot be told from it are marked, and the one of them with the lowest KL is recommended.
        kl_prompts: Validation prompts that completions are sampled for, to measure the KL; 0 measures none.
            They are drawn from all of them; where there are fewer, each is completed more than once.
        kl_tokens: Longest completion that is sampled for the KL.
        judge: What scores these completions: the import path of a function of (prompts, completions), or of
            (prompts, first, second) that says how likely the first is better; the folder or hub id of a
            reward model; or ``{class_path: ..., init_args: {...}}`` of a class of judges. Each validation
            then logs val/score and val/win_rate (against the reference), which may be the objective.
        storage: Folder or fsspec URL for sweeps; on a cluster all machines must see it.
        name: The sweep's own folder in `storage`; None takes the YAML file's name.
        ray_address: A cluster's address, "auto" for the one this machine belongs to; None takes what
            RAY_ADDRESS or `ray start` on this machine name, and starts one here where there is none.
        keep: "last" keeps the weights of each trial's last report, and ranks by it. "best" keeps those of its
            best validation by the first goal, which one half of the validation pairs chooses; the other half
            ranks trials, so that the choice makes no trial look better than it is. Searchers and schedulers
            go by the reports as they come.
        full_state_every: Reports from one full state (weights, optimizer, place in the data) to the next. The
            reports between have policy weights alone; a trial whose process dies runs again what it did since
            its last full state. 0 keeps none; None takes 4, and 1 where the scheduler pauses trials or hands
            their states on (hyperband, pbt, and those that are not known here).
        export: Write the best trial's model as a Hugging Face folder.
        seed: Seed of the search.
        module: Import path of a LightningModule of your own, in the place of DPOModule.
        data: Import path of a LightningDataModule of your own.
    """

    space: dict[str, Any]
    recipe: str | list[str] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    objective: str | dict[str, Any] = "val/rewards/accuracy"
    samples: int = 16
    search: str | dict[str, Any] = "random"
    start_from: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    repeats: int = 1
    confirm: int = 0
    confirm_seeds: int = 2
    scheduler: str | dict[str, Any] = "none"
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    strategy: str = "ddp"
    packed_trials: int = 1
    concurrency: int | None = None
    stop: dict[str, Any] | None = None
    time_budget: float | None = None
    fail_fast: int = 3
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    retries: int = 2
    reuse_processes: bool = True
    share_reference: bool = True
    reference_cache: str | None = None
    confidence: float = 0.95
    kl_prompts: int = 0
    kl_tokens: int = 64
    judge: str | dict[str, Any] | None = None
    storage: str = "outputs/sweeps"
    name: str | None = None
    ray_address: str | None = None
    keep: Literal["last", "best"] = "last"
    full_state_every: int | None = None
    export: bool = True
    seed: int = 0
    module: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked alone.

        Raises:
            ValueError: If a value is out of range.
        """
        for name in ("samples", "repeats", "confirm_seeds", "kl_tokens", "packed_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("confirm", "fail_fast", "retries", "kl_prompts"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"`confidence` must be between 0 and 1, such as 0.95, got {self.confidence}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {self.concurrency}")
        if self.time_budget is not None and self.time_budget <= 0:
            raise ValueError(f"`time_budget` must be a number of seconds above 0, got {self.time_budget}")
        if self.keep not in ("last", "best"):
            raise ValueError(f'`keep` must be "last" or "best", got {self.keep!r}')
        if self.full_state_every is not None and self.full_state_every < 0:
            raise ValueError(f"`full_state_every` must not be negative, got {self.full_state_every}")
        if self.judge is not None and not self.kl_prompts:
            raise ValueError(
                f"`judge` ({self.judge}) judges completions of so many validation prompts as `kl_prompts` "
                "says, got 0; set it, for example to 64"
            )
        if self.packed_trials > 1 and self.workers > 1:
            raise ValueError(
                f"`packed_trials` are trials of one process: got {self.packed_trials} and workers="
                f"{self.workers}. Set workers: 1, or packed_trials: 1"
            )
        if self.packed_trials > 1 and self.gpus > 1:
            raise ValueError(
                f"`packed_trials` share one GPU, or a part of it: got {self.packed_trials} and gpus="
                f"{self.gpus:g}. Set gpus: 1; each further GPU has a pack of its own"
            )
        self.stop_rules()
        self.resources()
        check_workers(scheduler_class(self.scheduler), workers=self.workers)
        self.starting_points()

    @classmethod
    def from_yaml(cls, path: str | Path, *, arguments: Sequence[str] = (), **changes: Any) -> SweepConfig:
        """Read a sweep.

        Args:
            path: The YAML file. Recipes that it names are looked for from the working directory, then from
                its own folder.
            arguments: Command-line arguments: those of a sweep, such as ``--samples=8``, and those of a
                recipe, such as ``--data.train=pairs.jsonl``.
            changes: Fields to set.

        Raises:
            ValueError: If the file or an argument is not valid.
        """
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"`config` must be a YAML file, got {str(path)!r}")
        own, of_recipe = split_arguments(arguments)
        return _parse(file, own, of_recipe, changes)

    def search_space(self) -> SearchSpace:
        """What varies, parsed."""
        return SearchSpace.parse(self.space)

    def goals(self) -> Objective:
        """What is maximised, parsed."""
        return Objective.parse(self.objective)

    def starting_points(self) -> tuple[StartingPoint | EarlierSweep, ...]:
        """Where the search starts, parsed; sweeps that it names are not read."""
        return parse_start(self.start_from, space=self.search_space(), objective=self.goals())

    def stop_rules(self) -> StopRules:
        """What ends a trial, parsed."""
        return StopRules.parse(self.stop)

    def resources(self) -> Resources:
        """What a trial takes of the cluster."""
        return Resources(
            workers=self.workers,
            cpus=self.cpus,
            gpus=self.gpus,
            strategy=self.strategy,
            packed=self.packed_trials,
        )

    def to_recipe(self, *, module: Any = None, data: Any = None) -> Recipe:
        """The recipe with the fixed values.

        Args:
            module: A LightningModule class in the place of `self.module`.
            data: A LightningDataModule class in the place of `self.data`.

        Raises:
            ValueError: If a file is missing.
        """
        names = [self.recipe] if isinstance(self.recipe, str) else list(self.recipe or [])
        files = [Path(name) for name in names]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"`recipe` must be a YAML file for `fit`, got {missing[0]!r}")
        return Recipe.read(
            files, overrides=self.overrides, module=module or self.module, data=data or self.data
        )


def sweep_parser(**kwargs: Any) -> ArgumentParser:
    """A parser of every field of `SweepConfig`.

    Args:
        kwargs: For jsonargparse's parser.
    """
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+", **kwargs)
    parser.add_argument("--config", action="config", help="the sweep, a YAML file")
    parser.add_class_arguments(SweepConfig)
    return parser


_OF_RECIPE = ("--model", "--data.", "--trainer", "--seed_everything")


def split_arguments(
    arguments: Sequence[str], *, apart: tuple[str, ...] = _OF_RECIPE
) -> tuple[list[str], list[str]]:
    """Arguments of the sweep, and those of its recipe, with the values that follow them.

    Args:
        arguments: A command line.
        apart: How the latter begin.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    current = parts[0]
    for argument in arguments:
        if argument.startswith("--"):
            current = parts[1] if argument.startswith(apart) else parts[0]
        current.append(argument)
    return parts


def _parse(
    file: Path, arguments: list[str], recipe_arguments: list[str], changes: dict[str, Any]
) -> SweepConfig:
    arguments, of_space = split_arguments(arguments, apart=("--space.",))
    _check_names(arguments)
    try:
        values = sweep_parser().parse_args([f"--config={file}", *arguments]).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{file} is not a sweep: {error}") from error
    values.pop("config")
    varied = {path.removeprefix("space."): value for path, value in parse_arguments(of_space).items()}
    values["space"] = {**values["space"], **_with_numbers(varied)}
    config = SweepConfig(**{**values, **changes})
    names = [config.recipe] if isinstance(config.recipe, str) else list(config.recipe or [])
    return replace(
        config,
        name=config.name or file.stem,
        recipe=[str(_found(Path(name), file.parent)) for name in names],
        overrides={**config.overrides, **parse_arguments(recipe_arguments)},
    )


def _check_names(arguments: Sequence[str]) -> None:
    """Refuse an option that there is not, with the nearest one."""
    known = [field.name for field in fields(SweepConfig)]
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].partition(".")[0].removesuffix("+")
        if argument.startswith("--") and name not in (*known, "config", "print_config"):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean --{near[0]}?" if near else f" ({', '.join(_OF_RECIPE)})"
            raise ValueError(f"--{name} is no option of a sweep, and none of its recipe{meant}")


def _with_numbers(value: Any) -> Any:
    """Values of YAML in which 1e-5 is a number, as it is in the sweep's file, and not a text."""
    if isinstance(value, dict):
        return {name: _with_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _found(name: Path, beside: Path) -> Path:
    """A recipe from the working directory, or from the folder of the sweep."""
    return name if name.is_file() or not (beside / name).is_file() else beside / name
