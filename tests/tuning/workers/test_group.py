from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig, sweep


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_trial_of_two_workers(cluster: None, project: Path, strategy: str) -> None:
    config = SweepConfig(
        space={"model.optimizer.lr": {"grid": [1e-3]}},
        samples=1,
        workers=2,
        cpus=0.9,
        strategy=strategy,
        kl_prompts=1 if strategy == "ddp" else 0,
        kl_tokens=4,
        name=strategy,
        **settings(project, overrides={"trainer.val_check_interval": 1, "data.batch_size": 4}),
    )
    result = sweep(config, verbose=False)
    (trial,) = result.trials
    assert trial.status == "finished", (trial.reason, trial.extra)
    # 24 pairs in steps of two times four; with one process there would be six steps.
    assert [entry["step"] for entry in trial.history] == [1, 2, 3]
    assert trial.total_steps == 3
    assert trial.metrics["val/logratio/margin"] != 0
    assert result.reference_passes == 1
    assert ("val/kl" in trial.metrics) == (strategy == "ddp")
    assert trial.checkpoint is not None
    assert Path(trial.checkpoint).exists()
    if strategy == "ddp":
        weights = torch.load(Path(trial.checkpoint) / "trial.ckpt", weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())
        assert result.model is not None
