"""What is said of the step that a trial kept, and of steps that it ran again."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["kept_step_note", "runs_again_note"]


def kept_step_note(trial: TrialRecord) -> str:
    """Which step a trial kept, and what its metric was measured on; empty where it is the last one.

    Args:
        trial: A trial that reported.
    """
    kept = trial.kept
    if kept is None:
        return ""
    return (
        f"The model is that of step {kept.step} of {trial.total_steps or trial.step}, the best of its "
        f"validations by {kept.choosing_pairs:,} of the pairs; {kept.metric} above is of the other "
        f"{kept.ranking_pairs:,}, which took no part in that choice. A run of the recipe by fit trains on to "
        "the end."
    )


def runs_again_note(trials: Sequence[TrialRecord]) -> str:
    """Which trials ran steps again, since a process died after their last full state; empty where none did.

    Args:
        trials: Those of a sweep.
    """
    again = [trial for trial in trials if trial.again]
    if not again:
        return ""
    told = ", ".join(f"trial {trial.id} {trial.again:,} steps" for trial in again)
    return (
        f"Went on from a full state after a process died, and ran again what was reported since: {told}. "
        "`full_state_every` says how often a full state is kept."
    )
