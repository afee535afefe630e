from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from ray.tune.search.variant_generator import generate_variants
from sweep_project import RECIPE

from lightning_dpo.cli.main import main
from lightning_dpo.tuning import SearchSpace, SweepConfig
from lightning_dpo.tuning.config_paths import parse_arguments
from lightning_dpo.tuning.objective import Objective, check_goals, known_metrics, pareto_front
from lightning_dpo.tuning.recipe import Recipe
from lightning_dpo.tuning.search.algorithms import make_scheduler, make_searcher
from lightning_dpo.tuning.search.space import import_object

DPO, IPO = "lightning_dpo.losses.DPOLoss", "lightning_dpo.losses.IPOLoss"
SWEEPS = sorted((Path(__file__).parents[3] / "tuning").glob("*.yaml"))
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


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.read([RECIPE], overrides={"data.train": "x.jsonl"})


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
    parsed = Recipe((text,), recipe.overrides).cli({"model.loss.beta": 0.7}, parse_only=True).config
    assert parsed.model.warmup_ratio == 0.7


def test_the_resolved_recipe_is_one_for_fit(recipe: Recipe, tmp_path: Path) -> None:
    from lightning_dpo.training.cli import DPOCLI

    (tmp_path / "best.yaml").write_text(
        recipe.resolved({"model.loss.class_path": IPO, "model.loss.beta": 0.7})
    )
    cli = DPOCLI(args=[f"--config={tmp_path / 'best.yaml'}"], run=False)
    assert type(cli.model.loss).__name__ == "IPOLoss"
    assert cli.model.loss.beta == 0.7


@pytest.mark.parametrize("metric", ["val/loss", "val/rewards/margin", "val/rewards/chosen"])
def test_ranking_by_what_scales_with_beta_is_refused(metric: str) -> None:
    objective = Objective.parse({"minimize": metric})
    with pytest.raises(ValueError, match="units of the loss and of beta"):
        check_goals(objective, metrics=known_metrics(kl=False), varied=["model.loss.beta"])
    check_goals(objective, metrics=known_metrics(kl=False), varied=["model.optimizer.lr"])


def test_a_metric_that_is_not_logged_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'val/rewards/accuracy'"):
        check_goals(Objective.parse("val/accuracy"), metrics=known_metrics(kl=False), varied=[])
    with pytest.raises(ValueError, match="kl_prompts"):
        check_goals(Objective.parse({"minimize": "val/kl"}), metrics=known_metrics(kl=False), varied=[])


def test_the_pareto_set() -> None:
    assert pareto_front([(1, 1), (2, 0), (0, 2), (1, 0), (2, 0)]) == [0, 1, 2, 4]


def test_searchers_and_schedulers() -> None:
    space, one = SearchSpace.parse(CONDITIONAL), Objective.parse("m")
    two = Objective.parse({"maximize": "a", "minimize": "b"})
    for name in ("none", "asha", "hyperband", "median", "pbt"):
        for objective in (one, two):
            assert make_scheduler(name, space=space, objective=objective) is not None
    paths = "ray.tune.schedulers.AsyncHyperBandScheduler"
    own = make_scheduler({"class_path": paths, "init_args": {"max_t": 7}}, space=space, objective=one)
    assert own._max_t == 7
    searcher = {"class_path": "ray.tune.search.optuna.OptunaSearch", "init_args": {"seed": 3}}
    assert make_searcher(searcher, space=space, objective=one, seed=0) is not None
    assert make_searcher("optuna", space=space, objective=two, seed=0) is not None
    with pytest.raises(ValueError, match="drawn"):
        make_searcher("grid", space=space, objective=one, seed=0)
    with pytest.raises(ValueError, match="importable"):
        make_scheduler("ahsa", space=space, objective=one)
    with pytest.raises(ValueError, match="does not take"):
        make_scheduler({"class_path": "asha", "init_args": {"nonsense": 1}}, space=space, objective=one)
    with pytest.raises(ValueError, match="randn"):
        make_searcher("optuna", space=SearchSpace.parse({"a": {"randn": [0, 1]}}), objective=one, seed=0)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_fits_its_recipe(file: Path) -> None:
    config = SweepConfig.from_yaml(file, arguments=["--data.train", "pairs.jsonl", "--samples=3"])
    assert config.samples == 3
    assert config.name == (yaml.safe_load(file.read_text()).get("name") or file.stem)
    assert file.read_text().startswith("# ")
    assert f"lightning-dpo tune --config tuning/{file.name}" in file.read_text()
    space, goals = config.search_space(), config.goals()
    config.to_recipe().check(space.examples())
    check_goals(goals, metrics=known_metrics(kl=config.kl_prompts > 0), varied=space.paths)
    make_searcher(config.search, space=space, objective=goals, seed=0)
    make_scheduler(config.scheduler, space=space, objective=goals)


def test_there_are_sweeps() -> None:
    assert {path.name for path in SWEEPS} >= {"beta_lr.yaml", "losses.yaml", "cluster.yaml"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"cpus": 0}, "`cpus`"),
        ({"strategy": "fdsp2"}, "`strategy`"),
        ({"workers": 2, "scheduler": "pbt"}, "one process"),
        ({"objective": {"maximise": "x"}}, "`objective`"),
    ],
)
def test_mistakes_in_a_sweep(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SweepConfig(space={"model.loss.beta": 1}, **changes)


def test_arguments_of_the_recipe() -> None:
    assert parse_arguments(["--a.b=1", "--c", "x y", "--d=[1, 2]"]) == {"a.b": 1, "c": "x y", "d": [1, 2]}
    with pytest.raises(ValueError, match="--a"):
        parse_arguments(["--a", "--b=1"])
    with pytest.raises(ValueError, match="importable"):
        import_object("lightning_dpo.nothing")


def test_help_lists_every_field_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    main(["tune", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name} " in shown for field in fields(SweepConfig))
    assert "--resume" in shown
