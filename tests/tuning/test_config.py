from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dpo.cli.main import main
from lightning_dpo.tuning import SweepConfig
from lightning_dpo.tuning.config_paths import import_object, nearest, parse_arguments
from lightning_dpo.tuning.objective import check_goals
from lightning_dpo.tuning.recipe.judge import judged_metrics
from lightning_dpo.tuning.search.schedulers import make_scheduler
from lightning_dpo.tuning.search.searchers import make_searcher

SWEEPS = sorted(
    path for path in (Path(__file__).parents[2] / "tuning").glob("*.yaml") if path.name != "frontier.yaml"
)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_fits_its_recipe(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a study's file is made
    config = SweepConfig.from_yaml(file, arguments=["--data.train", "pairs.jsonl", "--samples=3"])
    assert config.samples == 3
    assert config.name == (yaml.safe_load(file.read_text()).get("name") or file.stem)
    assert file.read_text().startswith("# ")
    assert f"lightning-dpo tune --config tuning/{file.name}" in file.read_text()
    space, goals = config.search_space(), config.goals()
    config.to_recipe().check(space.examples())
    traits = config.to_recipe().traits
    metrics = traits.metrics(kl=config.kl_prompts > 0, judged=judged_metrics(config.judge))
    assert metrics is not None
    check_goals(goals, metrics=metrics, incomparable=traits.incomparable_metrics, varied=space.paths)
    make_searcher(config.search, space=space, objective=goals, seed=0)
    make_scheduler(config.scheduler, space=space, objective=goals)


def test_there_are_sweeps() -> None:
    assert {path.name for path in SWEEPS} >= {"beta_lr.yaml", "losses.yaml", "cluster.yaml"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"cpus": 0}, "`cpus`"),
        ({"workers": 2, "gpus": 0.5}, "NCCL refuses two ranks on one device"),
        ({"judge": "judges.vowels"}, r"`judge` \(judges.vowels\) judges completions of .* got 0"),
        ({"time_budget": 0}, "`time_budget` must be a number of seconds above 0"),
        ({"keep": "first"}, '`keep` must be "last" or "best", got \'first\''),
        ({"full_state_every": -1}, "`full_state_every` must not be negative, got -1"),
        ({"stop": {"step": 1}}, "`stop` takes steps"),
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


def test_a_path_of_the_space_is_set_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("space: {model.loss.beta: {grid: [0.1]}, model.optimizer.lr: 1.0e-5}\n")
    given = [
        "--space.model.optimizer.lr",
        "{grid: [1e-5, 3e-5]}",
        "--samples=2",
        "--space.model.loss.beta=0.3",
    ]
    config = SweepConfig.from_yaml(file, arguments=given)
    assert config.space == {"model.loss.beta": 0.3, "model.optimizer.lr": {"grid": [1e-5, 3e-5]}}
    assert config.samples == 2
    whole = SweepConfig.from_yaml(file, arguments=["--space", "{model.loss.beta: 1.0}"])
    assert whole.space == {"model.loss.beta": 1.0}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--num_samples", "--num_samples is no option of a sweep.* did you mean --samples"),
        ("--lr", "--lr is no option .*--model, --data"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(option: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("space: {model.loss.beta: {grid: [0.1]}}\n")
    with pytest.raises(ValueError, match=words):
        SweepConfig.from_yaml(file, arguments=[option, "3"])


def test_the_nearest_name_may_be_of_another_case() -> None:
    assert nearest("dpo", ["DPO", "best-of-N", "IPO"]) == "DPO"
    assert nearest("model.loss.Beta", ["model.loss.beta", "model.loss.alpha"]) == "model.loss.beta"


def test_help_lists_every_field_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    main(["tune", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name} " in shown for field in fields(SweepConfig))
    assert "--resume" in shown
    assert "--samples is the number of all of them" in " ".join(shown.split())
