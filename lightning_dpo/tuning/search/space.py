"""The search space: what a YAML file says of config paths, as Ray's domains."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer

from lightning_dpo.tuning.config_paths import import_object

__all__ = ["GRID_KEY", "Parameter", "SearchSpace", "is_known_to_optuna"]

GRID_KEY = "grid"
"""Where Ray's config holds the values of all grid parameters together."""

_DOMAINS: dict[str, Callable[..., Domain]] = {
    name: getattr(tune, name)
    for name in (
        "uniform",
        "quniform",
        "loguniform",
        "qloguniform",
        "randn",
        "qrandn",
        "randint",
        "qrandint",
        "lograndint",
        "qlograndint",
    )
}
_KINDS = (*_DOMAINS, "choice", "grid", "sample_from")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One value that a sweep varies.

    Attributes:
        key: Its name in Ray's config; the path, with ``@1`` and so on where a path has several domains.
        path: The config path that it sets, such as ``model.loss.beta``.
        kind: Name of the domain, "grid" or "constant".
        domain: Ray's domain; None for a grid and a constant.
        values: The values of a choice, a grid or a constant.
        when: Set only if each of these paths has one of these values.
    """

    key: str
    path: str
    kind: str
    domain: Domain | None = None
    values: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def is_active(self, chosen: Mapping[str, Any]) -> bool:
        """Whether its condition holds for values that were chosen already."""
        return all(path in chosen and chosen[path] in allowed for path, allowed in self.when.items())

    def examples(self) -> tuple[Any, ...]:
        """Values that show its type and range: every choice, or both ends."""
        if self.values:
            return self.values
        if isinstance(self.domain, Float | Integer) and self.domain.upper is not None:
            last = self.domain.upper - 1 if isinstance(self.domain, Integer) else self.domain.upper
            return (self.domain.lower, last)
        if self.domain is None or isinstance(self.domain, Function):
            return ()
        return (self.domain.sample(),)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All parameters of a sweep, those that choose a class first.

    Attributes:
        parameters: In the order in which they are applied.
    """

    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, entries: Mapping[str, Any]) -> SearchSpace:
        """Read what stands in YAML.

        Args:
            entries: By config path, one of: ``{uniform: [0, 1]}`` or another domain of Ray,
                ``{choice: [...]}``, ``{grid: [...]}``, ``{sample_from: package.function}``, or a plain value.
                ``when: {path: value}`` beside a domain makes it conditional; a list of such entries gives a
                path several domains.

        Raises:
            ValueError: If an entry cannot be read.
        """
        if not entries:
            raise ValueError("`space` must name at least one config path, got none")
        parameters = []
        for path, entry in entries.items():
            alternatives = entry if _is_alternatives(entry) else [entry]
            for number, alternative in enumerate(alternatives):
                key = path if number == 0 else f"{path}@{number}"
                parameters.append(_parse_entry(key, path, alternative))
        parameters.sort(key=lambda p: (not p.path.endswith("class_path"), bool(p.when)))
        space = cls(tuple(parameters))
        paths = {parameter.path for parameter in parameters}
        for parameter in parameters:
            for condition in parameter.when:
                if condition not in paths or condition == parameter.path:
                    raise ValueError(
                        f"`when` of {parameter.path} must name another path of the space, got {condition!r}"
                    )
        return space

    @property
    def paths(self) -> tuple[str, ...]:
        """The config paths, each once."""
        return tuple(dict.fromkeys(parameter.path for parameter in self.parameters))

    @property
    def grid(self) -> tuple[Parameter, ...]:
        """The parameters of the grid."""
        return tuple(p for p in self.parameters if p.kind == "grid")

    @property
    def grid_size(self) -> int:
        """Points of the grid; 1 where there is none."""
        return len(self.grid_points()) if self.grid else 1

    def ray_config(self) -> dict[str, Any]:
        """The space as Ray's `param_space`; the grid is one parameter, so that conditions thin it out."""
        config: dict[str, Any] = {p.key: p.domain for p in self.parameters if p.domain is not None}
        if self.grid:
            config[GRID_KEY] = tune.grid_search(self.grid_points())
        return config

    def overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values by config path from a config that Ray made, without those whose condition does not hold."""
        # A point of the grid that a sweep starts from may set what is drawn for the others.
        drawn = {**config, **config.get(GRID_KEY, {})}
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            constant = parameter.kind == "constant"
            if (constant or parameter.key in drawn) and parameter.is_active(chosen):
                chosen[parameter.path] = parameter.values[0] if constant else drawn[parameter.key]
        return chosen

    def origin(self, config: Mapping[str, Any]) -> tuple[str, str]:
        """Of which trial a config that Ray made is a rerun, and its purpose; two empty texts for a search.

        Args:
            config: What Ray chose.
        """
        return "", ""

    def define_by_run(self, trial: Any) -> None:
        """The space for Optuna, which then draws only the parameters whose condition holds.

        Args:
            trial: Optuna's trial.
        """
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_active(chosen):
                constant = parameter.kind == "constant"
                chosen[parameter.path] = parameter.values[0] if constant else _suggest(trial, parameter)

    def examples(self) -> Iterator[dict[str, Any]]:
        """Overrides that show every class, and both ends of every range."""
        classes = [p for p in self.parameters if p.path.endswith("class_path")]
        others = [p for p in self.parameters if p not in classes]
        for combination in itertools.product(*(p.examples() for p in classes)):
            chosen: dict[str, Any] = {}
            for parameter, value in zip(classes, combination, strict=True):
                if parameter.is_active(chosen):
                    chosen[parameter.path] = value
            width = max((len(p.examples()) for p in others), default=0)
            for index in range(max(width, 1)):
                example = dict(chosen)
                for parameter in others:
                    values = parameter.examples()
                    if values and parameter.is_active(example):
                        example[parameter.path] = values[min(index, len(values) - 1)]
                yield example

    def grid_points(self) -> list[dict[str, Any]]:
        """The points of the grid by key of Ray's config, each once: conditions thin it out."""
        seen: dict[str, dict[str, Any]] = {}
        for combination in itertools.product(*(p.values for p in self.grid)):
            point: dict[str, Any] = {}
            chosen: dict[str, Any] = {}
            for parameter, value in zip(self.grid, combination, strict=True):
                outside = [path for path in parameter.when if path not in {p.path for p in self.grid}]
                if outside or parameter.is_active(chosen):
                    point[parameter.key] = chosen[parameter.path] = value
            seen.setdefault(json.dumps(point, sort_keys=True, default=repr), point)
        return list(seen.values())


