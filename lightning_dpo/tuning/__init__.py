"""Sweeps over beta, learning rate and losses with Ray Tune, on a laptop or a cluster.

The only part of the package that imports ray; install it with ``pip install "lightning-dpo[tune]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dpo.tuning.config import SweepConfig
    from lightning_dpo.tuning.frontier.config import FrontierConfig
    from lightning_dpo.tuning.frontier.result import FrontierResult
    from lightning_dpo.tuning.frontier.run import run_frontier
    from lightning_dpo.tuning.objective import Goal, Objective
    from lightning_dpo.tuning.results.result import SweepResult, TrialRecord
    from lightning_dpo.tuning.run import sweep
    from lightning_dpo.tuning.search.space import SearchSpace

__all__ = [
    "FrontierConfig",
    "FrontierResult",
    "Goal",
    "Objective",
    "SearchSpace",
    "SweepConfig",
    "SweepResult",
    "TrialRecord",
    "require_ray",
    "run_frontier",
    "sweep",
]

_HOMES = {
    "FrontierConfig": "frontier.config",
    "FrontierResult": "frontier.result",
    "Goal": "objective",
    "Objective": "objective",
    "SearchSpace": "search.space",
    "SweepConfig": "config",
    "SweepResult": "results.result",
    "TrialRecord": "trial.record",
    "run_frontier": "frontier.run",
    "sweep": "run",
}


def require_ray() -> None:
    """Say how to install what is missing.

    Raises:
        ValueError: If ray is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise ValueError('sweeps need ray, which is not installed: pip install "lightning-dpo[tune]"')


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that a missing ray is named then."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    require_ray()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
