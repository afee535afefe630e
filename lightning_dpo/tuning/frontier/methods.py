"""The methods of a frontier, as entries in its YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lightning_dpo.tuning.config_paths import nearest
from lightning_dpo.tuning.report.formatting import path_labels

__all__ = [
    "BestOfMethod",
    "Method",
    "RealignedMethod",
    "TrainedMethod",
    "folder_name",
    "parse_methods",
    "pick_methods",
]


@dataclass(frozen=True, slots=True)
class TrainedMethod:
    """A method that trains a policy for each strength and seed.

    Attributes:
        name: As tables and curves name it.
        path: Config path of what says how far it goes from the reference, such as ``model.loss.beta``.
        values: The strengths, numbers.
        along: What else goes by the strength: values by config path, one for each strength.
        overrides: Values by config path, laid over what all methods share.
        recipe: YAML files for `fit`, in the place of the shared ones; None keeps those.
        module: Import path of the LightningModule; None is what the recipe names, or DPOModule.
        data: Import path of the LightningDataModule; None is what the recipe names, or PreferenceDataModule.
        objective: A metric that its validation logs; None takes one that the module's class names.
    """

    name: str
    path: str
    values: tuple[float, ...]
    along: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | list[str] | None = None
    module: str | None = None
    data: str | None = None
    objective: str | dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """What is varied, in short."""
        return path_labels([self.path])[self.path]


@dataclass(frozen=True, slots=True)
class BestOfMethod:
    """The best of N completions of the reference: nothing is trained.

    Attributes:
        name: As tables and curves name it.
        values: The numbers N, each at least 2.
        samples_per_prompt: Completions of each prompt that an N up to this number is estimated from. A
            larger one is told by the samples of the limit.
    """

    name: str
    values: tuple[int, ...]
    samples_per_prompt: int

    @property
    def label(self) -> str:
        """What is varied, in short."""
        return "N"


@dataclass(frozen=True, slots=True)
class RealignedMethod:
    """One trained policy of each seed at other distances from its reference: nothing is trained again.

    Attributes:
        name: As tables and curves name it.
        of: The method that trains the policy.
        at: The strength that it is trained at.
        values: The scales lambda of pi_ref^(1 - lambda) pi^lambda; 1 is the policy itself.
    """

    name: str
    of: str
    at: float
    values: tuple[float, ...]

    @property
    def label(self) -> str:
        """What is varied, in short."""
        return "λ"


Method: TypeAlias = TrainedMethod | BestOfMethod | RealignedMethod

_TRAINED_KEYS = ("strength", "overrides", "recipe", "module", "data", "objective")
_BEST_OF_KEYS = ("best_of", "samples_per_prompt")
_REALIGNED_KEYS = ("realign", "at", "scales")


def parse_methods(entries: Mapping[str, Any], *, any_n: bool = False) -> dict[str, Method]:
    """Read what stands under `methods` in YAML.

    Args:
        entries: By name, either ``{strength: {path: [values]}, ...}`` with `overrides`, `recipe`, `module`,
            `data` and `objective`, all optional, where further paths under `strength` go by the first; or
            ``{best_of: [N, ...]}``; or, of a method that is trained,
            ``{realign: its name, at: strength, scales: [...]}``.
        any_n: Whether best-of-N may have an N above its `samples_per_prompt`.

    Returns:
        The methods by name.

    Raises:
        ValueError: If an entry cannot be read.
    """
    if not entries:
        raise ValueError("`methods` must name at least one method, got none")
    methods = {name: _parse(str(name), entry) for name, entry in entries.items()}
    for method in methods.values():
        if isinstance(method, BestOfMethod) and not any_n:
            _check_best_of(method)
    for method in methods.values():
        if isinstance(method, RealignedMethod):
            _check_realigned(method, methods)
    folders: dict[str, str] = {}
    for name in methods:
        other = folders.setdefault(folder_name(name), name)
        if other != name:
            raise ValueError(f"`methods` must differ in more than signs, got {other!r} and {name!r}")
    return methods


def pick_methods(methods: Mapping[str, Method], names: Sequence[str]) -> dict[str, Method]:
    """Some of the methods, in their own order.

    Raises:
        ValueError: For a name that is not among them, with the nearest one.
    """
    for name in names:
        if name not in methods:
            raise ValueError(
                f"`only` must name methods of the configuration, got {name!r}; did you mean "
                f"{nearest(name, methods)!r}?"
            )
    picked = {name: method for name, method in methods.items() if name in names}
    for method in picked.values():
        if isinstance(method, RealignedMethod) and method.of not in picked:
            raise ValueError(f"`only` must name {method.of!r} too, which {method.name!r} starts from")
    return picked


def folder_name(method: str) -> str:
    """A method's name as the name of a folder: "PPO (learned reward)" is "ppo-learned-reward"."""
    return re.sub(r"\W+", "-", method.lower()).strip("-")


