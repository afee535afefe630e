"""Which trials share which process: a process for each device, and more where one is full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_dpo.tuning.workers.packed.host import HostUse, PackHost

__all__ = ["Packs"]

_CALLS = 4
"""Calls that a trial may have at its process at the same time."""


@dataclass(slots=True)
class _Host:
    actor: Any
    place: tuple[str, str | None]
    trials: set[str] = field(default_factory=set)


class Packs:
    """Keeps account of the processes that trials share; runs as an actor, with which they end."""

    def __init__(self, seats: int, threads: int | None) -> None:
        """Begin with no process.

        Args:
            seats: Trials that share one.
            threads: For computations on the CPU in each; None leaves the environment as it is.
        """
        self._seats = seats
        self._threads = threads
        self._hosts: list[_Host] = []

    def join(self, trial: str, node: str, gpu: str | None) -> Any:
        """The process that trains a trial, as an actor's handle: that of others on its device, or a new one.

        Args:
            trial: Its name.
            node: Ray's name of the machine that Tune placed it on.
            gpu: Value of CUDA_VISIBLE_DEVICES there, or None without a GPU.
        """
        for other in self._hosts:
            if trial in other.trials and other.place != (node, gpu):
                other.actor.stop.remote(trial)  # its process at Tune's has died, and Tune placed it elsewhere
                other.trials.discard(trial)
        self._hosts = [host for host in self._hosts if host.place != (node, gpu) or _lives(host)]
        here = [host for host in self._hosts if host.place == (node, gpu)]
        host = next((one for one in here if trial in one.trials), None)
        host = host or next((one for one in here if len(one.trials) < self._seats), None)
        if host is None:
            host = self._start(node, gpu)
            self._hosts.append(host)
        host.trials.add(trial)
        return host.actor

    def leave(self, trial: str) -> None:
        """A trial's seat is free."""
        for host in self._hosts:
            host.trials.discard(trial)

    def uses(self) -> list[HostUse]:
        """What the processes that live were used for."""
        return ray.get([host.actor.use.remote() for host in self._hosts if _lives(host)])

    def _start(self, node: str, gpu: str | None) -> _Host:
        # What it takes of the machine is what Tune reserved for its trials.
        options = {
            "num_cpus": 0,
            "max_concurrency": _CALLS * self._seats,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        actor: Any = ray.remote(PackHost).options(**options).remote(gpu=gpu, threads=self._threads)
        return _Host(actor, (node, gpu))


def _lives(host: _Host) -> bool:
    try:
        ray.get(host.actor.use.remote())
    except ray.exceptions.RayActorError:
        return False
    return True
