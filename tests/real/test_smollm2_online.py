"""Online DPO of a real model on real prompts, by its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from smollm2 import FAST_PRECISION, HEAVY_AND_HERE, some_rows

from lightning_dpo.training.cli import DPOCLI

RECIPE = Path(__file__).parents[2] / "configs" / "online_dpo.yaml"

pytestmark = [*HEAVY_AND_HERE, pytest.mark.slow]


def test_it_ranks_its_own_completions(tmp_path: Path, shared_data: Path) -> None:
    cli = DPOCLI(
        args=[
            "fit",
            f"--config={RECIPE}",
            f"--trainer.precision={FAST_PRECISION}",
            "--model.judge=online_jobs.vowels",
            "--model.max_new_tokens=16",
            "--model.refresh_every=2",
            "--model.optimizer.lr=1e-5",
            *some_rows(shared_data),
            f"--data.cache_dir={tmp_path / 'cache'}",
            "--trainer.max_steps=3",
            "--trainer.limit_val_batches=1",
            "--trainer.val_check_interval=3",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert cli.trainer.global_step == 3
    assert cli.model.plan().layout == "shared"
    metrics = cli.trainer.callback_metrics
    names = set(cli.model.logged_metrics())
    by_length = {"val/rewards/accuracy_chosen_longer", "val/rewards/accuracy_chosen_shorter"}
    assert names - set(metrics) < by_length  # one batch of two pairs need not have both kinds
    assert all(torch.isfinite(metrics[name]) for name in names & set(metrics))
    assert metrics["train/score"] > 0
    assert 1 < metrics["train/completion_length"] <= 16
    assert metrics["train/ties"] < 1
    moved = dict(cli.model.policy.named_parameters())
    assert any(
        not torch.equal(p, moved[n]) for n, p in cli.model.reference_model.named_parameters() if n in moved
    )
