"""A trial of several workers, driven from the process that Tune gave it."""

from __future__ import annotations

from ray import tune

from lightning_dpo.tuning.trial.ending import Outcome, end_trial, outcome_of_dead_process, report_again
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.resume import remove_spent
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.group import Group

__all__ = ["run_with_workers"]

_group: Group | None = None
"""Of the trial before in this process: starting one takes longer than a short trial."""


def run_with_workers(spec: TrialSpec, record: TrialRecord) -> None:
    """Run a trial on a group of workers; where one dies the group starts again from the checkpoint.

    Args:
        spec: What the sweep's trials have in common.
        record: What is known of the trial.
    """
    global _group
    if _group is None or not _group.trains(spec):
        _group = Group(spec)
    group = _group
    group.begin_job(record.id, record.overrides)
    try:
        reports, given_up = _follow(group, spec, record)
    except SystemExit:
        # A scheduler has stopped the trial, and this process is wanted for another one.
        group.stop_job()
        raise
    finally:
        group.end_job()
    ended = TrialRecord.load(spec.records, record.id) or record
    remove_spent(spec, record.id, [ended.checkpoint])
    if given_up is not None:
        end_trial(spec, ended, given_up)
    elif ended.status.went_wrong or (ended.status.is_over and not reports):
        # A trial that a scheduler paused at its end has nothing left to report but that.
        report_again(spec.objective, ended)


def _follow(group: Group, spec: TrialSpec, record: TrialRecord) -> tuple[int, Outcome | None]:
    """Pass reports on to Tune until the workers are done.

    Returns:
        How many there were; and, where the trial was given up here, how it ended: a worker that was killed
        leaves no record of that.
    """
    failures = reports = 0
    while True:
        event = group.next_event()
        if event.kind == "done":
            return reports, None
        if event.kind == "report":
            reports += 1
            tune.report(dict(event.metrics))
            group.answer_report(event.metrics["step"])
            continue
        known = TrialRecord.load(spec.records, record.id) or record
        if known.status.is_over:
            return reports, None
        failures += event.counts
        if failures > spec.retries:
            return reports, outcome_of_dead_process(event.error)
