"""FrontierConfig: everything that decides a comparison of methods, as one YAML file says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lightning_dpo.tuning.cluster.resources import Resources
from lightning_dpo.tuning.config import SweepConfig, split_arguments
from lightning_dpo.tuning.config_paths import parse_arguments
from lightning_dpo.tuning.frontier.limit import FitSettings
from lightning_dpo.tuning.frontier.methods import (
    Method,
    TrainedMethod,
    folder_name,
    parse_methods,
    pick_methods,
)
from lightning_dpo.tuning.recipe.module_traits import ModuleTraits
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.types.checks import check_bounds

__all__ = ["FrontierConfig", "frontier_parser"]

_SEED = "seed_everything"
_OWN = ("space", "recipe", "overrides", "objective", "module", "data", "storage", "name", "export")
"""Fields of a method's sweep that the frontier sets itself."""


@dataclass(kw_only=True)
class FrontierConfig:
    """Methods beside each other: reward against KL.

    Attributes:
        methods: By name, how each is trained and over which strengths; see `parse_methods`.
        judge: What scores completions: the import path of a function of (prompts, completions), the folder
            or hub id of a reward model, or ``{class_path: ..., init_args: {...}}`` of a class of judges.
        recipe: A YAML file for `fit`, or several laid over each other, which all methods share. Its policy is
            the reference, and its validation prompts are completed.
        overrides: Values by config path that all methods share; a method's own are laid over them, and null
            there leaves one out. ``{folder}`` in a text is the frontier's own folder, ``{seed}`` the seed of
            a run.
        setup: Import path of a function of (folder, seeds) that makes what the recipe names, before anything
            is trained, on a machine that is connected to Ray; None where all is there.
        seeds: Every strength is trained with each.
        only: A method to take, or several; None takes all.
        prompts: How many different validation prompts are completed.
        samples_per_prompt: Completions of each.
        max_new_tokens: Longest completion.
        batch_size: Completions sampled and scored at once.
        limit_policies: Trained policies that are sampled again for the limit, beside the reference.
        limit_samples_per_prompt: Completions of each prompt from each of these; None takes
            `samples_per_prompt`. The more there are, the larger the KL to which the limit is known.
        limit_rounds: How often so many are drawn at most, or `limit_fits` done; not again once 100 effective
            samples of every prompt tell the limit at the largest of `kls`.
        limit_fits: Rounds in which a copy of the reference is fitted to the best policy itself at the largest
            of `kls`; what is sampled on the way there, as much of each prompt in each round, then tells the
            limit. None where the samples of `limit_policies` tell it; 0 fits none. See `fit_optimum`.
        limit_fit_lr: Of Adam, in these rounds.
        kls: Where methods are compared, nats.
        sweep: Further fields of each method's `SweepConfig`, such as ``{gpus: 1}``.
        storage: Folder or fsspec URL; on a cluster all machines must see it.
        name: The frontier's own folder in `storage`; None takes the YAML file's name.
    """

    methods: dict[str, Any]
    judge: str | dict[str, Any]
    recipe: str | list[str] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    setup: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    only: str | list[str] | None = None
    prompts: int = 32
    samples_per_prompt: int = 32
    max_new_tokens: int = 128
    batch_size: int = 64
    limit_policies: int = 4
    limit_samples_per_prompt: int | None = None
    limit_rounds: int = 1
    limit_fits: int = 0
    limit_fit_lr: float = 1e-5
    kls: list[float] = field(default_factory=lambda: [1.0, 2.0, 5.0, 8.0])
    sweep: dict[str, Any] = field(default_factory=dict)
    storage: str = "outputs"
    name: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked alone.

        Raises:
            ValueError: If a value is out of range, or an entry of `methods` cannot be read.
        """
        for name in ("prompts", "samples_per_prompt", "max_new_tokens", "batch_size", "limit_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        check_bounds(least=0, limit_policies=self.limit_policies, limit_fits=self.limit_fits)
        check_bounds(above=0, limit_fit_lr=self.limit_fit_lr)
        if self.limit_fits and not self.kls:
            raise ValueError("`kls` must name at least one KL for `limit_fits` to reach, got none")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be different numbers, at least one, got {self.seeds}")
        if not all(kl > 0 for kl in self.kls):
            raise ValueError(f"`kls` must be above 0, got {self.kls}")
        known = {each.name for each in dataclasses.fields(SweepConfig)} - set(_OWN)
        wrong = [name for name in self.sweep if name not in known]
        if wrong:
            raise ValueError(f"`sweep` must hold fields of a sweep such as gpus or workers, got {wrong[0]!r}")
        self.picked_methods()
        self.resources()

    @classmethod
    def from_yaml(cls, path: str | Path, *, arguments: Sequence[str] = (), **changes: Any) -> FrontierConfig:
        """Read a comparison.

        Args:
            path: The YAML file. Recipes that it names are looked for from the working directory, then from
                its own folder.
            arguments: Command-line arguments: fields, such as ``--seeds=[0]``, and those of a recipe, such as
                ``--data.train=pairs.jsonl``, which hold for all methods.
            changes: Fields to set.

        Raises:
            ValueError: If the file or an argument is not valid.
        """
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"`config` must be a YAML file, got {str(path)!r}")
        own, of_recipe = split_arguments(arguments)
        try:
            values = frontier_parser().parse_args([f"--config={file}", *own]).as_dict()
        except ArgumentError as error:
            raise ValueError(f"{file} is not a frontier: {error}") from error
        values.pop("config")
        values["name"] = values["name"] or file.stem
        config = cls(**{**values, **changes})
        methods = {
            name: {**entry, "recipe": _found(entry["recipe"], file.parent)}
            if isinstance(entry, Mapping) and entry.get("recipe")
            else entry
            for name, entry in config.methods.items()
        }
        return dataclasses.replace(
            config,
            overrides={**config.overrides, **parse_arguments(of_recipe)},
            recipe=_found(config.recipe, file.parent),
            methods=methods,
        )

    def picked_methods(self) -> dict[str, Method]:
        """The methods to compare, by name."""
        methods = parse_methods(self.methods, any_n=bool(self.limit_fits or self.limit_policies))
        if self.only is None:
            return methods
        return pick_methods(methods, [self.only] if isinstance(self.only, str) else self.only)

    @property
    def folder(self) -> Storage:
        """Where everything lies."""
        return Storage(self.storage) / (self.name or "frontier")

    def fit_settings(self) -> FitSettings | None:
        """How a policy is fitted to the best one; None where none is."""
        if not self.limit_fits:
            return None
        return FitSettings(
            kl=max(self.kls),
            samples_per_prompt=self.limit_samples_per_prompt or self.samples_per_prompt,
            rounds=self.limit_fits,
            most_rounds=self.limit_rounds * self.limit_fits,
            lr=self.limit_fit_lr,
        )

    def resources(self) -> Resources:
        """What a run takes of the cluster."""
        return SweepConfig(space={_SEED: 0}, **self.sweep).resources()

    def shared_sweep(self) -> SweepConfig:
        """What all methods share, as a sweep over the seeds alone; its policy is the reference."""
        fixed, varied = self._values(self.overrides)
        return SweepConfig(
            recipe=self.recipe, overrides=fixed, space={_SEED: {"grid": list(self.seeds)}, **varied}
        )

    def method_sweep(self, method: TrainedMethod) -> SweepConfig:
        """The sweep of a method over its strengths and the seeds."""
        dropped = {path for path, value in method.overrides.items() if value is None}
        values = {**self.overrides, **method.overrides}
        fixed, varied = self._values(
            {path: value for path, value in values.items() if path not in dropped & set(self.overrides)}
        )
        along = {
            path: [
                {"grid": [value], "when": {method.path: strength}}
                for strength, value in zip(method.values, by_strength, strict=True)
            ]
            for path, by_strength in method.along.items()
        }
        own = self.folder / "methods"
        sweep = SweepConfig(
            recipe=self.recipe if method.recipe is None else method.recipe,
            overrides=fixed,
            space={
                method.path: {"grid": list(method.values)},
                _SEED: {"grid": list(self.seeds)},
                **varied,
                **along,
            },
            module=method.module,
            data=method.data,
            storage=own.location,
            name=folder_name(method.name),
            export=False,
            **{
                "samples": 1,
                "reference_cache": (self.folder / "reference").location,
                **self.sweep,
            },
        )
        objective = method.objective or _objective(sweep.to_recipe().traits, name=method.name)
        return dataclasses.replace(sweep, objective=objective)

    def _values(self, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values that are fixed, with those of the first seed among them, and those that go by the seed."""
        fixed: dict[str, Any] = {}
        varied: dict[str, Any] = {}
        for path, given in overrides.items():
            value = given.replace("{folder}", self.folder.location) if isinstance(given, str) else given
            if isinstance(value, str) and "{seed}" in value:
                varied[path] = [
                    {"grid": [_with_seed(value, seed)], "when": {_SEED: seed}} for seed in self.seeds
                ]
                value = _with_seed(value, self.seeds[0])
            fixed[path] = value
        return fixed, varied


