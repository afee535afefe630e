"""What is known of a trial, written by itself at every report, so that nothing can be lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.best_step import KeptStep
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["TrialRecord", "load_records"]

_TOTALS = ("total_steps", "startup_seconds", "reference_passes")
"""Of a report: what describes the whole trial."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial of a sweep.

    Attributes:
        id: Ray's name for it.
        overrides: The values it set, by config path.
        status: How it stands; its text will do.
        reason: In words, where something went wrong.
        history: What it reported at each validation: metrics, step, epoch, seconds.
        starts: How often it was started: once, and again after each time that its process died.
        total_steps: Optimizer steps of a whole trial.
        startup_seconds: From the end of the trial before in the same process to the first step.
        reference_passes: Batches for which this trial itself ran the reference.
        checkpoint: Folder of its last checkpoint, or of the step that it kept, in the sweep's storage.
        rerun_of: The trial whose values it runs with another seed; empty for a trial of the search.
        purpose: "repeat" or "confirm" then.
        kept: The step whose weights it keeps, where that is the best one and not the last.
        again: Steps that it had reported and ran again, since it went on from an older full state.
        enough: Whether it was stopped for having done what the sweep's `stop` asks for.
        extra: The machine it ran on, and the traceback where it went wrong.
    """

    id: str
    overrides: Mapping[str, Any]
    status: TrialStatus = TrialStatus.RUNNING
    reason: str = ""
    history: tuple[Mapping[str, Any], ...] = ()
    starts: int = 0
    total_steps: int = 0
    startup_seconds: float | None = None
    reference_passes: int = 0
    checkpoint: str | None = None
    rerun_of: str = ""
    purpose: str = ""
    kept: KeptStep | None = None
    again: int = 0
    enough: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take a status from its text, which is what files hold."""
        object.__setattr__(self, "status", TrialStatus(self.status))

    @property
    def last(self) -> Mapping[str, Any]:
        """The last report."""
        return self.history[-1] if self.history else {}

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the trial is ranked by and shown with: the last report, or that of the step that it kept."""
        return self.last if self.kept is None else self.kept.metrics

    @property
    def step(self) -> int:
        """Optimizer steps at the last report."""
        return int(self.last.get("step", 0))

    @property
    def model_step(self) -> int:
        """Optimizer steps of the model that is kept."""
        return self.step if self.kept is None else self.kept.step

    @property
    def is_ranked(self) -> bool:
        """Whether it takes part in the ranking: trials that went wrong do not."""
        return self.status.is_ranked and bool(self.history)

    @property
    def is_complete(self) -> bool:
        """Whether it ran to its end, or to the one that `stop` sets: its result is what its values give."""
        return self.is_ranked and (self.status is TrialStatus.FINISHED or self.enough)

    def reported(
        self, metrics: Mapping[str, Any], *, checkpoint: str | None = None, kept: KeptStep | None = None
    ) -> TrialRecord:
        """The record after one more report.

        Args:
            metrics: What is reported.
            checkpoint: Folder of the checkpoint that the trial now keeps; None leaves it as it was.
            kept: The step that it keeps, where that is the best one.
        """
        totals = {name: metrics[name] for name in _TOTALS}
        return replace(
            self,
            history=(*self.history, dict(metrics)),
            checkpoint=checkpoint or self.checkpoint,
            kept=kept or self.kept,
            **totals,
        )

    def restarted(self, saved: Mapping[str, Any] | None = None, *, is_own: bool = True) -> TrialRecord:
        """The record at the start of a process, which goes on from a checkpoint where there is one.

        Args:
            saved: What was reported with the checkpoint.
            is_own: Whether it is this trial's, and not another one's whose weights are taken over.
        """
        earlier = [entry for entry in self.history if saved is not None and entry["step"] < saved["step"]]
        kept = (*earlier, dict(saved)) if saved is not None else ()
        again = max(self.step - (0 if saved is None else int(saved["step"])), 0) if is_own else 0
        return replace(
            self,
            history=kept,
            starts=self.starts + 1,
            again=self.again + again,
            status=TrialStatus.RUNNING,
            reason="",
        )

    def ended(self, status: TrialStatus, *, reason: str = "", traceback: str = "") -> TrialRecord:
        """The record at the trial's end."""
        return replace(self, status=status, reason=reason, extra={**self.extra, "traceback": traceback})

    def save(self, storage: Storage) -> None:
        """Write it to the folder of records."""
        fields = asdict(self)
        if not self.rerun_of:  # as records of earlier versions are
            del fields["rerun_of"], fields["purpose"]
        for name in ("kept", "again", "enough"):
            if not fields[name]:
                del fields[name]
        storage.write(f"{self.id}.json", json.dumps(fields, indent=1))

    @classmethod
    def load(cls, storage: Storage, trial: str) -> TrialRecord | None:
        """Read it; None where there is none."""
        text = storage.read(f"{trial}.json")
        if text is None:
            return None
        fields = json.loads(text)
        kept = KeptStep(**fields["kept"]) if fields.get("kept") else None
        return cls(**{**fields, "history": tuple(fields["history"]), "kept": kept})


def load_records(storage: Storage) -> list[TrialRecord]:
    """All records of a folder, in the order of their ids."""
    found = [TrialRecord.load(storage, name.removesuffix(".json")) for name in storage.names(".json")]
    return [record for record in found if record is not None]
