"""Trials of several workers: a group of processes that trains one model, driven from within the trial."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from lightning_dpo.tuning.trial.fit import Outcome, TrialPlan
from lightning_dpo.tuning.trial.record import TrialRecord, lost_to
from lightning_dpo.tuning.workers.group import Group, make_trainer
from lightning_dpo.tuning.workers.loop import train_once

__all__ = ["run_once", "run_workers"]

_group: Group | None = None
"""Of the trial before in this process: starting one takes longer than a short trial."""


def run_workers(plan: TrialPlan, record: TrialRecord) -> None:
    """Run a trial on a group of workers; a lost worker makes the group start again from its checkpoint.

    Args:
        plan: The sweep.
        record: What is known of the trial.
    """
    global _group
    if _group is None or not _group.serves(plan):
        _group = Group(plan)
    group = _group
    group.begin(record.id, record.overrides)
    try:
        if not _follow(group, plan, record):
            return
    except SystemExit:
        # A scheduler has stopped the trial, and this process is wanted for another one.
        group.stop()
        raise
    finally:
        group.end()
    ended = TrialRecord.load(plan.records, record.id)
    if ended is not None and ended.status not in ("running", "finished"):
        worst = {goal.metric: goal.worst for goal in plan.objective.goals}
        tune.report({**ended.metrics, **worst, "status": ended.status})


def _follow(group: Group, plan: TrialPlan, record: TrialRecord) -> bool:
    """Pass reports on to Tune until the workers are done; False where the trial was given up here."""
    losses = 0
    while True:
        event = group.event()
        if event.kind == "done":
            return True
        if event.kind == "report":
            tune.report(dict(event.metrics))
            group.go_on(event.metrics["step"])
            continue
        known = TrialRecord.load(plan.records, record.id) or record
        if known.status not in ("running", "stopped"):
            return True
        losses += event.counts
        if losses > plan.retries:
            from lightning_dpo.tuning.trial.trainable import finish

            # A worker that was killed leaves no record of its end.
            group.end()
            finish(plan, known, Outcome(*lost_to(event.error)))
            return False


def run_once(plan: TrialPlan, trainer_options: Mapping[str, Any]) -> None:
    """Run the recipe on a group of workers, outside of any trial, on as many machines as there are.

    Args:
        plan: The sweep.
        trainer_options: Take the place of the recipe's trainer arguments.
    """
    arguments = {"plan": plan, "options": dict(trainer_options)}
    trainer = make_trainer(plan, train_once, arguments, name="prepare", retries=plan.retries, is_spread=True)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        try:
            trainer.fit()
        except ray.exceptions.ActorDiedError:
            trainer.fit()  # Ray's controller did not come to life
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # which Ray takes, and keeps
