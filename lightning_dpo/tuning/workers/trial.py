"""A trial of several workers, driven from the process that Tune gave it."""

from __future__ import annotations

from ray import tune

from lightning_dpo.tuning.trial.ending import end_trial, outcome_of_dead_process, report_again
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
        if not _follow(group, spec, record):
            return
    except SystemExit:
        # A scheduler has stopped the trial, and this process is wanted for another one.
        group.stop_job()
        raise
    finally:
        group.end_job()
    ended = TrialRecord.load(spec.records, record.id)
    if ended is None:
        return
    if ended.status.went_wrong:
        report_again(spec.objective, ended)
    remove_spent(spec, record.id, [ended.checkpoint])


def _follow(group: Group, spec: TrialSpec, record: TrialRecord) -> bool:
    """Pass reports on to Tune until the workers are done; False where the trial was given up here."""
    failures = 0
    while True:
        event = group.next_event()
        if event.kind == "done":
            return True
        if event.kind == "report":
            tune.report(dict(event.metrics))
            group.answer_report(event.metrics["step"])
            continue
        known = TrialRecord.load(spec.records, record.id) or record
        if known.status.is_over:
            return True
        failures += event.counts
        if failures > spec.retries:
            # A worker that was killed leaves no record of its end.
            group.end_job()
            end_trial(spec, known, outcome_of_dead_process(event.error))
            remove_spent(spec, record.id, [known.checkpoint])
            return False
