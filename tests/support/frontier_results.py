"""Comparisons made up for tests: rewards that are normal under the reference, where all is known."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_dpo.tuning.frontier.limit import Limit
from lightning_dpo.tuning.frontier.result import FrontierResult, PolicyPoint

STRENGTHS = (0.1, 0.4, 1.6)
KLS = (9.0, 4.0, 0.5)


def limit(samples: int = 4000) -> Limit:
    """Of standard normal rewards: sqrt(2 KL), from samples of the reference and of one tilted by 2."""
    quantiles = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    reference = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    tilted = reference + 2
    pool = torch.cat([reference, tilted])
    logratios = 2 * pool - 2  # log N(r; 2, 1) - log N(r; 0, 1)
    return Limit.of([reference, tilted], [logratios], prompts=1)


def points(method: str, share: float, *, seeds: int = 3) -> list[PolicyPoint]:
    """A method that has this share of the limit at each KL, a little more or less for each seed."""
    return [
        PolicyPoint(
            method, strength, seed, kl, 0.05, (share + 0.01 * (seed - 1)) * math.sqrt(2 * kl), 0.02, share
        )
        for strength, kl in zip(STRENGTHS, KLS, strict=True)
        for seed in range(seeds)
    ]


def made_up(location: str = "outputs/made-up", **changes: Any) -> FrontierResult:
    """Two methods, of which the second goes to KL 4 only."""
    second = [point for point in points("PPO <b>", 0.7) if point.kl < 5]
    fields: dict[str, Any] = {
        "location": location,
        "points": (*points("DPO", 0.9), *second),
        "limit": limit(),
        "kls": (1.0, 2.0, 8.0),
        "seconds": 61.0,
        "strengths": {"DPO": "β", "PPO <b>": "kl_coefficient"},
        **changes,
    }
    return FrontierResult(**fields)
