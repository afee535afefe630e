from __future__ import annotations

from typing import Any

import optuna
import pytest
from ray.tune.search.variant_generator import generate_variants

from lightning_dpo.tuning import SearchSpace

DPO, IPO = "lightning_dpo.losses.DPOLoss", "lightning_dpo.losses.IPOLoss"
CONDITIONAL = {
    "model.optimizer.lr": {"loguniform": [1e-6, 1e-4]},
    "model.loss.beta": [
        {"uniform": [0.0, 1.0], "when": {"model.loss.class_path": DPO}},
        {"uniform": [2.0, 3.0], "when": {"model.loss.class_path": IPO}},
    ],
    "model.loss.label_smoothing": {"uniform": [0.0, 0.3], "when": {"model.loss.class_path": DPO}},
    "model.loss.class_path": {"choice": [DPO, IPO]},
}


def draw(space: SearchSpace) -> dict[str, Any]:
    _, config = next(iter(generate_variants(space.ray_config())))
    return space.overrides(config)


@pytest.mark.parametrize(
    ("kind", "arguments", "low", "high"),
    [
        ("uniform", [2, 3], 2, 3),
        ("quniform", [0, 1, 0.25], 0, 1),
        ("loguniform", [1e-3, 1e-1], 1e-3, 1e-1),
        ("qloguniform", [0.1, 1, 0.1], 0.1, 1),
        ("randn", [100, 0.001], 99, 101),
        ("qrandn", [10, 0.5, 0.5], 0, 20),
        ("randint", [3, 5], 3, 4),
        ("qrandint", [2, 8, 2], 2, 8),
        ("lograndint", [1, 100], 1, 99),
        ("qlograndint", [2, 64, 2], 2, 64),
        ("choice", [7, 9], 7, 9),
        ("uniform", {"lower": 2, "upper": 3}, 2, 3),
    ],
)
def test_every_domain_of_ray(kind: str, arguments: Any, low: float, high: float) -> None:
    space = SearchSpace.parse({"a.b": {kind: arguments}})
    values = [draw(space)["a.b"] for _ in range(20)]
    assert all(low <= value <= high for value in values)
    assert len(set(values)) > 1


def twice(spec: Any) -> float:
    return 2 * spec.config["a"]


def test_a_function_and_a_fixed_value() -> None:
    space = SearchSpace.parse({"a": {"choice": [4]}, "b": {"sample_from": f"{__name__}.twice"}, "c": 5})
    assert draw(space) == {"a": 4, "b": 8, "c": 5}


def test_conditions_follow_the_class_whatever_their_order() -> None:
    space = SearchSpace.parse(CONDITIONAL)
    seen = set()
    for _ in range(30):
        drawn = draw(space)
        assert next(iter(drawn)) == "model.loss.class_path"
        is_dpo = drawn["model.loss.class_path"] == DPO
        assert ("model.loss.label_smoothing" in drawn) == is_dpo
        assert (drawn["model.loss.beta"] <= 1) == is_dpo
        seen.add(is_dpo)
    assert seen == {True, False}


def test_optuna_draws_only_what_is_active() -> None:
    space = SearchSpace.parse({**CONDITIONAL, "data.batch_size": {"randint": [2, 4]}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        space.define_by_run(trial)
        is_dpo = trial.params["model.loss.class_path"] == DPO
        assert ("model.loss.label_smoothing" in trial.params) == is_dpo
        assert ("model.loss.beta" in trial.params) == is_dpo
        assert ("model.loss.beta@1" in trial.params) != is_dpo
        assert trial.params["data.batch_size"] in (2, 3)
        assert 1e-6 <= trial.params["model.optimizer.lr"] <= 1e-4


def test_a_grid_has_no_point_twice_under_conditions() -> None:
    space = SearchSpace.parse(
        {
            "model.loss.class_path": {"grid": [DPO, IPO]},
            "model.loss.label_smoothing": {"grid": [0.0, 0.1, 0.2], "when": {"model.loss.class_path": DPO}},
        }
    )
    points = [space.overrides(config) for _, config in generate_variants(space.ray_config())]
    assert len(points) == 4
    assert [len(point) for point in points] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "at least one"),
        ({"a": {"loguniform": [1, 2, 3, 4, 5]}}, "does not take"),
        ({"a": {"uniform": [3, 2]}}, "below"),
        ({"a": {"logunifrm": [1, 2]}}, "must be a value or one of"),
        ({"a": {"choice": []}}, "list of values"),
        ({"a": {"uniform": [0, 1], "when": {"b": 1}}}, "another path"),
    ],
)
def test_mistakes_in_a_space(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SearchSpace.parse(entries)
