"""The best reward at each KL, from samples of the reference and of the policies that went furthest."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dpo.evaluation import (
    FittedOptimum,
    FrontierPoint,
    best_at_kl,
    mixture_log_weights,
    reweighted_frontier,
    share_of_limit,
)
from lightning_dpo.files import parquet_bytes
from lightning_dpo.tuning.objective import pareto_front
from lightning_dpo.tuning.storage import Storage

__all__ = ["FitSettings", "Limit", "pick_policies", "read_fit", "write_fit"]

_CURVE_BETAS = torch.logspace(2.5, -2.0, 150).tolist()
"""Relative to the standard deviation of the reference's rewards."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a policy is fitted to the best one, see `fit_optimum`.

    Attributes:
        kl: Where the best one is wanted, nats.
        samples_per_prompt: Completions of each prompt in each round.
        rounds: How often to fit and draw.
        most_rounds: How often to do so at most.
        lr: Of Adam.
    """

    kl: float
    samples_per_prompt: int
    rounds: int
    most_rounds: int
    lr: float

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        most = f"-{self.most_rounds}" if self.most_rounds > self.rounds else ""
        return f"fit-kl-{self.kl:g}-rounds-{self.rounds}{most}-lr-{self.lr:g}-{self.samples_per_prompt}"


@dataclass(frozen=True)
class Limit:
    """What no policy exceeds.

    Attributes:
        rewards: Of samples of the reference and of some policies, (prompts, samples).
        log_weights: log reference - log of what they were drawn from, (prompts, samples).
        reference: Mean reward of the reference.
        policies: How many trained policies were sampled besides the reference.
        fitted: KL and reward of a policy that was fitted to the best one, as its own samples tell them, where
            the others were drawn on its way there; None where none was.
    """

    rewards: Tensor
    log_weights: Tensor
    reference: float
    policies: int = 0
    fitted: tuple[float, float] | None = None

    @classmethod
    def of(cls, rewards: Sequence[Tensor], logratios: Sequence[Tensor], *, prompts: int) -> Limit:
        """Take samples together.

        Args:
            rewards: Of the samples of each policy, the reference first, (samples,) each, prompt by prompt.
            logratios: log policy - log reference of all of these samples, laid end to end, under each policy
                but the reference, (policies * samples,) each.
            prompts: How many there are.
        """
        policies = len(rewards)
        table = torch.stack([each.double().view(prompts, -1) for each in rewards], dim=1)
        zeros = torch.zeros(table.numel(), dtype=torch.float64)
        under = torch.stack([zeros, *(each.double() for each in logratios)])
        under = under.view(policies, policies, prompts, -1).transpose(1, 2).reshape(policies, prompts, -1)
        return cls(
            table.reshape(prompts, -1),
            mixture_log_weights(under),
            float(rewards[0].double().mean()),
            policies - 1,
        )

    @classmethod
    def of_fit(cls, found: FittedOptimum) -> Limit:
        """Take the samples of a fit."""
        draws = len(found.rounds) + 1
        reference = found.rewards[:, : found.rewards.shape[1] // draws]
        fitted = (found.kl, found.reward)
        return cls(found.rewards, found.log_weights, float(reference.mean()), fitted=fitted)

    def joined(self, other: Limit) -> Limit:
        """With further samples of the same policies, as many of each."""
        sizes = self.rewards.shape[1], other.rewards.shape[1]
        return Limit(
            torch.cat([self.rewards, other.rewards], dim=1),
            torch.cat([self.log_weights, other.log_weights], dim=1),
            (sizes[0] * self.reference + sizes[1] * other.reference) / sum(sizes),
            self.policies,
        )

    def part(self, number: int, *, of: int) -> Limit:
        """One of several limits, each from other samples.

        Args:
            number: Which one, from 0.
            of: How many there are.
        """
        kept = slice(number, None, of)  # of each draw as many
        return dataclasses.replace(self, rewards=self.rewards[:, kept], log_weights=self.log_weights[:, kept])

    def at(self, kl: float) -> FrontierPoint:
        """The best reward at a KL."""
        return best_at_kl(self.rewards, kl=kl, log_weights=self.log_weights)

    def is_known(self, *, up_to: float) -> bool:
        """Whether twice as many effective samples as are asked for tell the limit at a KL."""
        return self.at(up_to).tells(up_to)

    def share(self, reward: float, *, kl: float) -> float:
        """What part of the gain that is reachable at a policy's KL it has.

        NaN where too few samples carry the weight, or the KL is 0.

        Args:
            reward: The policy's mean reward.
            kl: Its KL, nats.
        """
        if not kl > 0:
            return math.nan
        best = self.at(kl)
        if not best.is_reliable:
            return math.nan
        return share_of_limit(reward, limit=best.reward, reference=self.reference)

    def curve(self, *, up_to: float) -> list[FrontierPoint]:
        """Points from KL 0 to `up_to`, those that can be trusted."""
        scale = float(self.rewards.std()) or 1.0
        points = reweighted_frontier(
            self.rewards, betas=[scale * beta for beta in _CURVE_BETAS], log_weights=self.log_weights
        )
        return [point for point in points if point.is_reliable and point.kl <= up_to]


def write_fit(target: Storage, name: str, found: FittedOptimum) -> None:
    """Keep a fit: its samples in a Parquet file, one in each row, and beside it how its rounds went."""
    import pyarrow as pa

    prompts, each = found.rewards.shape
    columns = {
        "prompt": torch.arange(prompts).repeat_interleave(each).tolist(),
        "reward": found.rewards.flatten().tolist(),
        "log_weight": found.log_weights.flatten().tolist(),
    }
    target.write(f"{name}.parquet", parquet_bytes(pa.table(columns)))
    told = {
        "kl": found.kl,
        "reward": found.reward,
        "rounds": [dataclasses.asdict(each) for each in found.rounds],
    }
    target.write(f"{name}.json", json.dumps(told, indent=1))  # the last: it says that all is there


def read_fit(source: Storage, name: str, *, prompts: int) -> FittedOptimum | None:
    """A fit that was kept; None where there is none."""
    import pyarrow.parquet as pq

    text, content = source.read(f"{name}.json"), source.read_bytes(f"{name}.parquet")
    if text is None or content is None:
        return None
    table, told = pq.read_table(io.BytesIO(content)), json.loads(text)
    rewards, log_weights = (
        torch.tensor(table[column].to_pylist(), dtype=torch.float64).view(prompts, -1)
        for column in ("reward", "log_weight")
    )
    rounds = [FrontierPoint(**each) for each in told["rounds"]]
    return FittedOptimum(rounds, rewards, log_weights, kl=told["kl"], reward=told["reward"])


def pick_policies(points: Sequence[tuple[float, float]], *, count: int) -> list[int]:
    """Which policies to sample for the limit: some that no other one beats, spread over the KL.

    Args:
        points: KL and reward of each policy.
        count: How many to pick at most.

    Returns:
        Their indices, by rising KL; that with the highest reward is the last.
    """
    front = pareto_front([(reward, -kl) for kl, reward in points])
    front.sort(key=lambda index: points[index])
    if count < 1 or not front:
        return []
    places = torch.linspace(len(front) - 1, 0, min(count, len(front))).round().int().tolist()
    return sorted({front[place] for place in places}, key=lambda index: points[index])
