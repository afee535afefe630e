from __future__ import annotations

from pathlib import Path

import pytest
from sweep_project import RECIPE

from lightning_dpo.tuning.recipe import Recipe

IPO = "lightning_dpo.losses.IPOLoss"


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.read([RECIPE], overrides={"data.train": "x.jsonl"})


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("model.loss.betta", "model.loss.beta"),
        ("model.optimiser.lr", "model.optimizer.lr"),
        ("optimizer.lr", "model.optimizer.lr"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("model.los.class_path", "model.loss.class_path"),
    ],
)
def test_a_path_that_the_recipe_lacks_is_named_with_the_nearest(recipe: Recipe, path: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no config path '{path}'; did you mean '{near}'"):
        recipe.check([{path: 1}])


def test_a_path_of_a_class_that_is_chosen_is_known(recipe: Recipe) -> None:
    recipe.check([{"model.loss.class_path": IPO, "model.loss.length_normalized": False}])
    with pytest.raises(ValueError, match="length_normalized"):
        recipe.check([{"model.loss.length_normalized": False}])


def test_a_value_of_the_wrong_type_is_found_before_anything_starts(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"model\.loss\.beta='much'"):
        recipe.check([{"model.loss.beta": "much"}])


def test_overrides_come_before_interpolations(recipe: Recipe) -> None:
    text = recipe.texts[0].replace("warmup_ratio: 0.1", "warmup_ratio: ${model.loss.init_args.beta}")
    parsed = Recipe((text,), recipe.overrides).parse({"model.loss.beta": 0.7})
    assert parsed.get("model.warmup_ratio") == 0.7


def test_the_resolved_recipe_is_one_for_fit(recipe: Recipe, tmp_path: Path) -> None:
    from lightning_dpo.cli.main import DPOCLI

    (tmp_path / "best.yaml").write_text(
        recipe.parse({"model.loss.class_path": IPO, "model.loss.beta": 0.7}).to_yaml()
    )
    cli = DPOCLI(args=[f"--config={tmp_path / 'best.yaml'}"], run=False)
    assert type(cli.model.loss).__name__ == "IPOLoss"
    assert cli.model.loss.beta == 0.7
