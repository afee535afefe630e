"""What the members of a family say about preference pairs, all from one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.kl import Estimate
from lightning_dpo.evaluation.logits import ModelPair
from lightning_dpo.evaluation.realign.family import check_scales, score_family
from lightning_dpo.models.modes import evaluating
from lightning_dpo.types import PairBatch

__all__ = ["MemberOnPairs", "realigned_pairs"]


@dataclass(frozen=True, slots=True)
class MemberOnPairs:
    """One member of a family on preference pairs; log-probabilities and log-ratios in nats per completion.

    Attributes:
        scale: lambda.
        accuracy: Share of pairs whose chosen completion has the higher log-ratio to the reference; ties count
            half, as they all are at lambda 0.
        chosen_logps: Mean log pi_lambda of the chosen completions.
        rejected_logps: Mean log pi_lambda of the rejected completions.
        margin: Mean difference of the two log-ratios.
        kl_on_pairs: KL(pi_lambda || pi_ref) of the next token, summed along the pairs' completions: the KL of
            what the member itself says only where the pairs come from it.
    """

    scale: float
    accuracy: Estimate
    chosen_logps: float
    rejected_logps: float
    margin: float
    kl_on_pairs: float


def realigned_pairs(
    policy: nn.Module,
    *,
    reference: nn.Module,
    batches: Iterable[PairBatch],
    scales: Sequence[float],
) -> list[MemberOnPairs]:
    """Score pairs under every member, from one pass of each of the two models.

    Args:
        policy: The trained model.
        reference: What it was trained from, over the same vocabulary.
        batches: Pairs; their weights count.
        scales: lambda of each member.

    Returns:
        One result for each scale, in their order.

    Raises:
        ValueError: If a scale is not allowed, there are no pairs, or the vocabularies differ.
    """
    check_scales(scales)
    columns: list[Tensor] = []
    weights: list[Tensor] = []
    with evaluating(policy, reference), torch.no_grad():
        models = ModelPair(policy, reference, layout="auto")
        for batch in batches:
            scores = score_family(models, batch.completions(), scales=scales)
            chosen, rejected = scores.logps.chunk(2, dim=1)
            ratios = (scores.logps - scores.reference_logps).chunk(2, dim=1)
            kl = torch.stack(scores.kl.chunk(2, dim=1)).mean(0)
            margin = ratios[0] - ratios[1]
            columns.append(torch.stack([(margin.sign() + 1) / 2, chosen, rejected, margin, kl], dim=-1))
            weights.append(batch.weights)
    if not weights or not (weight := torch.cat(weights).double()).sum() > 0:
        raise ValueError("`batches` must hold at least one pair that counts, got none")
    table = torch.cat(columns, dim=1).double()
    means = torch.einsum("p,mpc->mc", weight, table) / weight.sum()
    spread = torch.einsum("p,mp->m", weight**2, (table[..., 0] - means[:, :1]) ** 2)
    errors = spread.sqrt() / weight.sum() if len(weight) > 1 else torch.full_like(spread, math.nan)
    return [
        MemberOnPairs(scale, Estimate(mean[0], error), *mean[1:])
        for scale, mean, error in zip(scales, means.tolist(), errors.tolist(), strict=True)
    ]
