from __future__ import annotations

import pytest

from lightning_dpo.tuning import Objective, SearchSpace
from lightning_dpo.tuning.search.searchers import make_searcher

SPACE = SearchSpace.parse({"model.loss.beta": {"loguniform": [0.01, 1.0]}})
ONE, TWO = Objective.parse("m"), Objective.parse({"maximize": "a", "minimize": "b"})


def test_searchers_by_name_and_by_class_path() -> None:
    searcher = {"class_path": "ray.tune.search.optuna.OptunaSearch", "init_args": {"seed": 3}}
    assert make_searcher(searcher, space=SPACE, objective=ONE, seed=0) is not None
    assert make_searcher("optuna", space=SPACE, objective=TWO, seed=0) is not None


def test_a_searcher_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"`search` must be one of random, grid, optuna .* got 'optna'"):
        make_searcher("optna", space=SPACE, objective=ONE, seed=0)
    with pytest.raises(ValueError, match="importable"):
        make_searcher("ray.tune.search.Optna", space=SPACE, objective=ONE, seed=0)


def test_a_space_that_a_searcher_does_not_take() -> None:
    with pytest.raises(ValueError, match="drawn"):
        make_searcher("grid", space=SPACE, objective=ONE, seed=0)
    with pytest.raises(ValueError, match="randn"):
        make_searcher("optuna", space=SearchSpace.parse({"a": {"randn": [0, 1]}}), objective=ONE, seed=0)
