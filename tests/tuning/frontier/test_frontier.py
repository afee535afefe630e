"""The recipe as shipped, on a tiny task with fewer strengths, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_task import tiny_task_config

from lightning_dpo.cli.main import main
from lightning_dpo.demo.frontier import prepare_frontier
from lightning_dpo.evaluation import best_of_n_kl_bound
from lightning_dpo.tuning import FrontierConfig, run_frontier
from lightning_dpo.tuning.frontier.measure import Measured, Measuring, measure
from lightning_dpo.tuning.frontier.methods import TrainedMethod, folder_name
from lightning_dpo.tuning.frontier.prompts import validation_prompts
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT
from lightning_dpo.tuning.trial.spec import TrialSpec

SHIPPED = Path(__file__).parents[3] / "tuning" / "frontier.yaml"
TINY = tiny_task_config(train_pairs=64, validation_pairs=16)
FEW = {
    "samples_per_prompt": 8,
    "limit_samples_per_prompt": 16,
    "limit_fits": 1,
    "limit_rounds": 1,
    "prompts": 4,
    "seeds": [0],
}


def fewer(entry: dict[str, Any]) -> dict[str, Any]:
    """A method with the first and the last of its values."""

    def ends(values: Sequence[Any]) -> list[Any]:
        return [values[0], values[-1]]

    if "strength" in entry:
        return {**entry, "strength": {path: ends(values) for path, values in entry["strength"].items()}}
    if "best_of" in entry:
        return {"best_of": [2, 4], "samples_per_prompt": 8}
    return {**entry, "at": 0.05, "scales": ends(entry["scales"])}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FrontierConfig:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    shipped = FrontierConfig.from_yaml(SHIPPED)
    methods = {name: fewer(entry) for name, entry in shipped.methods.items()}
    return FrontierConfig.from_yaml(SHIPPED, storage=str(tmp_path), methods=methods, setup=None, **FEW)


@pytest.mark.heavy
def test_the_recipe_as_shipped(
    cluster: None, config: FrontierConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_frontier(config.folder.location, [0], task=TINY)
    result = run_frontier(config)
    assert "training 9 methods, two at a time ..." in capsys.readouterr().out
    assert not result.failures
    assert result.methods == list(config.methods)
    assert len(result.points) == 2 * len(config.methods)
    table = pq.read_table(f"{result.location}/frontier.parquet")
    assert table.num_rows == len(result.points)
    assert Path(result.report_path).is_file()
    assert all(point.kl >= 0 and point.kl_error >= 0 for point in result.points)
    drawn = [point for point in result.points if point.method == "best-of-N"]
    assert all(0 < point.kl <= best_of_n_kl_bound(int(point.strength)) for point in drawn)
    assert result.limit.policies == 0
    assert result.limit.fitted is not None
    assert result.limit.fitted[0] > 0
    assert result.limit.rewards.shape == (4, 2 * 16)  # of the reference, and of the fitted policy
    (fitted,) = Path(result.location, "measured", "limit").glob("fit-*.json")
    assert json.loads(fitted.read_text())["rounds"][0]["kl"] > 0
    near, far = (point.kl for point in result.points if point.method == "DPO realigned")
    assert near < far


@pytest.mark.heavy
def test_what_was_done_is_not_done_again(
    cluster: None, config: FrontierConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_frontier(config.folder.location, [0], task=TINY)
    config.only = ["DPO"]
    first = run_frontier(config)
    assert "[1/1] DPO: 2 policies" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--resume"):
        run_frontier(config)
    folder = Path(config.folder.location)
    known = {path: path.stat().st_mtime_ns for path in folder.glob("m*/**/*") if path.is_file()}
    config.only = ["DPO", "best-of-N", "DPO realigned"]
    more = run_frontier(config, resume=True)
    assert more.methods == config.only
    assert [point for point in more.points if point.method == "DPO"] == list(first.points)
    assert {path: path.stat().st_mtime_ns for path in known} == known
    assert any(path.name.startswith("fit-") for path in known)
    config.samples_per_prompt = 9
    with pytest.raises(ValueError, match="`samples_per_prompt` must be that of the comparison"):
        run_frontier(config, resume=True)


@pytest.mark.heavy
def test_where_every_run_goes_wrong_the_first_reason_is_told(cluster: None, config: FrontierConfig) -> None:
    prepare_frontier(config.folder.location, [0], task=TINY)
    config.only = ["DPO", "DPO realigned"]
    config.overrides["trainer.limit_val_batches"] = 0  # nothing is reported
    with pytest.raises(
        ValueError, match=r"every run went wrong; the first one: .*must validate at least once"
    ):
        run_frontier(config, verbose=False)


def test_every_recipe_takes_its_values() -> None:
    shipped = FrontierConfig.from_yaml(SHIPPED)
    trained = [m for m in shipped.picked_methods().values() if hasattr(m, "path")]
    assert len(trained) == 9
    for method in trained:
        sweep = shipped.method_sweep(method)
        sweep.to_recipe().check(sweep.search_space().examples())
        seeds = {tuple(point.items()) for point in map(sweep.search_space().overrides, _points(sweep))}
        assert len(seeds) == 3 * len(method.values)


def test_what_goes_by_the_strength() -> None:
    given = FrontierConfig.from_yaml(SHIPPED)
    strength = {"model.loss.beta": [0.1, 4.0], "model.optimizer.lr": [0.04, 0.01]}
    given.methods = {"DPO": {"strength": strength}}
    (method,) = given.picked_methods().values()
    sweep = given.method_sweep(method)
    found = [sweep.search_space().overrides({"grid": point}) for point in _points(sweep)]
    rates = [(point["model.loss.beta"], point["model.optimizer.lr"]) for point in found]
    assert sorted(rates) == [(0.1, 0.04)] * 3 + [(4.0, 0.01)] * 3
    assert {point["seed_everything"] for point in found} == {0, 1, 2}


def _points(sweep: Any) -> list[dict[str, Any]]:
    return list(sweep.search_space().ray_config()["grid"]["grid_search"])  # as Ray's config has them


@pytest.mark.slow
def test_every_method_trains_and_leaves_a_policy_that_can_be_measured(
    config: FrontierConfig, tmp_path: Path
) -> None:
    prepare_frontier(config.folder.location, [0], task=TINY)
    prompts, tokenizer = validation_prompts(_spec(config), 2)
    model = f"{config.folder.location}/task/model"
    measuring = Measuring(model, tokenizer, prompts, config.judge, 2, 24, 8)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "limit_train_batches": 1}
    for name, method in config.picked_methods().items():
        if not isinstance(method, TrainedMethod):
            continue
        sweep = config.method_sweep(method)
        overrides = sweep.search_space().overrides({"grid": _points(sweep)[0]})
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trial = sweep.to_recipe().instantiate(overrides, trainer_options={**options, **quiet})
        trial.trainer.fit(trial.model, datamodule=trial.datamodule)
        assert str(sweep.objective) in trial.trainer.callback_metrics, name
        checkpoint = tmp_path / folder_name(name)
        trial.trainer.save_checkpoint(checkpoint / CHECKPOINT)
        measure(_spec(config), measuring, config.folder, name="one", seed=0, checkpoint=str(checkpoint))
        found = Measured.from_parquet(config.folder.read_bytes("one") or b"")
        assert len(found.samples) == 4
        assert 0 < float(found.kl.mean()) < 100, name


def _spec(config: FrontierConfig) -> TrialSpec:
    shared = config.shared_sweep()
    parts = {"space": shared.search_space(), "objective": shared.goals(), "location": config.folder.location}
    return TrialSpec(recipe=shared.to_recipe(), cwd=str(Path.cwd()), **parts)


def test_each_seed_has_its_own_data() -> None:
    shipped = FrontierConfig.from_yaml(SHIPPED, storage="/tmp/x")
    sweep = shipped.method_sweep(shipped.picked_methods()["DPO"])
    for point in _points(sweep):
        chosen = sweep.search_space().overrides({"grid": point})
        assert chosen["data.train"] == f"/tmp/x/frontier/pairs/{chosen['seed_everything']}.jsonl"
        assert chosen["data.seed"] == chosen["seed_everything"]


def test_null_leaves_a_shared_value_out() -> None:
    shipped = FrontierConfig.from_yaml(SHIPPED)
    ppo = shipped.method_sweep(shipped.picked_methods()["PPO, true score"])
    assert "model.optimizer.momentum" not in ppo.overrides
    assert "trainer.gradient_clip_val" not in ppo.overrides


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": []}, "`seeds`"),
        ({"seeds": [1, 1]}, "`seeds`"),
        ({"kls": [0.0]}, "`kls`"),
        ({"prompts": 0}, "`prompts`"),
        ({"limit_policies": -1}, "`limit_policies`"),
        ({"limit_fits": -1}, "`limit_fits`"),
        ({"limit_fit_lr": 0.0}, "`limit_fit_lr`"),
        ({"limit_fits": 0}, "`best_of` of 'best-of-N' .* got 20000"),
        ({"kls": []}, "`kls` must name at least one KL"),
        ({"only": ["DPPO"]}, "did you mean 'DPO'"),
        ({"only": "DPPO"}, "did you mean 'DPO'"),
        ({"sweep": {"space": {}}}, "`sweep`"),
        ({"methods": {"DPO": {"strenght": {}}}}, "`methods`"),
    ],
)
def test_mistakes_in_a_comparison(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FrontierConfig.from_yaml(SHIPPED, **changes)


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["frontier", *arguments])
        return capsys.readouterr().err

    assert "`config` must be a YAML file" in error("--config", str(tmp_path / "none.yaml"))
    assert "did you mean 'DPO'" in error("--config", str(SHIPPED), "--only", "[DPPO]")
    assert "no_judge" in error("--config", str(SHIPPED), "--judge", "lightning_dpo.demo.grammar.no_judge")


@pytest.mark.heavy
def test_a_judge_that_gives_nan_is_named_before_anything_is_trained(
    cluster: None, config: FrontierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_judge.py").write_text(
        "def score(prompts, completions):\n    return [float('nan')] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    prepare_frontier(config.folder.location, [0], task=TINY)
    config.judge = "broken_judge.score"
    with pytest.raises(ValueError, match="`judge` must give finite scores, got nan from score"):
        run_frontier(config, verbose=False)
    assert not (Path(config.folder.location) / "methods").exists()
