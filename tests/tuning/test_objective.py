from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_dpo import DPOModule
from lightning_dpo.tuning.objective import Objective, check_goals, pareto_front
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
