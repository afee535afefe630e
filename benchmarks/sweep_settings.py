"""What the sweeps of `benchmarks.trl_sweep` have in common, and what each of them gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["VARIANTS", "Outcome", "Settings"]

VARIANTS = {
    "ours": "this package's sweep",
    "trl": "TRL's DPOTrainer in a plain Ray Tune function",
    "trl-shared": "the same with precomputed reference log-probs, one cache of data and reused processes",
}


class Settings(NamedTuple):
    """A sweep over a grid, each trial one epoch.

    Attributes:
        model: Folder of the policy.
        train: JSON lines to train on.
        validation: JSON lines that are held out.
        batch_size: Pairs of a step, and of a validation batch.
        cpus: Of a trial.
        bf16: Mixed precision, and not float32.
        betas: Grid of beta.
        rates: Grid of learning rates.
        report_every: Steps from one validation to the next; 0 validates at the end alone.
        asha: Arguments of Ray's AsyncHyperBandScheduler; empty for no early stopping.
    """

    model: str
    train: str
    validation: str
    batch_size: int
    cpus: int
    bf16: bool
    betas: Sequence[float]
    rates: Sequence[float]
    report_every: int = 0
    asha: Mapping[str, Any] = {}

    @property
    def pairs(self) -> int:
        """Rows of both files."""
        return sum(len(Path(path).read_text().splitlines()) for path in (self.train, self.validation))

    def key(self, beta: float, rate: float) -> str:
        """Name of a point of the grid."""
        return f"{beta:g}, {rate:g}"


class Outcome(NamedTuple):
    """What a sweep did.

    Attributes:
        accuracies: Held-out accuracy of each trial, by "beta, learning rate".
        reference_pairs: Pairs that a reference scored, training and validation together.
        steps: Optimizer steps of all trials.
        pairs: Pairs of the work.
        trial_seconds: Mean seconds of each phase of a trial.
        sweep_seconds: Seconds of each phase of the process that drives the sweep, up to its last line.
    """

    accuracies: dict[str, float]
    reference_pairs: int
    steps: int
    pairs: int
    trial_seconds: dict[str, float]
    sweep_seconds: dict[str, float]
