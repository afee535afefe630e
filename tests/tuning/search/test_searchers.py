from __future__ import annotations

from typing import Any

import pytest
from ray.tune.search import Searcher

from lightning_dpo.tuning import Objective, SearchSpace
from lightning_dpo.tuning.search.searchers import learns_from_results, make_searcher, ray_space
from lightning_dpo.tuning.search.starting_points import Start, StartingPoint

SPACE = SearchSpace.parse({"model.loss.beta": {"loguniform": [0.01, 1.0]}})
ONE, TWO = Objective.parse("m"), Objective.parse({"maximize": "a", "minimize": "b"})


def test_searchers_by_name_and_by_class_path() -> None:
    searcher = {"class_path": "ray.tune.search.optuna.OptunaSearch", "init_args": {"seed": 3}}
    assert make_searcher(searcher, space=SPACE, objective=ONE, seed=0) is not None
    assert make_searcher("optuna", space=SPACE, objective=TWO, seed=0) is not None


def test_a_searcher_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"`search` must be one of random, grid, optuna .* got 'optna'"):
        make_searcher("optna", space=SPACE, objective=ONE, seed=0)
    with pytest.raises(ValueError, match=r"`search` must be one of random, grid, optuna .* got 'optna'"):
        learns_from_results("optna")
    with pytest.raises(ValueError, match="importable"):
        make_searcher("ray.tune.search.Optna", space=SPACE, objective=ONE, seed=0)


def test_a_space_that_a_searcher_does_not_take() -> None:
    with pytest.raises(ValueError, match="drawn"):
        make_searcher("grid", space=SPACE, objective=ONE, seed=0)
    with pytest.raises(ValueError, match="randn"):
        make_searcher("optuna", space=SearchSpace.parse({"a": {"randn": [0, 1]}}), objective=ONE, seed=0)


class Deaf(Searcher):
    """Takes points to run first, as all of Ray's searchers do, and no results."""

    def __init__(
        self,
        space: dict[str, Any] | None = None,
        metric: str | None = None,
        mode: str | None = None,
        points_to_evaluate: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self.space, self.points = space, points_to_evaluate
        self.told: list[tuple[dict[str, Any], float]] = []


class Learner(Deaf):
    """Takes results too."""

    def add_evaluated_point(self, parameters: dict[str, Any], value: float, **_: Any) -> None:
        self.told.append((parameters, value))


class Closed(Searcher):
    """Takes no points at all."""

    def __init__(self, metric: str | None = None, mode: str | None = None) -> None:
        super().__init__(metric=metric, mode=mode)


RUN, TOLD = StartingPoint({"model.loss.beta": 0.1}), StartingPoint({"model.loss.beta": 0.2}, (0.7,))


def test_a_searcher_by_class_path_is_given_points_and_results() -> None:
    def made(cls: type, start: Start) -> Any:
        return make_searcher(
            {"class_path": f"{__name__}.{cls.__name__}"}, space=SPACE, objective=ONE, seed=0, start=start
        )

    plain = made(Deaf, Start())
    assert (plain.space, plain.points) == (None, None)
    assert made(Deaf, Start(run=(RUN,))).points == [{"model.loss.beta": 0.1}]
    learner = made(Learner, Start(run=(RUN,), told=(TOLD,)))
    assert learner.points == [{"model.loss.beta": 0.1}]
    assert learner.told == [({"model.loss.beta": 0.2}, 0.7)]
    # It has heard of the space then, and Tune must not tell it again.
    assert list(learner.space) == ["model.loss.beta"]
    assert ray_space(f"{__name__}.Learner", SPACE, Start(told=(TOLD,))) == {}
    assert list(ray_space(f"{__name__}.Deaf", SPACE, Start(run=(RUN,)))) == ["model.loss.beta"]
    with pytest.raises(ValueError, match="`start_from` cannot be used: Closed takes no points"):
        made(Closed, Start(run=(RUN,)))


def test_which_searchers_take_results() -> None:
    assert learns_from_results(f"{__name__}.Learner")
    assert not learns_from_results(f"{__name__}.Deaf")
    assert learns_from_results("ray.tune.search.optuna.OptunaSearch")
    assert not learns_from_results({"class_path": "ray.tune.search.hyperopt.HyperOptSearch"})
    assert learns_from_results("ray.tune.search.hebo.HEBOSearch")


def test_rays_own_optuna_search_is_told_results() -> None:
    choice = {"class_path": "ray.tune.search.optuna.OptunaSearch", "init_args": {"seed": 3}}
    searcher = make_searcher(choice, space=SPACE, objective=ONE, seed=0, start=Start((RUN,), (TOLD,)))
    assert searcher.suggest("t0") == {"model.loss.beta": 0.1}
    trials = searcher._ot_study.trials
    assert sorted((t.state.name, t.value) for t in trials) == [("COMPLETE", 0.7), ("RUNNING", None)]
