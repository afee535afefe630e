"""Prompts with one completion each, cut out of a single row and padded, for one call of causal attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MOST_NUMBERS", "PaddedPieces"]

MOST_NUMBERS = 8192
"""Numbers in the queries of the longest piece up to which padding costs less than a call for each piece: 85
tokens of a model of width 96, 14 of one of width 576."""

_KEPT = "lightning_dpo_padded_pieces"
"""Attribute of the spans that stand in for a mask: where this is kept, for all layers and models."""


@dataclass(frozen=True, slots=True)
class PaddedPieces:
    """Where the tokens of a single row stand in padded rows: a prompt's is repeated for each completion.

    Attributes:
        columns: The row's column at each place of the padded rows, (completions * longest,); padding repeats
            the last one.
        places: The place of each of the row's columns, (seq_len,).
        shape: (completions, longest).
    """

    columns: Tensor
    places: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, spans: Tensor, *, width: int) -> PaddedPieces | None:
        """Cut a row, once for all layers; None where a call for each piece costs less.

        Args:
            spans: See `lightning_dpo.scoring.prefix_attention.prefix_attention`.
            width: Numbers in a token's query, those of all heads.
        """
        table = spans[0, 0]
        longest = int((table[:, 0] + table[:, 1:].amax(1)).max())
        if longest * width > MOST_NUMBERS:
            return None
        if not hasattr(spans, _KEPT):
            setattr(spans, _KEPT, cls._cut(table, longest))
        found: PaddedPieces = getattr(spans, _KEPT)
        return found

    @classmethod
    def _cut(cls, table: Tensor, longest: int) -> PaddedPieces:
        begins = (table.flatten().cumsum(0) - table.flatten()).view_as(table)
        is_piece = table[:, 1:] > 0  # lengths of 0 fill up the table
        is_piece[:, 0] = True
        prompts, numbers = is_piece.nonzero(as_tuple=True)
        prompt, size = table[prompts, 0, None], table[prompts, numbers + 1, None]
        place = torch.arange(longest)
        own = begins[prompts, numbers + 1, None] + (place - prompt).minimum(size - 1)
        # What a prompt gives is taken from where it stands with its first completion.
        is_taken = (place < prompt + size) & ((place >= prompt) | (numbers == 0)[:, None])
        return cls(
            columns=torch.where(place < prompt, begins[prompts, 0, None] + place, own).flatten(),
            places=is_taken.flatten().nonzero().squeeze(1),
            shape=(len(prompts), longest),
        )
