from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from sweep_faults import BROKEN, DIVERGED, EXHAUSTED, KILLED
from sweep_project import settings
from transformers import AutoModelForCausalLM

from lightning_dpo.cli.main import main
from lightning_dpo.training.cli import DPOCLI
from lightning_dpo.tuning import SweepConfig, SweepResult, sweep
from lightning_dpo.tuning.results.folder import load_result

SIMPO = {"model.loss.class_path": "lightning_dpo.losses.SimPOLoss", "model.reference": "none"}
SPACE = {"model.loss.beta": {"loguniform": [0.01, 0.5]}, "model.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}


@pytest.fixture(scope="module")
def result(cluster: None, project: Path) -> SweepResult:
    config = SweepConfig(
        space=SPACE,
        samples=5,
        search="optuna",
        objective={"maximize": "val/rewards/accuracy", "minimize": "val/kl"},
        kl_prompts=2,
        kl_tokens=4,
        concurrency=1,
        name="plain",
        **settings(project),
    )
    return sweep(config)


@pytest.mark.heavy
class TestResult:
    def test_trials(self, result: SweepResult) -> None:
        assert len(result.trials) == 5
        for trial in result.trials:
            assert trial.status == "finished", trial.reason
            assert trial.starts == 1
            assert [entry["step"] for entry in trial.history] == [2, 4, 6]
            assert 0.01 <= trial.overrides["model.loss.beta"] <= 0.5
        values = [trial.metrics["val/rewards/accuracy"] for trial in result.trials]
        assert values == sorted(values, reverse=True)
        assert result.best.metrics["val/rewards/accuracy"] == max(values)
        assert len({trial.overrides["model.optimizer.lr"] for trial in result.trials}) == 5

    def test_the_reference_is_computed_once(self, result: SweepResult) -> None:
        assert result.reference_passes == 1
        assert all(trial.reference_passes == 0 for trial in result.trials)

    def test_trials_follow_each_other_in_a_warm_process(self, result: SweepResult) -> None:
        # The first trial of a process counts from its own start; the bound holds for all those after it.
        assert sorted(trial.startup_seconds for trial in result.trials)[2] < 2

    def test_the_frontier(self, result: SweepResult) -> None:
        assert result.frontier
        for trial in result.frontier:
            beaten_by = [
                other
                for other in result.trials
                if other.metrics["val/rewards/accuracy"] >= trial.metrics["val/rewards/accuracy"]
                and other.metrics["val/kl"] < trial.metrics["val/kl"]
            ]
            assert not beaten_by

    def test_the_best_recipe_gives_the_same_again(
        self, result: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = Path(result.location) / "best/config.yaml"
        cli = DPOCLI(args=["fit", f"--config={config}", "--trainer.accelerator=cpu"])
        for name in ("val/rewards/accuracy", "val/logratio/margin", "val/loss"):
            again = float(cli.trainer.callback_metrics[name])
            assert again == pytest.approx(result.best.metrics[name], rel=1e-3), name
        exported = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
        torch.testing.assert_close(exported, cli.model.policy.state_dict(), rtol=1e-3, atol=1e-4)

    def test_the_table_of_results(self, result: SweepResult) -> None:
        table = pq.read_table(Path(result.location) / "results.parquet").to_pandas()
        assert len(table) == 15
        best = table[(table.trial == result.best.id) & (table.step == 6)].iloc[0]
        assert best["val/kl"] == result.best.metrics["val/kl"]
        assert best["config/model.loss.beta"] == result.best.overrides["model.loss.beta"]

    def test_the_report_is_one_file_with_everything(
        self, result: SweepResult, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Path(result.report_path)
        before = path.read_text()
        path.unlink()
        main(["report", result.location])
        assert str(path) in capsys.readouterr().out
        text = path.read_text()
        assert text == before
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', text)
        specs = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)[1])
        kinds = [{trace["type"] for trace in spec["data"]} for spec in specs]
        trade_off, differences, movement, space, curves, coordinates, steps = kinds
        assert trade_off == differences == movement == curves == {"scatter"}
        assert (space, coordinates, steps) == ({"heatmap", "scatter"}, {"parcoords"}, {"bar"})
        pareto = next(trace for trace in specs[0]["data"] if trace["name"] == "Pareto set")
        assert len(pareto["x"]) == len(result.frontier)
        assert all(trial.id in text for trial in result.trials)
        assert "reference passes" in text
        assert "class_path: lightning_dpo.losses.DPOLoss" in text

    def test_it_loads_again(self, result: SweepResult) -> None:
        loaded = load_result(result.location)
        assert loaded.trials == result.trials
        assert loaded.frontier == result.frontier
        assert loaded.recipe == result.recipe

    def test_the_folder_is_not_written_over(self, result: SweepResult, project: Path) -> None:
        with pytest.raises(ValueError, match="--resume"):
            sweep(SweepConfig(space=SPACE, name="plain", **settings(project)))


@pytest.mark.heavy
def test_trials_that_go_wrong_are_marked_and_the_sweep_goes_on(
    cluster: None, project: Path, tmp_path: Path
) -> None:
    twin = KILLED + 1e-9
    trouble = {"class_path": "sweep_faults.Trouble", "init_args": {"marker": str(tmp_path / "killed")}}
    config = SweepConfig(
        space={"model.loss.beta": {"grid": [KILLED, twin, EXHAUSTED, DIVERGED, BROKEN]}},
        samples=1,
        search="grid",
        concurrency=1,
        name="faults",
        **settings(project, overrides={"trainer.callbacks": [trouble], "model.optimizer.lr": 1e-3}),
    )
    result = sweep(config, verbose=False)
    by_beta = {trial.overrides["model.loss.beta"]: trial for trial in result.trials}
    assert by_beta[EXHAUSTED].status == "out of memory"
    assert by_beta[DIVERGED].status == "diverged"
    assert "not finite at step" in by_beta[DIVERGED].reason
    assert by_beta[BROKEN].status == "failed"
    assert "a mistake of one's own" in by_beta[BROKEN].reason
    assert all(by_beta[beta].starts == 1 for beta in (twin, EXHAUSTED, DIVERGED, BROKEN))
    killed, undisturbed = by_beta[KILLED], by_beta[twin]
    assert (tmp_path / "killed").exists()
    assert (killed.status, killed.starts) == ("finished", 2)
    assert [entry["step"] for entry in killed.history] == [2, 4, 6]
    for name, value in undisturbed.metrics.items():
        if name.startswith("val/"):
            assert killed.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert {trial.status for trial in result.trials[:2]} == {"finished"}
    assert "out of memory" in Path(result.report_path).read_text()


@pytest.mark.heavy
def test_asha_stops_trials_within_the_epoch(cluster: None, project: Path) -> None:
    # A learning rate of 0 leaves accuracy at chance; one of these trials must be stopped at a rung.
    config = SweepConfig(
        space={"model.optimizer.lr": {"grid": [3e-3, 1e-3, 0.0, 0.0, 0.0]}},
        objective="val/logratio/margin",
        samples=1,
        search="grid",
        scheduler={"class_path": "asha", "init_args": {"reduction_factor": 2}},
        concurrency=1,
        export=False,
        name="asha",
        **settings(project),
    )
    result = sweep(config, verbose=False)
    stopped = [trial for trial in result.trials if trial.status == "stopped"]
    assert stopped
    assert all(trial.step < trial.total_steps == 6 for trial in stopped)
    assert result.best.status == "finished"
    assert result.best.overrides["model.optimizer.lr"] > 0
    assert "stopped" in Path(result.report_path).read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"model.loss.betta": {"uniform": [0, 1]}}}, "did you mean 'model.loss.beta'"),
        ({"objective": {"minimize": "val/loss"}}, "units of the loss"),
        ({"objective": "val/acuracy"}, "did you mean"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml"),
        (
            {"keep": "best", "scheduler": "pbt"},
            "`keep: best` needs trials whose steps are their own, got pbt",
        ),
        (
            {"keep": "best", "objective": {"minimize": "val/kl"}, "kl_prompts": 1},
            "`keep: best` needs an objective that is measured for each validation pair, got 'val/kl'",
        ),
        ({"objective": "val/score", "kl_prompts": 1}, "set `kl_prompts` and `judge`"),
        (
            {"objective": "val/score", "kl_prompts": 1, "judge": "judges.longer"},
            "compares two completions and scores none: take 'val/win_rate'",
        ),
        ({"kl_prompts": 1, "judge": "judges.taller"}, "judges has no 'taller'"),
        (
            {"kl_prompts": 1, "judge": {"class_path": "judges.Letter"}},
            "`judge` judges.Letter does not take {}",
        ),
        (
            {"kl_prompts": 1, "judge": "judges.vowels", "keep": "best", "objective": "val/score"},
            "measured for each validation pair, got 'val/score'",
        ),
        (
            {"overrides": {**SIMPO}, "objective": {"minimize": "val/kl"}, "kl_prompts": 1},
            "val/kl is measured against the reference, and `model.reference` is none",
        ),
        (
            {"overrides": {**SIMPO}, "judge": "judges.longer", "kl_prompts": 1},
            "judge is measured against the reference",
        ),
        ({"scheduler": "hyperband", "full_state_every": 3}, "`full_state_every` must be 1 with HyperBand"),
        ({"overrides": {"data.validation_split": None}}, "`data.validation_split`, got neither"),
        ({"overrides": {"trainer.max_epoch": 1}}, "did you mean 'trainer.max_epochs'"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    changes: dict[str, Any], words: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the cluster was asked for")

    monkeypatch.setattr(sys.modules["lightning_dpo.tuning.run"], "connected", refuse)
    given = {**settings(project), "space": SPACE, "name": "mistake"}
    given["overrides"] = {**given["overrides"], **changes.pop("overrides", {})}
    with pytest.raises(ValueError, match=words):
        sweep(SweepConfig(**{**given, **changes}))
    assert not (project / "sweeps/mistake").exists()
