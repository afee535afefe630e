"""Ids of several parts laid end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["flat_ids", "flat_masks", "lengths_of", "pick_ids"]


def flat_ids(parts: Sequence[Sequence[int]]) -> Tensor:
    """The ids of all parts, end to end."""
    return torch.cat([torch.as_tensor(part, dtype=torch.long) for part in parts])


def flat_masks(masks: Sequence[Sequence[bool] | None], parts: Sequence[Sequence[int]]) -> Tensor | None:
    """Which tokens of all parts count, end to end; None where all do.

    Args:
        masks: For each part whether each token counts; None, or nothing, where all do.
        parts: Ids of each part.

    Raises:
        ValueError: If a mask is not as long as its part, or leaves no token.
    """
    if not any(mask is not None and len(mask) for mask in masks):
        return None
    for index, (mask, part) in enumerate(zip(masks, parts, strict=True)):
        if mask is not None and len(mask) and (len(mask) != len(part) or not any(mask)):
            raise ValueError(
                "`counted` must say of each token whether it counts, and of one at least that it does, got "
                f"{sum(map(bool, mask))} of {len(mask)} for {len(part)} tokens at index {index}"
            )
    flat = [
        torch.as_tensor(mask, dtype=torch.bool)
        if mask is not None and len(mask)
        else torch.ones(len(part), dtype=torch.bool)
        for mask, part in zip(masks, parts, strict=True)
    ]
    joined = torch.cat(flat)
    return None if joined.all() else joined


def lengths_of(parts: Sequence[Sequence[Any]]) -> Tensor:
    """How many elements each part has, (parts,)."""
    return torch.tensor([len(part) for part in parts])


def pick_ids(ids: Tensor, lengths: Tensor, numbers: Tensor) -> Tensor:
    """The ids of some parts, end to end.

    Args:
        ids: Ids of all parts, end to end.
        lengths: How many each part has, (parts,).
        numbers: Which parts, (count,).
    """
    parts = torch.split(ids, lengths.tolist())
    return torch.cat([parts[number] for number in numbers.tolist()])
