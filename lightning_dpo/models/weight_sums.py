"""A few numbers that tell one set of weights from another, the same however weights are split over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["same_weights", "weight_sums"]

_ROUNDING = 1e-9
"""Relative difference of two float64 sums of the same numbers in another order."""


def weight_sums(tensors: Iterator[tuple[str, Tensor]]) -> list[float]:
    """Sum up weights.

    Args:
        tensors: Weights by name.

    Returns:
        How many elements there are, their sum and their sum of squares, both with tensors weighted by their
        place in the order of names.
    """
    count, total, squares = 0.0, 0.0, 0.0
    for place, (_, tensor) in enumerate(sorted(tensors, key=lambda item: item[0]), start=1):
        values = tensor.detach()
        if values.device.type == "mps":
            values = values.cpu()  # Apple's GPUs have no float64
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
        count += values.numel()
        total += place * float(_whole(values.sum(dtype=torch.float64)))
        squares += place * float(_whole(norm)) ** 2
    return [count, total, squares]


def same_weights(one: list[float] | str, other: list[float] | str) -> bool:
    """Whether two identities are of the same weights, sums of them up to the order of summation.

    Args:
        one: What `weight_sums` gave, or an identity in words.
        other: The identity to compare with; one of another kind says nothing, and counts as the same.
    """
    if isinstance(one, str) or isinstance(other, str):
        return one == other or type(one) is not type(other)
    count, total, squares = one
    return (
        count == other[0]
        and abs(total - other[1]) <= _ROUNDING * math.sqrt(count * squares)
        and abs(squares - other[2]) <= _ROUNDING * squares
    )


def _whole(total: Tensor) -> Tensor:
    return total.full_tensor() if isinstance(total, DTensor) else total
