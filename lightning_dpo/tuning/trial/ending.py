"""How a trial ends: what became of it, what its record says, and what Tune is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ray import tune

from lightning_dpo.tuning.objective import Objective
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["INTERRUPTED", "Outcome", "Session", "end_trial", "outcome_of_dead_process", "report_again"]

INTERRUPTED = "interrupted"
"""The reason of a trial that ran when a user ended the sweep; `--resume` goes on with it."""


class Session(Protocol):
    """Tune, as a trial sees it; `ray.tune` is one where the trial runs in the process that Tune gave it."""

    def get_checkpoint(self) -> Any:
        """The checkpoint that Tune has for the trial."""

    def report(self, metrics: Mapping[str, Any], *, checkpoint: Any = None) -> None:
        """Tell Tune, and wait until it has taken the report."""


class Outcome(NamedTuple):
    """How a training run ended.

    Attributes:
        status: Finished, or what went wrong.
        reason: In words, where something went wrong.
        traceback: Traceback of the error, where there was one.
    """

    status: TrialStatus
    reason: str = ""
    traceback: str = ""


def end_trial(
    spec: TrialSpec, record: TrialRecord, outcome: Outcome, *, session: Session | None = None
) -> None:
    """Record how a trial ended, and tell Tune of one that went wrong: it counts as the worst there is.

    Args:
        spec: What the sweep's trials have in common.
        record: What is known of the trial.
        outcome: How it ended.
        session: Takes what is told; None is Tune's of this process.
    """
    ended = record.ended(outcome.status, reason=outcome.reason, traceback=outcome.traceback)
    ended.save(spec.records)
    if ended.status.went_wrong:
        report_again(spec.objective, ended, session=session)


def report_again(objective: Objective, record: TrialRecord, *, session: Session | None = None) -> None:
    """Tell Tune of a trial that has ended: its last report, or the worst values where it went wrong.

    Args:
        objective: The sweep's goals.
        record: The trial.
        session: Takes what is told; None is Tune's of this process.
    """
    worst: dict[str, Any] = {goal.metric: goal.worst for goal in objective.goals}
    reason = {"reason": record.reason} if record.reason else {}
    (session or tune).report(
        {**record.last, **({} if record.is_ranked else worst), "status": str(record.status), **reason}
    )


def outcome_of_dead_process(error: str) -> Outcome:
    """What became of a trial whose process Ray saw die.

    Args:
        error: Text of Ray's error.
    """
    if "OutOfMemory" in error or "out of memory" in error:
        reason = "the machine ran out of memory and Ray ended the process"
        return Outcome(TrialStatus.OUT_OF_MEMORY, reason)
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return Outcome(TrialStatus.FAILED, lines[-1].strip() if lines else "unknown")
