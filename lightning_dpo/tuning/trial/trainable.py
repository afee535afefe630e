"""The function that Ray Tune runs for each trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from lightning_dpo.tuning.trial.ending import report_again
from lightning_dpo.tuning.trial.one_process import run_in_one_process
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.trial import run_with_workers

__all__ = ["run_trial"]


def run_trial(config: Mapping[str, Any], *, spec: TrialSpec) -> None:
    """Run one trial, or report it again if it is known to have ended.

    Args:
        config: What the searcher chose.
        spec: What the sweep's trials have in common.
    """
    trial = tune.get_context().get_trial_id()
    record = spec.record(trial, config)
    if record.status.is_over:
        # A driver that was killed may not have heard of the end.
        report_again(spec.objective, record)
        return
    run = run_with_workers if spec.resources.workers > 1 else run_in_one_process
    run(spec, record)
