"""Sums and moments over the numbers of all ranks; every rank must ask for them."""

from __future__ import annotations

from torch import Tensor, distributed, finfo, stack

__all__ = ["sum_over_ranks", "weighted_moments"]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each rank's tensor, in place; the tensor itself where there is one process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def weighted_moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, scalars; both 0 where nothing counts, as in a batch of fillers.

    Args:
        values: This rank's numbers, (n,); ranks may have different n.
        weights: What each counts, (n,).
    """
    count, total = sum_over_ranks(stack([weights.sum(), (values * weights).sum()]))
    count = count.clamp(min=finfo(count.dtype).tiny)
    mean = total / count
    return mean, sum_over_ranks(((values - mean) ** 2 * weights).sum()) / count
