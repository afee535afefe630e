"""The process that packed trials share, as an actor.

Nothing heavy is imported here: the process that keeps account of all hosts would wait for it.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning_dpo.tuning.workers.mailbox import Event
    from lightning_dpo.tuning.workers.packed.fits import PackedFits

__all__ = ["HostUse", "PackHost"]

_PATIENCE_S = 1.0
"""How long a trial's process at Tune's waits before it asks anew, which shows that it lives."""


class HostUse(NamedTuple):
    """What a process was used for.

    Attributes:
        machine: Name of its machine.
        device: The device that its trials share.
        pid: Its number.
        trials: Trials that began in it.
        loads: Base models that it loaded.
    """

    machine: str
    device: str
    pid: int
    trials: int
    loads: int


class PackHost:
    """Trains several trials in turn, for their processes at Tune's, which only pass on what is said."""

    def __init__(self, *, gpu: str | None, threads: int | None) -> None:
        """Set up the process; torch is not imported before it has something to train.

        Args:
            gpu: Value of CUDA_VISIBLE_DEVICES, or None without a GPU.
            threads: For computations on the CPU; None leaves the environment as it is.
        """
        self._gpu = gpu
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._begun: set[str] = set()
        self._lock = threading.Lock()

    @cached_property
    def _fits(self) -> PackedFits:
        from lightning_dpo.tuning.workers.packed.fits import PackedFits

        return PackedFits()

    def begin(self, trial: str, config: Mapping[str, Any], spec: bytes, given: Any) -> None:
        """Start a trial.

        Args:
            trial: Its name.
            config: What Ray chose.
            spec: What the sweep's trials have in common, pickled.
            given: The checkpoint that Tune has for it.
        """
        with self._lock:
            fits = self._fits
            self._begun.add(trial)
        fits.begin(pickle.loads(spec), trial, config, given)

    def next_event(self, trial: str) -> Event | None:
        """What happens next in a trial; None where nothing does so soon."""
        return self._fits.seat(trial).next_event(_PATIENCE_S)

    def answer(self, trial: str) -> None:
        """Let a trial go on after its report."""
        self._fits.seat(trial).answer()

    def stop(self, trial: str) -> None:
        """Make a trial leave at its report, or at its next batch."""
        if trial in self._begun:
            self._fits.seat(trial).stop()

    def use(self) -> HostUse:
        """What this process was used for; it also shows that it lives."""
        device = "the CPU" if self._gpu is None else f"GPU {self._gpu}"
        loads = self._fits.loads if self._begun else 0
        return HostUse(os.uname().nodename, device, os.getpid(), len(self._begun), loads)
