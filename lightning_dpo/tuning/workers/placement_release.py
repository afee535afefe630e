"""Gives back the machines' resources that a group of workers held when the process that drove it is gone.

Ray keeps a placement group for as long as its job lives, not its creator; its own cleaner asks the dashboard,
which not every cluster has.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

__all__ = ["PlacementReleaser"]

_SECONDS = 0.5


class PlacementReleaser:
    """Watches a group's mailbox, which ends with its driver; runs as an actor that outlives both."""

    def __init__(self, mailbox: Any) -> None:
        """Start watching.

        Args:
            mailbox: Ray's handle of the group's mailbox.
        """
        self._mailbox = mailbox
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def wait(self) -> None:
        """Return when the group is gone; whoever calls this need not stay."""
        self._is_over.wait()
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def _watch(self) -> None:
        placement = None
        pause = threading.Event()
        try:
            while True:
                placement = ray.get(self._mailbox.placement.remote()) or placement
                pause.wait(_SECONDS)
        except ray.exceptions.RayActorError:
            if placement is not None:
                remove_placement_group(placement)
        finally:
            self._is_over.set()
