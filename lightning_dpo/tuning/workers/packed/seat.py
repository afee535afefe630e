"""A trial's place in the process that it shares: what stands there for Tune's own session."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_dpo.tuning.trial.status import StoppedError
from lightning_dpo.tuning.workers.mailbox import Event
from lightning_dpo.tuning.workers.packed.baton import Baton

__all__ = ["Seat", "TakeTurns"]

_SILENCE_S = 60.0
"""A trial whose process at Tune's has not asked for so long has lost it."""


class Seat:
    """Passes what a trial reports to its process at Tune's, and what Tune decides back."""

    def __init__(self, baton: Baton, given: Any = None) -> None:
        """Begin without a report.

        Args:
            baton: Of the process.
            given: The checkpoint that Tune has for the trial.
        """
        self._baton = baton
        self._given = given
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._asked_at = time.monotonic()

    def get_checkpoint(self) -> Any:
        """What Tune has for the trial."""
        return self._given

    def report(self, metrics: Mapping[str, Any], *, checkpoint: Any = None) -> None:
        """Wait, without the baton, until Tune has taken a report.

        Raises:
            StoppedError: If the trial is not to go on.
        """
        self._events.put(Event("report", dict(metrics), checkpoint=checkpoint))
        with self._baton.put_down():
            goes_on = self._answers.get()
        if not goes_on:
            raise StoppedError

    def take_turns(self) -> None:
        """Let the other trials of the process have their turn.

        Raises:
            StoppedError: If the trial is not to go on.
        """
        if self._is_stopped.is_set() or time.monotonic() - self._asked_at > _SILENCE_S:
            raise StoppedError
        self._baton.pass_on()

    def end(self, event: Event) -> None:
        """Say that nothing follows any more."""
        self._events.put(event)

    def next_event(self, timeout: float) -> Event | None:
        """What the trial's process at Tune's has to know next; None where nothing happens within seconds."""
        self._asked_at = time.monotonic()
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            return None

    def answer(self) -> None:
        """Let the trial go on after its report."""
        self._asked_at = time.monotonic()
        self._answers.put(True)

    def stop(self) -> None:
        """Make the trial leave at its report, or at its next batch."""
        self._is_stopped.set()
        self._answers.put(False)


class TakeTurns(pl.Callback):
    """Lets the other trials of the process run after each batch."""

    def __init__(self, seat: Seat) -> None:
        """Say whose turns.

        Args:
            seat: The trial's.
        """
        self._seat = seat

    def on_train_batch_end(self, *_: Any) -> None:
        """Let others run, or leave if the trial was stopped."""
        self._seat.take_turns()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Let others run, or leave if the trial was stopped."""
        self._seat.take_turns()
