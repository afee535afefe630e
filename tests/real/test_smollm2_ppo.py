"""PPO on a real model and real prompts, by its recipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from smollm2 import FAST_PRECISION, HEAVY_AND_HERE, some_rows

from lightning_dpo.training.cli import DPOCLI

RECIPE = Path(__file__).parents[2] / "configs" / "ppo.yaml"

pytestmark = HEAVY_AND_HERE


def brevity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Minus the number of letters, in tens."""
    return [-len(text) / 10 for text in completions]


def test_some_steps(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "ppo_judges", SimpleNamespace(brevity=brevity))  # type: ignore[misc]
    cli = DPOCLI(
        args=[
            "fit",
            f"--config={RECIPE}",
            f"--trainer.precision={FAST_PRECISION}",
            "--model.judge=ppo_judges.brevity",
            "--model.max_new_tokens=8",
            "--model.minibatches=1",
            "--model.epochs_per_rollout=1",
            *some_rows(shared_data),
            "--data.validation_split=0.05",
            "--trainer.limit_train_batches=2",
            "--trainer.limit_val_batches=1",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
        ],
    )
    assert cli.trainer.global_step == 2
    metrics = cli.trainer.callback_metrics
    assert all(math.isfinite(float(value)) for value in metrics.values())
    assert -10 < metrics["train/rollout/score"] < 0
    assert abs(float(metrics["train/rollout/kl"])) < 5
