"""Optuna's searcher with a study of one's own: storage, sampler, pruner, and results that are known."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.trial import FixedTrial, TrialState, create_trial
from ray.tune.search.optuna import OptunaSearch

from lightning_dpo.tuning.config_paths import class_and_arguments, import_object
from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.search.space import GRID_KEY, SearchSpace
from lightning_dpo.tuning.search.starting_points import Start, StartingPoint, ray_config_of

__all__ = ["StudySearch", "make_study_search"]


class StudySearch(OptunaSearch):
    """Ray's OptunaSearch, told results of any space and number of goals, with a pruner where one is set.

    Each trial of the study has the name of the sweep's trial as its user attribute "trial"; those whose
    results were told have where they are from as "origin".
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        objective: Objective,
        start: Start | None = None,
        pruner: Any = None,
        **arguments: Any,
    ) -> None:
        """Make the study, or open the one of this name in the storage.

        Args:
            space: What varies.
            objective: One goal or several.
            start: Points that it begins with.
            pruner: Optuna's pruner, or None.
            arguments: For Ray's OptunaSearch.
        """
        goals = objective.goals
        single = len(goals) == 1
        super().__init__(
            space=space.define_by_run,
            metric=goals[0].metric if single else [goal.metric for goal in goals],
            mode=goals[0].mode if single else [goal.mode for goal in goals],
            **arguments,
        )
        self._search_space = space
        self._start = start or Start()
        self._prunes = pruner is not None
        self._pruned: set[str] = set()
        if pruner is not None:
            self.study.pruner = pruner
        with _quiet():
            self.study.set_metric_names([goal.metric for goal in goals])

    @property
    def study(self) -> optuna.Study:
        """The study."""
        study: Any = self._ot_study
        return cast(optuna.Study, study)

    def _begin(self) -> None:
        """Queue the points that are run first, and add the results that are known.

        With the first trial and not before: a study in a storage stays empty if the sweep does not begin.
        """
        start, self._start = self._start, Start()
        if self.study.get_trials(deepcopy=False):
            return  # a driver that was killed did so, and had not saved that yet
        for point in start.told:
            self.study.add_trial(self._told(point))
        for point in start.run:
            self.study.enqueue_trial(self._parameters(point), user_attrs={"origin": point.origin})

    def suggest(self, trial_id: str) -> Any:
        """Draw values, and write the trial's name to the study."""
        if self._start.told or self._start.run:
            self._begin()
        is_new = trial_id not in self._ot_trials
        config = super().suggest(trial_id)
        if is_new:
            self._ot_trials[trial_id].set_user_attr("trial", trial_id)
        return config

    def prunes(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether the pruner ends a trial with this report, which the study takes down.

        Args:
            trial_id: The sweep's trial.
            result: Its report.
        """
        if result.get("status") is not None:
            return False  # it has ended by itself
        trial = self._ot_trials[trial_id]
        super().on_trial_result(trial_id, dict(result))
        is_last = 0 < result.get("total_steps", 0) <= result.get("step", 0)
        if not is_last and trial.should_prune():
            self._pruned.add(trial_id)
            return True
        return False

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take down a report, where the pruner did not do so already."""
        if not self._prunes and result.get("status") is None:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001 - Ray's interface
    ) -> None:
        """Tell the study how a trial ended."""
        if trial_id not in self._pruned or trial_id in self._completed_trials:
            super().on_trial_complete(trial_id, result=result, error=error)
            return
        self.study.tell(self._ot_trials[trial_id], state=TrialState.PRUNED)
        self._completed_trials.add(trial_id)

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a saved state; trials of the study that it does not know never ran to a report."""
        super().restore(checkpoint_path)
        known = {trial.number for trial in self._ot_trials.values()}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in known:
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _parameters(self, point: StartingPoint) -> dict[str, Any]:
        config = ray_config_of(point.overrides, self._search_space)
        # To Optuna a grid is a choice.
        return {**config.pop(GRID_KEY, {}), **config}

    def _told(self, point: StartingPoint) -> optuna.trial.FrozenTrial:
        assert point.result is not None
        fixed = FixedTrial(self._parameters(point))
        self._search_space.define_by_run(fixed)
        attributes = {"origin": point.origin, **({"trial": point.trial} if point.trial else {})}
        return create_trial(
            values=list(point.result),
            params=fixed.params,
            distributions=fixed.distributions,
            user_attrs=attributes,
        )


def make_study_search(
    arguments: Mapping[str, Any],
    *,
    space: SearchSpace,
    objective: Objective,
    seed: int,
    study_name: str,
    start: Start | None = None,
    is_new: bool = True,
) -> StudySearch:
    """Optuna's searcher from the ``init_args`` of YAML.

    Args:
        arguments: ``sampler`` and ``pruner`` by class path, such as ``optuna.samplers.CmaEsSampler`` or
            ``{class_path: ..., init_args: {...}}``; ``storage``, a URL such as ``sqlite:///study.db``;
            ``study_name``; and what Ray's OptunaSearch takes.
        space: What varies.
        objective: One goal or several.
        seed: Of the sampler, unless it is given.
        study_name: Where none is given.
        start: Points that it begins with.
        is_new: Refuse a study that has trials.

    Raises:
        ValueError: If a class cannot be imported or does not take its arguments, or the storage cannot be
            opened, or has a study of this name.
    """
    given = dict(arguments)
    single = len(objective.goals) == 1
    made: dict[str, Any] = {"study_name": given.pop("study_name", None) or study_name}
    sampler, pruner, storage = (given.pop(name, None) for name in ("sampler", "pruner", "storage"))
    if sampler is not None:
        own_seed = given.pop("seed", seed)
        made["sampler"] = _instance(
            sampler, "sampler", optuna.samplers, optuna.samplers.BaseSampler, seed=own_seed
        )
    else:
        made["seed"] = given.pop("seed", seed)
    if pruner is not None:
        if not single:
            raise ValueError(
                "`search.init_args.pruner` must be left out where there are several goals: Optuna's pruners "
                "look at one. Use `scheduler`"
            )
        made["pruner"] = _instance(pruner, "pruner", optuna.pruners, optuna.pruners.BasePruner)
    if storage is not None:
        made["storage"] = _storage(storage)
        if is_new:
            _check_new(made["storage"], made["study_name"], storage)
    try:
        return StudySearch(space, objective=objective, start=start, **made, **given)
    except TypeError as error:
        raise ValueError(f"`search` optuna does not take {given}: {error}") from error
    except ValueError as error:
        raise ValueError(f"`search` optuna: {error}") from error


def _instance(choice: Any, argument: str, home: Any, base: type[Any], *, seed: int | None = None) -> Any:
    """An object of Optuna's by class path, or by its class's name; arguments may be such choices too."""
    name = f"search.init_args.{argument}"
    if not isinstance(choice, str | Mapping):
        raise ValueError(f"`{name}` must be a class path or {{class_path, init_args}}, got {choice!r}")
    path, arguments = class_and_arguments(choice)
    cls = import_object(path) if "." in path else getattr(home, path, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        known = ", ".join(name for name in home.__all__ if name.endswith(argument.capitalize()))
        raise ValueError(
            f"`{name}` must be a {argument} of Optuna by class path, such as {known}, got {path!r}"
        )
    arguments = {
        key: _instance(value, argument, home, base)
        if isinstance(value, Mapping) and "class_path" in value
        else value
        for key, value in arguments.items()
    }
    try:
        with _quiet():
            if seed is not None and "seed" not in arguments:
                with contextlib.suppress(TypeError):
                    return cls(**arguments, seed=seed)
            return cls(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"`{name}`: {path} does not take {arguments}: {error}") from error


def _storage(url: Any) -> Any:
    if not isinstance(url, str) or "://" not in url:
        raise ValueError(f"`search.init_args.storage` must be a URL such as sqlite:///study.db, got {url!r}")
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:  # of any database's driver
        raise ValueError(f"`search.init_args.storage` {url} cannot be opened: {error}") from error


def _check_new(storage: Any, name: str, url: str) -> None:
    found: Sequence[Any] = optuna.get_all_study_summaries(storage)
    if any(one.study_name == name and one.n_trials for one in found):
        raise ValueError(
            f"`search.init_args.study_name` must be new, got {name!r}, of which {url} has trials; go on with "
            "their sweep by --resume, or choose another name"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that something of Optuna's is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        yield
