"""Which of several training runs in one process runs now: one at a time, each with its own random states."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["Baton"]

_OF_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Where Lightning keeps the seed of a run."""


class Baton:
    """Passed from thread to thread, in the order in which they ask for it.

    Whoever has it finds the random states (torch, numpy, Python) and Lightning's seed as it left them: what a
    run draws does not depend on those beside it.
    """

    def __init__(self) -> None:
        """Begin with nobody who has it."""
        self._changed = threading.Condition()
        self._line: deque[object] = deque()  # the first one has it
        self._first_seed = _seed()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the baton and have it, with no seed of another run."""
        self._take()
        try:
            _set_seed(self._first_seed)
            yield
        finally:
            self._give()

    @contextmanager
    def put_down(self) -> Iterator[None]:
        """Let others have it for a while; it is taken again at the end."""
        seed = _seed()
        with isolate_rng():
            self._give()
            try:
                yield
            finally:
                self._take()
        _set_seed(seed)

    def pass_on(self) -> None:
        """Let those who wait for it go first."""
        if len(self._line) > 1:
            with self.put_down():
                pass

    def _take(self) -> None:
        place = object()
        with self._changed:
            self._line.append(place)
            self._changed.wait_for(lambda: self._line[0] is place)

    def _give(self) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()


def _seed() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _OF_SEEDS}


def _set_seed(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
