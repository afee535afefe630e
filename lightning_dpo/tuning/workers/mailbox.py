"""Where the process that drives trials meets the workers that train them: jobs go one way, reports the other.

Nothing heavy is imported here: Ray's controller and the mailbox's own process would wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ray.train import UserCallback

__all__ = ["Event", "Job", "Mailbox", "ReportWorkerFailures"]


class Job(NamedTuple):
    """A trial to train.

    Attributes:
        number: Counts the group's jobs, from 1.
        trial: Its id.
        overrides: Its values by config path.
    """

    number: int
    trial: str
    overrides: Mapping[str, Any]


class Event(NamedTuple):
    """What the driver has to know of a job.

    Attributes:
        kind: "report" asks whether to go on; "done" comes when all workers have left the job; "failed" when
            one of them failed, and Ray starts them all again.
        metrics: Values of a report.
        error: Text of a failure.
        counts: Whether the failure is one of those that `retries` bounds: that of a spot machine is not.
        checkpoint: What Tune is given with a report, where it is given something.
    """

    kind: Literal["report", "done", "failed"]
    metrics: Mapping[str, Any] = {}
    error: str = ""
    counts: bool = True
    checkpoint: Any = None


class Mailbox:
    """Passes jobs to the workers of one group, and their reports to the driver; runs as an actor."""

    def __init__(self, workers: int) -> None:
        """Begin without a job.

        Args:
            workers: How many the group has.
        """
        self._workers = workers
        self._changed = asyncio.Condition()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._number = 0
        self._job: Job | None = None
        self._answered: set[int] = set()
        self._left: set[int] = set()
        self._is_stopped = False

    async def begin_job(self, trial: str, overrides: Mapping[str, Any]) -> None:
        """Give the workers a job."""
        async with self._changed:
            self._number += 1
            self._job = Job(self._number, trial, overrides)
            self._events, self._answered, self._left = asyncio.Queue(), set(), set()
            self._is_stopped = False
            self._changed.notify_all()

    async def end_job(self) -> None:
        """Take the job back: workers that start again wait for the next one."""
        async with self._changed:
            self._job = None
            self._changed.notify_all()

    async def next_event(self) -> Event:
        """Wait for what the driver has to know next."""
        return await self._events.get()

    async def answer_report(self, step: int) -> None:
        """Let the workers go on after their report of this step."""
        async with self._changed:
            self._answered.add(step)
            self._changed.notify_all()

    async def stop_job(self) -> None:
        """Make the workers leave the job at the report that they wait with, or at their next one."""
        async with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    async def next_job(self, after: int) -> Job:
        """Wait for a job that follows one; a worker that was started again passes 0 and may get the same."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._job is not None and self._job.number > after)
            assert self._job is not None
            return self._job

    async def report(self, number: int, step: int, metrics: Mapping[str, Any] | None) -> bool:
        """Whether to go on after a report; every worker asks, and one of them brings the metrics."""
        async with self._changed:
            if metrics is not None and step not in self._answered:
                self._events.put_nowait(Event("report", metrics))
            await self._changed.wait_for(
                lambda: self._is_stopped or not self._is_at(number) or step in self._answered
            )
            return self._is_at(number) and not self._is_stopped

    async def leave_job(self, number: int, rank: int) -> None:
        """A worker has ended its part of a job."""
        if self._is_at(number):
            self._left.add(rank)
            if len(self._left) == self._workers:
                self._events.put_nowait(Event("done"))

    async def ended(self) -> None:
        """Never return: this call fails when the mailbox is gone."""
        await asyncio.Event().wait()

    async def worker_failed(self, error: str, *, counts: bool) -> None:
        """A worker has failed."""
        self._left.clear()
        self._events.put_nowait(Event("failed", error=error, counts=counts))

    def _is_at(self, number: int) -> bool:
        return self._job is not None and self._job.number == number


class ReportWorkerFailures(UserCallback):
    """Tells the mailbox, from Ray's controller, which workers failed and why."""

    def __init__(self, mailbox: Any) -> None:
        """Say where failures go.

        Args:
            mailbox: Ray's handle of the group's mailbox.
        """
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Send the errors on; that of a worker that died comes last, for the others' may follow from it."""
        errors = sorted(worker_exceptions.values(), key=lambda error: hasattr(error, "health_check_failure"))
        causes = [getattr(error, "health_check_failure", error) for error in errors]
        is_spot = any(getattr(cause, "preempted", False) for cause in causes)
        self._mailbox.worker_failed.remote("\n".join(str(error) for error in errors), counts=not is_spot)
