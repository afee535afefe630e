"""What ranks that sample completions together say of their mean, and of how well it is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from monitor_jobs import monitored
from resume_jobs import source

from lightning_dpo.evaluation.kl import Estimate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_errors_are_those_of_the_mean_over_all_ranks(
    ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    models = source(tmp_path / "model"), source(tmp_path / "reference", seed=1)
    found = ranks.run(
        monitored, model=models[0], reference=models[1], folder=tmp_path / "run", strategy=strategy
    )
    for name in ("kl", "score"):
        own = [Estimate.of(rank.kl if name == "kl" else rank.scores) for rank in found]
        mean = sum(estimate.mean for estimate in own) / 2
        error = math.hypot(*(estimate.standard_error for estimate in own)) / 2
        assert error > 0
        for rank in found:
            assert rank.metrics[f"val/{name}"] == pytest.approx(mean, rel=1e-4)
            assert rank.metrics[f"val/{name}_error"] == pytest.approx(error, rel=1e-4)
