"""What each worker of a group runs: one trial after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import train

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.checkpoints import SavedFolder
from lightning_dpo.tuning.trial.fit import fit_trial
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import Saved
from lightning_dpo.tuning.trial.resume import Beginning, after_report, begin_from, begun
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import StoppedError, TrialStatus
from lightning_dpo.tuning.workers.mailbox import Job
from lightning_dpo.tuning.workers.strategies import worker_trainer_options

__all__ = ["worker_loop"]

_LOST_PEER = ("gloo", "closed by peer", "reset by peer", "DistBackendError", "DistNetworkError", "NCCL")
"""In the errors of a worker whose neighbour has died."""


def worker_loop(arguments: dict[str, Any]) -> None:
    """Train the trials that the mailbox has, until this process is ended.

    Args:
        arguments: The `spec` of the sweep's trials, and the `mailbox`.
    """
    spec, mailbox = arguments["spec"], arguments["mailbox"]
    rank = train.get_context().get_world_rank()
    number = 0
    while True:
        job: Job = ray.get(mailbox.next_job.remote(number))
        number = job.number
        with contextlib.suppress(StoppedError):
            _train(spec, mailbox, job, is_first=rank == 0)
        ray.get(mailbox.leave_job.remote(number, rank))


def _train(spec: TrialSpec, mailbox: Any, job: Job, *, is_first: bool) -> None:
    record = TrialRecord.load(spec.records, job.trial) or TrialRecord(job.trial, job.overrides)
    if record.status.is_over:
        return  # started again after a failure that would come again
    trial = _WorkersTrial(spec, mailbox, job, replace(record, overrides=job.overrides), is_first=is_first)
    options = worker_trainer_options(spec.resources)
    with _beginning(spec, trial.record) as beginning:
        trial.begin(beginning)
        outcome = fit_trial(
            spec,
            job.overrides,
            trial.report,
            trial=job.trial,
            starts=trial.record.starts,
            kept=trial.record.kept,
            checkpoint=beginning.folder,
            trainer_options=options,
        )
    is_finished = outcome.status is TrialStatus.FINISHED
    if outcome.status is TrialStatus.FAILED and any(word in outcome.reason for word in _LOST_PEER):
        raise RuntimeError(f"lost another worker: {outcome.reason}")
    if is_first or not is_finished:
        # The first worker keeps the record; another one that failed adds only that.
        known = None if is_first else TrialRecord.load(spec.records, job.trial)
        ended = known or trial.record
        ended.ended(outcome.status, reason=outcome.reason, traceback=outcome.traceback).save(spec.records)
    if not is_finished:
        # Where one worker leaves, the others may wait for it for ever: Ray ends them all.
        raise RuntimeError(f"{outcome.status}: {outcome.reason}")


class _WorkersTrial:
    """One worker's view of a trial: the record, which the first worker writes, and reports to the driver.

    Attributes:
        record: What is known of the trial.
    """

    def __init__(
        self, spec: TrialSpec, mailbox: Any, job: Job, record: TrialRecord, *, is_first: bool
    ) -> None:
        self.record = record
        self._spec = spec
        self._mailbox = mailbox
        self._job = job
        self._is_first = is_first

    def begin(self, beginning: Beginning) -> None:
        """Go on from a full state, where there is one."""
        self.record = begun(self._spec, self.record, beginning)
        if self._is_first:
            self.record.save(self._spec.records)

    def report(self, metrics: dict[str, Any], saved: Saved) -> None:
        """Note the report, tell the driver, and wait for its answer."""
        self.record = after_report(self._spec, self.record, metrics, saved)
        told = None
        if self._is_first:
            self.record.save(self._spec.records)
            told = {**metrics, "checkpoint_path": self.record.checkpoint}
        if not ray.get(self._mailbox.report.remote(self._job.number, metrics["step"], told)):
            raise StoppedError


@contextlib.contextmanager
def _beginning(spec: TrialSpec, record: TrialRecord) -> Iterator[Beginning]:
    """What training goes on from; of a sweep that an older version began, the checkpoint that Ray kept."""
    older = record.checkpoint
    if older is None or SavedFolder.parse(older.rpartition("/")[2]) is not None:
        with begin_from(spec, record.id) as beginning:
            yield beginning
        return
    filesystem = Storage(spec.location).ray_options().get("storage_filesystem")
    with train.Checkpoint(older, filesystem=filesystem).as_directory() as name:
        yield Beginning(Path(name), record.id, older)
