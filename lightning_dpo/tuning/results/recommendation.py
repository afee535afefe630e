"""Which trial to take: of those that cannot be told from the best one, the one closest to the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_dpo.tuning.objective import KL
from lightning_dpo.tuning.results.comparison import Comparison
from lightning_dpo.tuning.trial.record import TrialRecord

__all__ = ["Recommendation", "recommend"]


class Recommendation(NamedTuple):
    """A trial, and why it is recommended, in a sentence or two."""

    trial: TrialRecord
    reason: str


def recommend(
    trials: Sequence[TrialRecord],
    comparisons: Mapping[str, Comparison],
    *,
    confidence: float,
    kl: Mapping[str, float] | None = None,
    units: str = "pairs",
) -> Recommendation:
    """The trial with the lowest KL among those that cannot be told from the best one.

    A trial that was stopped early does not count: its recipe, run to the end, gives another model.

    Args:
        trials: Best first, at least one.
        comparisons: Of trials, by name.
        confidence: With which they were compared.
        kl: The KL of trials by name, where it was measured; None takes what each trial itself reported.
        units: What they were compared on, "pairs" or "completions".
    """
    if kl is None:
        kl = {trial.id: float(trial.metrics[KL]) for trial in trials if KL in trial.metrics}
    best = trials[0]
    if len(comparisons) < 2 or best.id not in comparisons:
        return Recommendation(best, f"The best by its {_by(best)}; there is nothing to compare it with.")
    level = [t for t in trials if t is not best and t.id in comparisons and comparisons[t.id].is_level]
    told = f"at {confidence:.0%} confidence on {comparisons[best.id].pairs:,} {units}"
    if not level:
        return Recommendation(best, f"Every other trial can be told from the best one {told}.")
    count = f"{len(level)} other trial{'s' if len(level) > 1 else ''} cannot be told from the best one {told}"
    complete = [t for t in level if t.is_complete or t.status is best.status]
    if best.id not in kl or not any(t.id in kl for t in complete):
        missing = "the KL was not measured" if best.id not in kl else "none of them ran to its end"
        return Recommendation(best, f"{count}, but {missing}: the best by its {_by(best)} is taken.")
    chosen = min([best, *(t for t in complete if t.id in kl)], key=lambda t: kl[t.id])
    low, high = kl[chosen.id], kl[best.id]
    if chosen is best:
        return Recommendation(best, f"{count}; the best one has the lowest KL of them, {low:.3g}.")
    one = comparisons[chosen.id]
    return Recommendation(
        chosen,
        f"{count}. Of these, trial {chosen.id}{_at(chosen)} has the lowest KL, {low:.3g} and not {high:.3g}, "
        f"for a difference of {one.difference:+.4f} ({one.difference_interval.low:+.4f} to "
        f"{one.difference_interval.high:+.4f}, p = {one.p_value:.2g}).",
    )


def _by(trial: TrialRecord) -> str:
    return "last validation" if trial.kept is None else f"step {trial.kept.step}, the one that it kept"


def _at(trial: TrialRecord) -> str:
    return "" if trial.kept is None else f", as of step {trial.kept.step},"
