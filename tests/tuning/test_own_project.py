from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_dpo.tuning import SweepConfig, sweep
from lightning_dpo.tuning.results.folder import load_result

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_project"


def test_the_example_is_short_and_its_project_knows_nothing_of_preferences() -> None:
    lines = (EXAMPLE / "tune.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 20
    assert "lightning_dpo" not in (EXAMPLE / "network.py").read_text()


@pytest.mark.heavy
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE / "tune.py"], cwd=tmp_path, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = load_result(str(tmp_path / "outputs/sweeps/curve"))
    assert len(result.trials) == 6
    assert result.reference_passes == 0
    errors = [t.metrics["val/error"] for t in result.trials if t.is_ranked]
    assert result.best.metrics["val/error"] == min(errors)
    assert len(set(errors)) == 6
    assert str(result.best.overrides["model.lr"])[:6] in done.stdout


@pytest.mark.heavy
def test_by_class_path_and_what_it_does_not_log(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    settings = {
        "space": {"model.lr": {"grid": [1e-4, 1e-2]}},
        "samples": 1,
        "module": "network.CurveModule",
        "data": "network.CurveData",
        "storage": str(tmp_path),
        "overrides": {"trainer.max_epochs": 1},
    }
    with pytest.raises(ValueError, match=r"did you mean 'model\.lr'"):
        sweep(SweepConfig(**{**settings, "space": {"model.lrr": 1}}))
    with pytest.raises(ValueError, match="did you mean 'val/error'"):
        sweep(SweepConfig(**settings, objective={"minimize": "val/eror"}, name="wrong"))
    result = sweep(SweepConfig(**settings, objective={"minimize": "val/error"}, name="right"), verbose=False)
    assert [trial.status for trial in result.trials] == ["finished"] * 2
    assert result.best.overrides["model.lr"] == 1e-2
