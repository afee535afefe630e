from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_task import tiny_task_config

from lightning_dpo.demo.sweep import demo_sweep_config, run_demo_sweep
from lightning_dpo.tuning import SweepConfig

SWEEP = Path(__file__).parents[2] / "tuning" / "demo.yaml"


def test_the_file_and_the_function_are_the_same_sweep() -> None:
    assert SweepConfig.from_yaml(SWEEP) == demo_sweep_config("outputs/demo")


@pytest.mark.heavy
def test_the_demonstration_sweeps(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tiny_task_config()
    result = run_demo_sweep(output=tmp_path, task=small, samples_per_prompt=16)
    assert len(result.trials) == 8
    assert {trial.status for trial in result.trials} <= {"finished", "stopped"}
    assert result.reference_passes == 1
    assert Path(result.report_path).is_file()
    assert all("val/kl" in trial.metrics for trial in result.trials)
    figures = json.loads((tmp_path / "result.json").read_text())
    assert figures["accuracy"] == pytest.approx(result.best.metrics["val/rewards/accuracy"], abs=1e-6)
    assert figures["score"]["after"]["mean"] > figures["score"]["before"]["mean"]
    shown = capsys.readouterr().out
    assert "reference passes: 1 for 8 trials" in shown
    assert result.report_path in shown
