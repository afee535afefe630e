"""What is known of a trial, written by itself at every report, so that nothing can be lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from lightning_dpo.tuning.storage import Storage

__all__ = ["Status", "TrialRecord", "load_records", "lost_to"]

Status: TypeAlias = Literal["running", "finished", "stopped", "diverged", "out of memory", "failed"]


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial of a sweep.

    Attributes:
        id: Ray's name for it.
        overrides: The values it set, by config path.
        status: "finished"; "stopped" by the scheduler; or what went wrong.
        reason: In words, where something went wrong.
        history: What it reported at each validation: metrics, step, epoch, seconds.
        starts: How often it was started: once, and again after each loss of its process.
        total_steps: Optimizer steps of a whole trial.
        startup_seconds: From the end of the trial before in the same process to the first step.
        reference_passes: Batches for which this trial itself ran the reference.
        checkpoint: Folder of its last checkpoint, in the sweep's storage.
    """

    id: str
    overrides: Mapping[str, Any]
    status: Status = "running"
    reason: str = ""
    history: tuple[Mapping[str, Any], ...] = ()
    starts: int = 0
    total_steps: int = 0
    startup_seconds: float | None = None
    reference_passes: int = 0
    checkpoint: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The last report."""
        return self.history[-1] if self.history else {}

    @property
    def step(self) -> int:
        """Optimizer steps at the last report."""
        return int(self.metrics.get("step", 0))

    @property
    def is_ranked(self) -> bool:
        """Whether it takes part in the ranking: trials that went wrong do not."""
        return self.status in ("finished", "stopped") and bool(self.history)

    def reported(self, metrics: Mapping[str, Any], **changes: Any) -> TrialRecord:
        """The record after one more report."""
        return replace(self, history=(*self.history, dict(metrics)), **changes)

    def restarted(self, saved: Mapping[str, Any] | None = None) -> TrialRecord:
        """The record at the start of a process, which goes on from a checkpoint where there is one.

        Args:
            saved: What was reported with the checkpoint. It is another trial's where that one's weights were
                taken over.
        """
        earlier = [entry for entry in self.history if saved is not None and entry["step"] < saved["step"]]
        kept = (*earlier, dict(saved)) if saved is not None else ()
        return replace(self, history=kept, starts=self.starts + 1, status="running", reason="")

    def save(self, storage: Storage) -> None:
        """Write it to the folder of records."""
        storage.write(f"{self.id}.json", json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, storage: Storage, trial: str) -> TrialRecord | None:
        """Read it; None where there is none."""
        text = storage.read(f"{trial}.json")
        if text is None:
            return None
        fields = json.loads(text)
        return cls(**{**fields, "history": tuple(fields["history"])})


def load_records(storage: Storage) -> list[TrialRecord]:
    """All records of a folder, in the order of their ids."""
    found = [TrialRecord.load(storage, name.removesuffix(".json")) for name in storage.names(".json")]
    return [record for record in found if record is not None]


def lost_to(error: str) -> tuple[Status, str]:
    """What became of a trial whose process Ray saw die, and why, from Ray's error."""
    if "OutOfMemory" in error or "out of memory" in error:
        return "out of memory", "the machine ran out of memory and Ray ended the process"
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return "failed", lines[-1].strip() if lines else "unknown"
