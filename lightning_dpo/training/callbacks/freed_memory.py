"""Memory that training on a CPU frees in one step and takes again in the next stays with the process."""

from __future__ import annotations

import ctypes
import os
import sys

import lightning.pytorch as pl

__all__ = ["KeepFreedMemory", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST = 2**31 - 1
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


class KeepFreedMemory(pl.Callback):
    """Calls `keep_freed_memory` before training on a CPU."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before training on a CPU."""
        if stage == "fit" and trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()


def keep_freed_memory() -> bool:
    """Make glibc hand freed memory out again where it would give it back to the system.

    Activations and gradients are freed at the end of a step; memory that is asked for anew is mapped and
    zeroed page by page, up to half a million pages in a step of SmolLM2-135M. The peak rises a little, for
    what was freed lies in pieces (3 % there, and no more from step to step), and what was freed is free for
    this process alone, until it ends.

    Returns:
        Whether it does so from now on: not on a system without glibc, and not where the environment has
        settings of its own for it (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_MAX_`, `MALLOC_MMAP_THRESHOLD_`,
        `GLIBC_TUNABLES`).
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(setting, value) == 1 for setting, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST))
    )
