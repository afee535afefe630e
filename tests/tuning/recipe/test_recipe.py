from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from sweep_project import RECIPE

from lightning_dpo.tuning.recipe.recipe import Recipe

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


def test_a_path_of_a_class_within_a_class_is_known(recipe: Recipe) -> None:
    weighted = {"model.loss.loss.class_path": IPO, "model.loss.class_path": "lightning_dpo.losses.WPO"}
    recipe.check([{**weighted, "model.loss.loss.beta": 0.1}])
    loss = recipe.parse({**weighted, "model.loss.loss.beta": 0.3}).get("model.loss")
    assert loss.init_args.loss.init_args.beta == 0.3
    with pytest.raises(ValueError, match=r"no config path 'model\.loss\.loss\.betta'"):
        recipe.check([{**weighted, "model.loss.loss.betta": 0.1}])


def test_a_path_of_what_the_recipe_leaves_out_is_known(recipe: Recipe) -> None:
    recipe.check([{"model.lora.r": 4}])
    with pytest.raises(ValueError, match=r"no config path 'model\.lora\.rank'"):
        recipe.check([{"model.lora.rank": 4}])


def test_a_value_of_the_wrong_type_is_found_before_anything_starts(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"model\.loss\.beta='much'"):
        recipe.check([{"model.loss.beta": "much"}])


def test_a_list_where_one_value_belongs_is_told_from_a_grid(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"model.loss.beta a list .*\{grid: \[0.1, 0.3\]\}"):
        recipe.check([{"model.loss.beta": [0.1, 0.3]}])
    recipe.check([{"model.optimizer.betas": [0.9, 0.95]}])


def test_a_loss_out_of_its_range_is_found_before_anything_starts(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"take model.loss.beta=-0.1: `beta` must be a finite number"):
        recipe.check([{"model.loss.beta": 0.1}, {"model.loss.beta": -0.1}])
    inner = {"class_path": IPO, "init_args": {"beta": 0.1}}
    weighted = {"class_path": "lightning_dpo.losses.WPO", "init_args": {"loss": inner}}
    recipe.check([{"model.loss": weighted}])
    inner["init_args"] = {"beta": 0.0}
    with pytest.raises(ValueError, match=r"`beta` must be a finite number"):
        recipe.check([{"model.loss": weighted}])


def test_overrides_come_before_interpolations(recipe: Recipe) -> None:
    text = recipe.texts[0].replace("warmup_ratio: 0.1", "warmup_ratio: ${model.loss.init_args.beta}")
    parsed = Recipe((text,), recipe.overrides).parse({"model.loss.beta": 0.7})
    assert parsed.get("model.warmup_ratio") == 0.7


def test_the_resolved_recipe_is_one_for_fit(recipe: Recipe, tmp_path: Path) -> None:
    from lightning_dpo.training.cli import DPOCLI

    (tmp_path / "best.yaml").write_text(
        recipe.parse({"model.loss.class_path": IPO, "model.loss.beta": 0.7}).to_yaml()
    )
    cli = DPOCLI(args=[f"--config={tmp_path / 'best.yaml'}"], run=False)
    assert type(cli.model.loss).__name__ == "IPOLoss"
    assert cli.model.loss.beta == 0.7


class Plain(pl.LightningModule):
    """A module that says nothing of itself to sweeps."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width = width


class Named(Plain):
    """One whose class names the default of an argument."""

    @classmethod
    def cli_defaults(cls) -> dict[str, int]:
        return {"width": 5}


@pytest.mark.parametrize(("module", "width"), [(Plain, 3), (Named, 5)])
def test_a_module_that_knows_nothing_of_preferences(module: type[Plain], width: int) -> None:
    recipe = Recipe(module=module, data=pl.LightningDataModule)
    assert recipe.parse().get("model.width") == width
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    recipe.parse({"model.width": 4})
    assert torch.equal(torch.random.get_rng_state(), before)
    made = recipe.instantiate({"model.width": 4}, trainer_options={"max_epochs": 2, "logger": False})
    assert made.model.width == 4
    assert made.trainer.max_epochs == 2


def test_a_preference_data_module_under_a_module_without_a_policy() -> None:
    recipe = Recipe(module=Plain, overrides={"data.train": "x.jsonl"})
    assert recipe.parse().get("data.tokenizer") is None


def test_the_tokenizer_is_the_policys_unless_another_is_named(recipe: Recipe) -> None:
    assert recipe.parse({"model.policy": "a/b"}).get("data.tokenizer") == "a/b"
    assert recipe.parse({"model.policy": "a/b", "data.tokenizer": "c"}).get("data.tokenizer") == "c"
