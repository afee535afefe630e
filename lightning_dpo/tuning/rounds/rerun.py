"""What is run again: values of earlier trials with other seeds, as a search space that leaves no choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray import tune

from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.search.space import SearchSpace
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["Rerun", "RerunSpace", "check_seeds", "confirmations", "repetitions", "seed_paths"]

_KEY = "rerun"
_SEEDS = ("seed_everything", "data.shuffle_seed")


class Rerun(NamedTuple):
    """A trial's values with another seed.

    Attributes:
        trial: The trial of the search whose values these are.
        overrides: The values, with the seed, by config path.
        purpose: "repeat" or "confirm".
    """

    trial: str
    overrides: Mapping[str, Any]
    purpose: str


@dataclass(frozen=True, slots=True)
class RerunSpace(SearchSpace):
    """A search space whose points are reruns, each of them tried once.

    Attributes:
        reruns: The points.
    """

    reruns: tuple[Rerun, ...] = ()

    @property
    def grid_size(self) -> int:
        """How many reruns there are."""
        return len(self.reruns)

    def ray_config(self) -> dict[str, Any]:
        """The points as Ray's `param_space`."""
        return {_KEY: tune.grid_search([rerun._asdict() for rerun in self.reruns])}

    def overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values by config path from a config that Ray made."""
        return dict(config[_KEY]["overrides"])

    def origin(self, config: Mapping[str, Any]) -> tuple[str, str]:
        """Of which trial a config that Ray made is a rerun, and its purpose."""
        return config[_KEY]["trial"], config[_KEY]["purpose"]


def seed_paths(recipe: Recipe) -> tuple[str, ...]:
    """Config paths that decide chance in training, and not which pairs are held out.

    Args:
        recipe: Without `data.shuffle_seed` only `seed_everything` can be set: the order of the data is then
            the same in all runs.
    """
    known = recipe.parse().paths()
    return tuple(path for path in _SEEDS if path in known)


def check_seeds(space: SearchSpace, *, repeats: int, confirm: int) -> None:
    """Refuse to repeat where the seed is what varies.

    Raises:
        ValueError: If the space sets a seed that reruns would set.
    """
    varied = [path for path in space.paths if path in _SEEDS]
    if varied and (repeats > 1 or confirm):
        option = "repeats" if repeats > 1 else "confirm"
        raise ValueError(
            f"`{option}` runs values again with other seeds, and `space` varies {varied[0]}: leave that out"
        )


def repetitions(trials: Sequence[TrialRecord], *, repeats: int, recipe: Recipe) -> list[Rerun]:
    """Every trial that is complete, so often again that it has `repeats` runs.

    Args:
        trials: Those of the search.
        repeats: Runs of each point, the first one counted.
        recipe: Says what seeds there are.
    """
    return list(_reruns(trials, seeds=range(1, repeats), purpose="repeat", recipe=recipe))


def confirmations(
    trials: Sequence[TrialRecord], *, confirm: int, seeds: int, first_seed: int, recipe: Recipe
) -> list[Rerun]:
    """The best trials that are complete, with seeds that none of them had.

    Args:
        trials: Best first.
        confirm: How many of them.
        seeds: Runs of each.
        first_seed: Seeds begin here, counted from the recipe's own.
        recipe: Says what seeds there are.
    """
    complete = [trial for trial in trials if trial.is_complete]
    numbers = range(first_seed, first_seed + seeds)
    return list(_reruns(complete[:confirm], seeds=numbers, purpose="confirm", recipe=recipe))


def _reruns(
    trials: Sequence[TrialRecord], *, seeds: Sequence[int], purpose: str, recipe: Recipe
) -> Iterator[Rerun]:
    paths = seed_paths(recipe)
    base = recipe.parse().config.get("seed_everything")
    # True asks for any seed, which would be another one each time.
    start = base if isinstance(base, int) and not isinstance(base, bool) else 0
    for trial in trials:
        if trial.is_complete:
            for seed in seeds:
                values = {**trial.overrides, **dict.fromkeys(paths, start + seed)}
                yield Rerun(trial.id, values, purpose)
