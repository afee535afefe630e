"""A family's curve: accuracy on pairs, and the KL and score of what each member says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_dpo.evaluation.kl import Estimate
from lightning_dpo.evaluation.realign.family import check_scales
from lightning_dpo.evaluation.realign.members import RealignedSamples, realigned_samples
from lightning_dpo.evaluation.realign.pairs import MemberOnPairs, realigned_pairs
from lightning_dpo.evaluation.realign.weights import WeightFamily
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.files import parquet_bytes, write_file
from lightning_dpo.types import PairBatch

__all__ = ["RealignedPoint", "SamplingSettings", "realigned_curve", "save_points"]

ScoreSamples: TypeAlias = Callable[[Sequence[Sample]], Tensor]
"""Gives each sample a score, (samples,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """What is sampled from each member.

    Attributes:
        prompts: Token ids of each prompt; none samples nothing.
        eos_token_id: The token, or tokens, that end a completion.
        pad_token_id: Fills rows.
        max_new_tokens: Longest completion.
        seed: The same for each member.
        batch_size: Prompts sampled at once.
    """

    prompts: Sequence[Sequence[int]]
    eos_token_id: int | Sequence[int]
    pad_token_id: int = 0
    max_new_tokens: int = 128
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True, slots=True)
class RealignedPoint:
    """One member of a family, measured.

    Attributes:
        pairs: What it says about the pairs; its `scale` is the member's lambda.
        kl: KL(member || reference) of its own completions, nats; None where none were sampled.
        score: Mean score of its completions; None where nobody judged.
    """

    pairs: MemberOnPairs
    kl: Estimate | None = None
    score: Estimate | None = None

    @property
    def scale(self) -> float:
        """The member's lambda."""
        return self.pairs.scale

    def row(self) -> dict[str, float]:
        """All numbers by name, as a table has them; those that were not measured are left out."""
        values = {
            "scale": self.scale,
            "accuracy": self.pairs.accuracy.mean,
            "accuracy_error": self.pairs.accuracy.standard_error,
            "chosen_logps": self.pairs.chosen_logps,
            "rejected_logps": self.pairs.rejected_logps,
            "margin": self.pairs.margin,
            "kl_on_pairs": self.pairs.kl_on_pairs,
        }
        for name, estimate in (("kl", self.kl), ("score", self.score)):
            if estimate is not None:
                values |= {name: estimate.mean, f"{name}_error": estimate.standard_error}
        return values


def realigned_curve(
    policy: nn.Module,
    *,
    reference: nn.Module,
    batches: Iterable[PairBatch],
    scales: Sequence[float],
    sampling: SamplingSettings | None = None,
    by_weights: bool = False,
    judge: ScoreSamples | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> list[RealignedPoint]:
    """Measure every member of a family.

    Args:
        policy: The trained model.
        reference: What it was trained from.
        batches: Pairs, read once; once for each member where the family is by weights.
        scales: lambda of each member.
        sampling: What to sample from each; None leaves KL and scores out.
        by_weights: Take members on the line between the weights, not between the predictions.
        judge: Scores what was sampled.
        say: Is told what happens.

    Returns:
        One point for each scale, in their order.

    Raises:
        ValueError: If a scale is not allowed, there are no pairs, or the models do not go together.
    """
    check_scales(scales)
    samples = sampling if sampling is not None and len(sampling.prompts) else None
    if not by_weights:
        say(f"scoring pairs under {len(scales)} members at once ...")
        members = realigned_pairs(policy, reference=reference, batches=batches, scales=scales)
        points = []
        for pairs in members:
            drawn = _sampled(policy, reference, pairs.scale, pairs.scale, samples, say)
            points.append(_point(pairs, drawn, judge))
        return points
    family = WeightFamily(policy, reference=reference)
    points = []
    for scale in scales:
        say(f"scoring pairs at λ = {scale:g} ...")
        member = family.at(scale)
        (pairs,) = realigned_pairs(member, reference=reference, batches=batches, scales=[1.0])
        drawn = _sampled(member, reference, 1.0, scale, samples, say)
        points.append(_point(replace(pairs, scale=scale), drawn, judge))
    family.at(1.0)  # an adapter is the policy's own
    return points


def save_points(points: Sequence[RealignedPoint], path: str | Path) -> None:
    """Write the numbers of all members as Parquet, a row each, see `RealignedPoint.row`."""
    import pyarrow as pa

    table = pa.Table.from_pylist([point.row() for point in points])
    write_file(Path(path), parquet_bytes(table))


def _sampled(
    policy: nn.Module,
    reference: nn.Module,
    scale: float,
    shown: float,
    settings: SamplingSettings | None,
    say: Callable[[str], Any],
) -> RealignedSamples | None:
    if settings is None:
        return None
    say(f"sampling {len(settings.prompts)} completions at λ = {shown:g} ...")
    return realigned_samples(
        policy,
        reference=reference,
        prompts=settings.prompts,
        scale=scale,
        eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def _point(
    pairs: MemberOnPairs, drawn: RealignedSamples | None, judge: ScoreSamples | None
) -> RealignedPoint:
    if drawn is None:
        return RealignedPoint(pairs)
    score = None if judge is None else Estimate.of(judge(drawn.samples))
    return RealignedPoint(pairs, drawn.estimate, score)