def frontier_parser(**kwargs: Any) -> ArgumentParser:
    """A parser of every field of `FrontierConfig`.

    Args:
        kwargs: For jsonargparse's parser.
    """
    parser = ArgumentParser(exit_on_error=False, **kwargs)
    parser.add_argument("--config", action="config", help="the comparison, a YAML file")
    parser.add_class_arguments(FrontierConfig)
    return parser


def _objective(traits: ModuleTraits, *, name: str) -> str:
    """A metric that can be compared between trials: accuracy, or the first one that the class names."""
    comparable = [m for m in traits.logged_metrics or () if m not in traits.incomparable_metrics]
    if not comparable:
        raise ValueError(
            f"`objective` of {name!r} must be a metric that its validation logs, for its class names none"
        )
    usual = [metric for metric in ("val/rewards/accuracy", "val/rewards/auc") if metric in comparable]
    return (usual or comparable)[0]


def _with_seed(text: str, seed: int) -> str | int:
    return seed if text == "{seed}" else text.replace("{seed}", str(seed))


def _found(recipe: str | list[str] | None, beside: Path) -> list[str]:
    """Recipes from the working directory, or from the folder of the YAML file."""
    names = [recipe] if isinstance(recipe, str) else list(recipe or [])
    return [str(beside / n) if not Path(n).is_file() and (beside / n).is_file() else n for n in names]
