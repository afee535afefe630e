"""From scores of several completions to one preference pair of each prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PreferredPairs", "preferred_pairs"]


class PreferredPairs(NamedTuple):
    """Which two completions of each prompt make its pair.

    Attributes:
        chosen: Number of the preferred completion, (prompts,).
        rejected: Number of the other one, (prompts,).
        gaps: Score of the chosen completion minus that of the rejected one, (prompts,); below 0 where chance
            has preferred the worse one.
    """

    chosen: Tensor
    rejected: Tensor
    gaps: Tensor


def preferred_pairs(
    scores: Tensor, *, label_scale: float | None = None, generator: torch.Generator | None = None
) -> PreferredPairs:
    """Pair each prompt's best completion with its worst one, and say which of the two is preferred.

    Without `label_scale` that is the better one. With it, Bradley-Terry, Eq. 1 of
    https://arxiv.org/abs/2305.18290: the better one with probability sigmoid(label_scale * gap), as people
    with that reward would say. Which two are compared does not depend on what is said of them, so labels of
    any number of completions have the same optimum.

    Args:
        scores: Of each completion, higher is better, (prompts, completions), at least two of each.
        label_scale: Reward per unit of score in the labels; the higher, the less noise. None is no noise.
        generator: The source of chance; torch's global one if None.

    Returns:
        Of completions with equal scores the first counts as better.
    """
    count = scores.shape[1]
    best = scores.argmax(1)
    worst = count - 1 - scores.flip(1).argmin(1)
    gaps = (scores.gather(1, best[:, None]) - scores.gather(1, worst[:, None])).squeeze(1)
    if label_scale is None:
        return PreferredPairs(best, worst, gaps)
    draws = torch.rand(gaps.shape, dtype=torch.float64, generator=generator).to(gaps.device)
    as_scored = draws < torch.sigmoid(label_scale * gaps.double())
    return PreferredPairs(
        torch.where(as_scored, best, worst),
        torch.where(as_scored, worst, best),
        torch.where(as_scored, gaps, -gaps),
    )
