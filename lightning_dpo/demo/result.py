"""The result of the demonstration: what was measured, and the file of its figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_dpo.demo.measure import Agreement, Measurement
from lightning_dpo.demo.task import Task
from lightning_dpo.evaluation.frontier import FrontierPoint
from lightning_dpo.files import write_file

__all__ = ["DemoResult"]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        task: The prepared task.
        policy: Folder of the aligned model and its tokenizer, for `from_pretrained`.
        before: Reviews of the reference.
        after: Reviews of the policy.
        agreement: How the policy's implied rewards agree with held-out labels and true scores.
        validation_accuracy: The accuracy that the trainer logged; it equals `agreement.accuracy`.
        best: The best mean score that any policy has at this KL; its reward is in stars.
        seconds: Wall time of each stage.
    """

    task: Task
    policy: Path
    before: Measurement
    after: Measurement
    agreement: Agreement
    validation_accuracy: float
    best: FrontierPoint
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {
            "score": {"before": self.before.score._asdict(), "after": self.after.score._asdict()},
            "kl": self.after.kl._asdict(),
            "accuracy": self.agreement.accuracy,
            "bayes_accuracy": self.task.bayes_accuracy,
            "reward_correlation": self.agreement.correlation,
            "grammatical": {"before": self.before.grammatical, "after": self.after.grammatical},
            "best_at_kl": asdict(self.best),
            "seconds": self.seconds,
        }

    def save(self) -> None:
        """Write the figures to `result.json`, beside the task."""
        path = self.task.folder.parent / "result.json"
        write_file(path, json.dumps(self.summary(), indent=2) + "\n")
