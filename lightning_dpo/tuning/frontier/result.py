"""What a frontier found, and its file: one row for each policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_dpo.evaluation import FrontierPoint, reward_at_kl, share_of_limit
from lightning_dpo.files import parquet_bytes
from lightning_dpo.tuning.frontier.intervals import Interval
from lightning_dpo.tuning.frontier.limit import Limit

__all__ = ["Failure", "FrontierResult", "MethodShares", "PolicyPoint", "to_parquet"]


@dataclass(frozen=True, slots=True)
class PolicyPoint:
    """One policy, a row of `frontier.parquet`.

    Attributes:
        method: Name of its method.
        strength: What was varied: beta, N, a learning rate.
        seed: Seed of its run.
        kl: KL(policy || reference), nats.
        kl_error: Its standard error.
        reward: Mean score of its completions.
        reward_error: Its standard error.
        share_of_limit: Part of the reachable gain at its KL; NaN where the limit is not known there.
    """

    method: str
    strength: float
    seed: int
    kl: float
    kl_error: float
    reward: float
    reward_error: float
    share_of_limit: float = math.nan


@dataclass(frozen=True, slots=True)
class Failure:
    """What gave no point.

    Attributes:
        method: Name of its method.
        what: Which of its runs.
        reason: In words.
    """

    method: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class MethodShares:
    """A method where others are compared with it: at some KLs.

    Attributes:
        method: Its name.
        shares: Share of the limit at each KL, over the seeds whose curve reaches it; None where none does.
        furthest: KL of its policy with the highest, mean over the seeds, nats.
    """

    method: str
    shares: tuple[Interval | None, ...]
    furthest: float


@dataclass(frozen=True)
class FrontierResult:
    """Methods beside each other.

    Attributes:
        location: The folder or URL.
        points: Every policy that was measured, in the order of the methods.
        limit: What none exceeds.
        kls: Where methods are compared, nats.
        failures: What went wrong.
        seconds: Wall time.
        settings: The configuration, as plain values.
        strengths: What each method varies, by its name.
    """

    location: str
    points: tuple[PolicyPoint, ...]
    limit: Limit
    kls: tuple[float, ...]
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    strengths: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Names of the methods that have points."""
        return list(dict.fromkeys(point.method for point in self.points))

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return len({point.seed for point in self.points})

    @property
    def report_path(self) -> str:
        """The page: one HTML file."""
        return f"{self.location}/frontier.html"

    def best_at(self) -> list[FrontierPoint]:
        """The limit at each KL of the comparison."""
        return [self.limit.at(kl) for kl in self.kls]

    def compare(self) -> list[MethodShares]:
        """Every method at each KL of the comparison, read off its own curve for each seed."""
        best = self.best_at()
        compared = []
        for method in self.methods:
            seeds = _by_seed([point for point in self.points if point.method == method])
            shares = tuple(
                Interval.of(self._shares(seeds, limit, kl=kl)) if limit.is_reliable else None
                for kl, limit in zip(self.kls, best, strict=True)
            )
            furthest = [max(point.kl for point in points) for points in seeds]
            compared.append(MethodShares(method, shares, sum(furthest) / len(furthest)))
        return compared

    def _shares(
        self, seeds: Sequence[Sequence[PolicyPoint]], limit: FrontierPoint, *, kl: float
    ) -> list[float]:
        """Share of the limit of each seed whose curve reaches a KL; the limit may be reached before it."""
        read = [reward_at_kl([p.kl for p in points], [p.reward for p in points], kl=kl) for points in seeds]
        reached = [reward for reward in read if not math.isnan(reward)]
        return [share_of_limit(r, limit=limit.reward, reference=self.limit.reference) for r in reached]


def to_parquet(points: Sequence[PolicyPoint]) -> bytes:
    """The content of `frontier.parquet`; a share that is not known is null."""
    import pyarrow as pa

    types = {"method": pa.string(), "strength": pa.float64(), "seed": pa.int64()}
    schema = pa.schema([(each.name, types.get(each.name, pa.float64())) for each in fields(PolicyPoint)])
    rows = [{k: None if v != v else v for k, v in asdict(point).items()} for point in points]
    return parquet_bytes(pa.Table.from_pylist(rows, schema=schema))


def _by_seed(points: Sequence[PolicyPoint]) -> list[list[PolicyPoint]]:
    seeds = dict.fromkeys(point.seed for point in points)
    return [[point for point in points if point.seed == seed] for seed in seeds]
