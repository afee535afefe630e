from __future__ import annotations

import pytest
import ray

from lightning_dpo.tuning.cluster.task import value_errors


def test_a_value_error_of_a_task_is_told_without_its_traceback() -> None:
    of_task = ray.exceptions.RayTaskError(
        "fit", "a traceback of the task", ValueError("`lr` must be above 0")
    )
    told = r"^the recipe does not run: `lr` must be above 0$"
    with pytest.raises(ValueError, match=told) as caught, value_errors("the recipe does not run: "):
        raise of_task
    assert type(caught.value) is ValueError


def test_other_errors_of_a_task_stay_what_they_are() -> None:
    of_task = ray.exceptions.RayTaskError("fit", "a traceback of the task", KeyError("lr"))
    with pytest.raises(ray.exceptions.RayTaskError) as caught, value_errors():
        raise of_task
    assert caught.value is of_task
