"""A trial of several workers, driven from the process that Tune gave it."""

from __future__ import annotations

from ray import tune

from lightning_dpo.tuning.trial.ending import end_trial, outcome_of_dead_process, report_again
from lightning_dpo.tuning.trial.record import TrialRecord
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
        reports = _follow(group, spec, record)
    except SystemExit:
        # A scheduler has stopped the trial, and this process is wanted for another one.
        group.stop_job()
        raise
    finally:
        group.end_job()
    ended = TrialRecord.load(spec.records, record.id)
    # A trial that a scheduler paused at its end has nothing left to report but that.
    if reports is not None and ended is not None and (ended.status.went_wrong or not reports):
        report_again(spec.objective, ended)


def _follow(group: Group, spec: TrialSpec, record: TrialRecord) -> int | None:
    """Pass reports on to Tune until the workers are done: how many; None where the trial was given up here."""
    failures = reports = 0
    while True:
        event = group.next_event()
        if event.kind == "done":
            return reports
        if event.kind == "report":
            reports += 1
            tune.report(dict(event.metrics))
            group.answer_report(event.metrics["step"])
            continue
        known = TrialRecord.load(spec.records, record.id) or record
        if known.status.is_over:
            return reports
        failures += event.counts
        if failures > spec.retries:
            # A worker that was killed leaves no record of its end.
            group.end_job()
            end_trial(spec, known, outcome_of_dead_process(event.error))
            return None
