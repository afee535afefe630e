from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_dpo import DPOModule
from lightning_dpo.tuning.objective import Goal, Objective, check_goals, pareto_front
from lightning_dpo.tuning.recipe.module_traits import ModuleTraits

TRAITS = ModuleTraits.of(DPOModule)
LOGGED: dict[str, Any] = {
    "metrics": TRAITS.metrics(kl=False),
    "incomparable": TRAITS.incomparable_metrics,
}


@pytest.mark.parametrize("metric", ["val/loss", "val/rewards/margin", "val/rewards/chosen"])
def test_ranking_by_what_scales_with_beta_is_refused(metric: str) -> None:
    objective = Objective.parse({"minimize": metric})
    with pytest.raises(ValueError, match="units of the loss and of beta"):
        check_goals(objective, **LOGGED, varied=["model.loss.beta"])
    check_goals(objective, **LOGGED, varied=["model.optimizer.lr"])


def test_a_metric_that_is_not_logged_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'val/rewards/accuracy'"):
        check_goals(Objective.parse("val/accuracy"), **LOGGED)
    with pytest.raises(ValueError, match="kl_prompts"):
        check_goals(Objective.parse({"minimize": "val/kl"}), **LOGGED)


@pytest.mark.parametrize("metric", ["val/loss", "val/kl", "val_loss", "val/helpful/loss", "val/error"])
def test_what_is_to_be_small_is_not_maximised_by_its_name_alone(metric: str) -> None:
    with pytest.raises(ValueError, match=f"write {{minimize: {metric}}}"):
        Objective.parse(metric)
    assert [Objective.parse({f"{key}imize": metric}).primary.mode for key in ("min", "max")] == ["min", "max"]


def test_a_direction_without_a_metric_is_refused() -> None:
    for nothing in (None, []):
        with pytest.raises(ValueError, match="`objective` must name a metric"):
            Objective.parse({"maximize": nothing})


def test_the_kl_is_not_taken_for_a_misspelt_metric() -> None:
    with pytest.raises(ValueError, match="sampled completions") as error:
        check_goals(Objective.parse({"minimize": "val/kl"}), **LOGGED)
    assert "did you mean" not in str(error.value)


def test_what_is_sampled_is_compared_where_it_was_sampled_alike() -> None:
    assert Objective.parse("val/rewards/accuracy").settings == ()
    sampled = ("kl_prompts", "kl_tokens")
    assert Objective.parse({"maximize": "val/rewards/accuracy", "minimize": "val/kl"}).settings == sampled
    assert Objective.parse("val/win_rate").settings == ("judge", *sampled)


def test_a_trial_that_went_wrong_is_worse_than_any_other() -> None:
    assert Goal("val/logratio/margin", "max").worst < -100  # margins fall below 0
    assert Goal("val/loss", "min").worst > 100
    assert Goal("val/rewards/accuracy", "max").worst == 0


def test_the_pareto_set() -> None:
    assert pareto_front([(1, 1), (2, 0), (0, 2), (1, 0), (2, 0)]) == [0, 1, 2, 4]


def test_the_pareto_set_of_many_points_is_what_comparing_all_of_them_gives() -> None:
    draw = np.random.default_rng(0)
    points = [tuple(point) for point in draw.integers(0, 9, (200, 3)).tolist()]
    points += [(8, float("nan"), 8), (0, 0, float("nan"))]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        at_least = all(a >= b for a, b in zip(one, other, strict=True))
        return at_least and any(a > b for a, b in zip(one, other, strict=True))

    expected = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    assert pareto_front(points) == expected
    assert len(expected) < 30
    assert pareto_front([]) == []
