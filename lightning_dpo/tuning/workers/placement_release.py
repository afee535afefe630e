"""Gives back the machines' resources that a group of workers held when the process that drove it is gone.

Ray keeps a placement group whose creator is dead for as long as the job lives, unless the creator is a
detached actor. That of a trial's workers is made by an actor of Ray Train's, and a sweep is one job. Ray
Train's cleaner asks the dashboard, which not every cluster has, and is told of a group only once all workers
have started.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

__all__ = ["PlacementReleaser", "orphaned_placements"]

_SECONDS = 10.0
"""That Ray may take to notice that the creator is dead too."""


class PlacementReleaser:
    """A detached actor: outlives a group's mailbox, which ends with its driver, and cleans up after both."""

    def watch(self, mailbox: Any) -> None:
        """Release what is left when the group is gone; whoever calls this need not stay.

        Args:
            mailbox: Ray's handle of the group's mailbox.
        """
        try:
            ray.get(mailbox.ended.remote())
        except ray.exceptions.RayActorError:
            until = time.monotonic() + _SECONDS
            while time.monotonic() < until:
                for placement in orphaned_placements():
                    remove_placement_group(placement)
                time.sleep(0.5)
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]


def orphaned_placements() -> list[PlacementGroup]:
    """Placement groups of this job whose creator was an actor and is dead."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    placement_group_table()  # connects; what it returns leaves the creator out
    # Ray 2.50 to 2.60 name it in these two ways.
    known: Any = state
    accessor = getattr(known, "_global_state_accessor", None) or known.global_state_accessor
    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]  # made when it is imported
    found = []
    for content in accessor.get_placement_group_table():
        group = table.FromString(content)
        is_of_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        is_orphan = is_of_actor and group.creator_actor_dead and not group.is_detached
        if is_orphan and group.creator_job_id == job and group.state != table.REMOVED:
            found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found
