"""How a trial stands, from its start to its end."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["StoppedError", "TrialStatus"]


class StoppedError(BaseException):
    """A scheduler has stopped the trial; no `except Exception` on the way takes it for a failure."""


class TrialStatus(StrEnum):
    """State of a trial; the values are those of records on disk and of reports."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # by the scheduler
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended, well or not."""
        return self is not TrialStatus.RUNNING

    @property
    def is_ranked(self) -> bool:
        """Whether a trial that ended so takes part in the ranking."""
        return self in (TrialStatus.FINISHED, TrialStatus.STOPPED)

    @property
    def went_wrong(self) -> bool:
        """Whether the trial has ended without a result that counts."""
        return self.is_over and not self.is_ranked
