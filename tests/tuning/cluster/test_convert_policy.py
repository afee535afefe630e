from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dpo.tuning import Objective, SearchSpace
from lightning_dpo.tuning.cluster.convert_policy import convert_policy
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.trial.spec import TrialSpec


@pytest.mark.parametrize(
    ("policy", "varied", "location"),
    [
        ("a/folder", "model.loss.beta", None),
        ("a/model.gguf", "model.policy", None),
        ("a/model.gguf", "model.loss.beta", "memory://bucket/sweep"),
    ],
    ids=["no gguf", "policies vary", "object store"],
)
def test_where_nothing_is_gained_the_policy_stays(
    policy: str, varied: str, location: str | None, tmp_path: Path
) -> None:
    recipe = Recipe(overrides={"model.policy": policy, "data.train": "x.jsonl"})
    space = SearchSpace.parse({varied: {"choice": ["0.1", "0.2"]}})
    spec = TrialSpec(recipe, space, Objective.parse("m"), location or str(tmp_path), "")
    assert convert_policy(spec, recipe.parse()) == {}
    assert not any(tmp_path.iterdir())