def _parse(name: str, entry: Any) -> Method:
    kinds: dict[str, Callable[[str, Mapping[str, Any]], Method]] = {
        "strength": _trained,
        "best_of": _best_of,
        "realign": _realigned,
    }
    found = [kind for kind in kinds if isinstance(entry, Mapping) and kind in entry]
    if len(found) != 1 or not folder_name(name):
        raise ValueError(
            f"`methods` must give each name one of {', '.join(kinds)}, such as "
            f"{{strength: {{model.loss.beta: [0.1, 0.5]}}}}, got {entry!r} for {name!r}"
        )
    return kinds[found[0]](name, entry)


def _trained(name: str, entry: Mapping[str, Any]) -> TrainedMethod:
    _check_keys(name, entry, _TRAINED_KEYS)
    strength = entry["strength"]
    if not isinstance(strength, Mapping) or not strength:
        raise ValueError(
            f"`strength` of {name!r} must be a config path with its values, such as "
            f"{{model.loss.beta: [0.1, 0.5]}}, got {strength!r}"
        )
    (path, given), *others = ((str(path), values) for path, values in strength.items())
    values = _numbers(name, path, given)
    for other, by_strength in others:
        if not isinstance(by_strength, list | tuple) or len(by_strength) != len(values):
            raise ValueError(
                f"`{other}` of {name!r} must be a list of {len(values)} values, one for each of "
                f"`{path}`, got {by_strength!r}"
            )
    fields = {key: value for key, value in entry.items() if key != "strength" and value is not None}
    return TrainedMethod(name, path, values, {other: tuple(each) for other, each in others}, **fields)


def _best_of(name: str, entry: Mapping[str, Any]) -> BestOfMethod:
    _check_keys(name, entry, _BEST_OF_KEYS)
    values = _numbers(name, "best_of", entry["best_of"])
    samples = entry.get("samples_per_prompt", 2 * max(values))
    wrong = [value for value in values if value < 2 or value != int(value)]
    if wrong:
        raise ValueError(f"`best_of` of {name!r} must be whole numbers from 2 to any, got {wrong[0]:g}")
    return BestOfMethod(name, tuple(int(value) for value in values), int(samples))


def _check_best_of(method: BestOfMethod) -> None:
    largest = max(method.values)
    if largest > method.samples_per_prompt:
        raise ValueError(
            f"`best_of` of {method.name!r} must be whole numbers from 2 to `samples_per_prompt` = "
            f"{method.samples_per_prompt}, got {largest}; with `limit_fits` or `limit_policies` the samples "
            "of the limit tell larger ones"
        )


def _realigned(name: str, entry: Mapping[str, Any]) -> RealignedMethod:
    _check_keys(name, entry, _REALIGNED_KEYS)
    missing = [key for key in _REALIGNED_KEYS if key not in entry]
    if missing:
        raise ValueError(f"`methods` must give {name!r} {', '.join(_REALIGNED_KEYS)}, got no {missing[0]}")
    (at,), scales = _numbers(name, "at", [entry["at"]]), _numbers(name, "scales", entry["scales"])
    if min(scales) <= 0:
        raise ValueError(f"`scales` of {name!r} must be above 0, got {min(scales):g}; 0 is the reference")
    return RealignedMethod(name, str(entry["realign"]), at, scales)


def _check_realigned(method: RealignedMethod, methods: Mapping[str, Method]) -> None:
    of = methods.get(method.of)
    if not isinstance(of, TrainedMethod):
        trained = [name for name, other in methods.items() if isinstance(other, TrainedMethod)]
        raise ValueError(
            f"`realign` of {method.name!r} must name a method that is trained, one of {', '.join(trained)}, "
            f"got {method.of!r}"
        )
    if method.at not in of.values:
        raise ValueError(
            f"`at` of {method.name!r} must be a strength of {of.name!r}, one of "
            f"{', '.join(f'{value:g}' for value in of.values)}, got {method.at:g}"
        )


def _numbers(name: str, what: str, values: Any) -> tuple[float, ...]:
    numbers = isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if not numbers or not values or len(set(values)) < len(values):
        raise ValueError(f"`{what}` of {name!r} must be a list of different numbers, got {values!r}")
    return tuple(values)


def _check_keys(name: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in entry:
        if key not in known:
            raise ValueError(
                f"`methods` must give {name!r} none but {', '.join(known)}, got {key!r}; did you mean "
                f"{nearest(str(key), known)!r}?"
            )
