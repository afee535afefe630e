"""A trial of one process, which trains within the process that Tune gave it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ray
from ray import tune

from lightning_dpo.tuning.trial.checkpoints import read_pointer, write_pointer
from lightning_dpo.tuning.trial.ending import Session, end_trial
from lightning_dpo.tuning.trial.fit import fit_trial, local_trainer_options
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import Saved
from lightning_dpo.tuning.trial.resume import Beginning, after_report, begin_from, begun, remove_spent
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import TrialStatus

__all__ = ["run_in_one_process"]


def run_in_one_process(
    spec: TrialSpec,
    record: TrialRecord,
    *,
    session: Session | None = None,
    callbacks: Sequence[pl.Callback] = (),
    trainer_options: Mapping[str, Any] | None = None,
) -> None:
    """Run a trial, from the full state that Tune points to, or that is on disk, if any.

    Tune keeps where the state is, not the state: what it is given it copies, and hands on to other trials.

    Args:
        spec: What the sweep's trials have in common.
        record: What is known of the trial.
        session: What it tells and asks; None is Tune's of this process, which is the trial's alone then.
        callbacks: Added after the trial's own.
        trainer_options: Take the place of the recipe's trainer arguments, beside those of every trial.
    """
    record = replace(record, extra={"node": ray.get_runtime_context().get_node_id()})
    is_alone = session is None
    told_to: Session = tune if session is None else session
    given = told_to.get_checkpoint()
    with _beginning(spec, record.id, given) as beginning:
        first = state = begun(spec, record, beginning)
        told = beginning.saved
        state.save(spec.records)

        def report(metrics: dict[str, Any], saved: Saved) -> None:
            nonlocal state
            assert saved.folder is not None
            state = after_report(spec, state, metrics, saved)
            state.save(spec.records)
            if not saved.folder.is_state:
                told_to.report(metrics)
                return
            with tempfile.TemporaryDirectory() as scratch:
                write_pointer(Path(scratch), record.id, saved.folder)
                told_to.report(metrics, checkpoint=tune.Checkpoint.from_directory(scratch))

        outcome = fit_trial(
            spec,
            record.overrides,
            report,
            trial=record.id,
            starts=first.starts,
            kept=first.kept,
            checkpoint=beginning.folder,
            trainer_options={**local_trainer_options(spec.resources), **(trainer_options or {})},
            callbacks=callbacks,
            is_alone=is_alone,
        )
    end_trial(spec, state, outcome, session=told_to)
    if not spec.checkpoint_plan.is_exchanged:
        remove_spent(spec, record.id, [state.checkpoint])
    if told is not None and state is first and outcome.status is TrialStatus.FINISHED:
        # Nothing was left to train: a scheduler paused the trial at its end, or with PBT the checkpoint is
        # the last one of another trial. To pause at a report that says so is too late.
        told_to.report({**told, "status": str(outcome.status)}, checkpoint=given)


@contextlib.contextmanager
def _beginning(spec: TrialSpec, trial: str, given: tune.Checkpoint | None) -> Iterator[Beginning]:
    """What training goes on from, given what Tune has for the trial."""
    if given is None:
        with begin_from(spec, trial) as beginning:
            yield beginning
        return
    with given.as_directory() as name:
        pointer = read_pointer(Path(name))
        if pointer is None:  # of an older sweep, where Tune holds the checkpoint itself
            yield Beginning(Path(name), trial, given.path)
            return
    with begin_from(spec, *pointer) as beginning:
        yield beginning