def _is_alternatives(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str) and all(map(_is_domain, entry))


def _is_domain(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(kind in entry for kind in _KINDS)


def _parse_entry(key: str, path: str, entry: Any) -> Parameter:
    if not isinstance(entry, Mapping):
        return Parameter(key, path, "constant", values=(entry,))
    kinds = [kind for kind in entry if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in (*_KINDS, "value"):
        raise ValueError(
            f"`space` of {path} must be a value or one of {', '.join(_KINDS)} with an optional `when`, "
            f"got {dict(entry)}"
        )
    (kind,) = kinds
    given = entry[kind]
    conditions = entry.get("when") or {}
    when = {
        at: tuple(value) if isinstance(value, list | tuple) else (value,) for at, value in conditions.items()
    }
    if kind == "value":
        return Parameter(key, path, "constant", values=(given,), when=when)
    if kind == "sample_from":
        return Parameter(key, path, kind, domain=tune.sample_from(import_object(given)), when=when)
    if kind in ("choice", "grid"):
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"`space` of {path} must give {kind} a list of values, got {given!r}")
        domain = tune.choice(list(given)) if kind == "choice" else None
        return Parameter(key, path, kind, domain=domain, values=tuple(given), when=when)
    try:
        make = _DOMAINS[kind]
        domain = make(**given) if isinstance(given, Mapping) else make(*given)
        if isinstance(domain, Float | Integer) and domain.upper is not None and domain.lower >= domain.upper:
            raise ValueError("the lower end must be below the upper end")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`space` of {path}: {kind} does not take {given!r}: {error}") from error
    return Parameter(key, path, kind, domain=domain, when=when)


def _suggest(trial: Any, parameter: Parameter) -> Any:
    """Draw from Optuna what Ray's domain describes."""
    if parameter.values:
        return trial.suggest_categorical(parameter.key, list(parameter.values))
    domain = parameter.domain
    log = "log" in parameter.kind
    step = getattr(getattr(domain, "sampler", None), "q", None)
    if isinstance(domain, Float):
        return trial.suggest_float(parameter.key, domain.lower, domain.upper, log=log, step=step)
    assert isinstance(domain, Integer)
    # Ray's upper end is left out, except where values are rounded to a step.
    upper = domain.upper if step else domain.upper - 1
    return trial.suggest_int(parameter.key, domain.lower, upper, log=log, step=step or 1)


def is_known_to_optuna(parameter: Parameter) -> bool:
    """Whether Optuna has such a distribution."""
    if parameter.kind == "constant" or parameter.values:
        return not isinstance(parameter.domain, Domain) or isinstance(parameter.domain, Categorical)
    return parameter.kind in ("uniform", "quniform", "loguniform", "randint", "qrandint", "lograndint")
