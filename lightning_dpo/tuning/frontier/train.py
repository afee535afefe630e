"""Training one method of a frontier: a sweep over its strengths and the seeds."""

from __future__ import annotations

from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.frontier.methods import TrainedMethod, folder_name
from lightning_dpo.tuning.frontier.result import Failure
from lightning_dpo.tuning.frontier.sampling import Run
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.run import sweep
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["train_method"]


def train_method(method: TrainedMethod, config: SweepConfig) -> tuple[list[Run], list[Failure]]:
    """Train a method, or go on where an earlier run stopped, or read what it left.

    Args:
        method: The method.
        config: Its sweep.

    Returns:
        The policies, and what went wrong.
    """
    location = (Storage(config.storage) / str(config.name)).location
    try:
        if Storage(location).read("sweep.json") is None:
            sweep(config, resume=True, verbose=False)
    except ValueError as error:
        if Storage(location).read("sweep.json") is None:  # what is known of its trials is told one by one
            return [], [Failure(method.name, "all runs", str(error))]
    runs, failures = [], []
    for trial in load_result(location).trials:
        strength, seed = float(trial.overrides[method.path]), int(trial.overrides["seed_everything"])
        if trial.is_ranked and trial.checkpoint is not None:
            file = f"{folder_name(method.name)}/{trial.id}.parquet"
            runs.append(Run(method.name, strength, seed, file, trial.checkpoint))
        else:
            failures.append(Failure(method.name, f"{strength:g}, seed {seed}", _reason(trial)))
    return runs, failures


def _reason(trial: TrialRecord) -> str:
    return f"{trial.status}: {trial.reason or 'no reason was recorded'}"
