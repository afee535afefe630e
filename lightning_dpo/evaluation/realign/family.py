"""The family of a policy and its reference: nearer to it or further away, without training again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dpo.evaluation.kl import token_kl
from lightning_dpo.evaluation.logits import ModelPair, sum_of_completions
from lightning_dpo.scoring.lm_head import CHUNK_ELEMENTS
from lightning_dpo.types import CompletionBatch

__all__ = ["FamilyScores", "check_scales", "realigned_logps", "score_family"]


def realigned_logps(policy_logps: Tensor, reference_logps: Tensor, *, scale: float) -> Tensor:
    """The next-token distribution pi_ref^(1 - scale) pi^scale / Z of https://arxiv.org/abs/2402.02992.

    Of whole completions, with one Z for each prompt, it would be the optimum at beta / scale where pi is the
    optimum at beta. With Z at each position, which is what can be sampled, it is near to that. A token that
    either model excludes is excluded, unless the scale takes that model out.

    Args:
        policy_logps: Normalised, (..., vocab).
        reference_logps: Normalised, (..., vocab).
        scale: lambda: 0 gives the reference, 1 the policy, more goes beyond it.

    Returns:
        Log-probabilities, (..., vocab).

    Raises:
        ValueError: If the vocabularies differ in size.
    """
    sizes = policy_logps.shape[-1], reference_logps.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`reference` must have the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]}; take the "
            "model that the policy started from"
        )
    if scale in (0, 1):
        return policy_logps if scale == 1 else reference_logps
    excluded = (policy_logps == -math.inf) | (reference_logps == -math.inf)
    mixed = (1 - scale) * reference_logps + scale * policy_logps
    return mixed.masked_fill(excluded, -math.inf).log_softmax(-1)


def check_scales(scales: Sequence[float]) -> None:
    """Refuse an empty family, and scales that point away from the policy.

    Raises:
        ValueError: If `scales` is empty or holds one that is negative or not finite.
    """
    wrong = [scale for scale in scales if not (math.isfinite(scale) and scale >= 0)]
    if wrong or not scales:
        raise ValueError(
            "`scales` must be numbers of at least 0 (0 is the reference, 1 the policy), got "
            f"{wrong[0] if wrong else 'none'}"
        )


@dataclass(frozen=True, slots=True)
class FamilyScores:
    """What the members of a family say about the same completions, nats.

    Attributes:
        scales: lambda of each member.
        logps: log pi_lambda of each completion, (members, completions), float32.
        kl: Sum over a completion's positions of KL(pi_lambda || pi_ref), (members, completions), float32.
        reference_logps: log pi_ref of each completion, (completions,), float32.
    """

    scales: tuple[float, ...]
    logps: Tensor
    kl: Tensor
    reference_logps: Tensor


@torch.no_grad()
def score_family(
    models: ModelPair,
    batch: CompletionBatch,
    *,
    scales: Sequence[float],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> FamilyScores:
    """Score completions under all members, from one pass of each of the two models.

    Args:
        models: The policy and its reference, in eval mode.
        batch: Prompts and completions.
        scales: lambda of each member.
        chunk_elements: Upper bound of the logits of each model that exist at once (at least one token's).

    Raises:
        ValueError: If the vocabularies differ, or a scale is not allowed.
    """
    check_scales(scales)
    logps, kls, reference_logps = [], [], []
    for chunk in models.chunks(batch, chunk_elements=chunk_elements):
        ours, divergences = [], []
        for scale in scales:
            member = realigned_logps(chunk.policy_logps, chunk.reference_logps, scale=scale)
            ours.append(chunk.of_targets(member))
            divergences.append(token_kl(member, chunk.reference_logps))
        logps.append(torch.stack(ours, dim=1))
        kls.append(torch.stack(divergences, dim=1))
        reference_logps.append(chunk.of_targets(chunk.reference_logps))
    return FamilyScores(
        scales=tuple(scales),
        logps=sum_of_completions(batch, logps).T.float(),
        kl=sum_of_completions(batch, kls).T.float(),
        reference_logps=sum_of_completions(batch, reference_logps).float(),
    )
