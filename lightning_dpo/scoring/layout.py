"""Pairs as rows of a model's input: prompts shared between the two completions, or every completion alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_dpo.types import PairBatch

__all__ = ["Rows", "concatenated_rows", "pack", "shared_rows", "visible"]

_PROMPT, _CHOSEN, _REJECTED = 0, 1, 2
_PADDING = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """Input of one forward pass, and where its completion tokens are predicted.

    Completions are numbered 0 .. 2 * batch - 1: the chosen of every pair, then the rejected of every pair;
    their tokens are listed in that order.

    Attributes:
        input_ids: Token ids, (rows, seq_len); padding is 0.
        position_ids: Position of each token in its own sequence, (rows, seq_len); after the prompt both
            completions start at the same position.
        segment: Which sequence a token belongs to, (rows, seq_len); -1 is padding.
        branch: 0 prompt, 1 chosen, 2 rejected, (rows, seq_len).
        predict: Flat index into rows * seq_len of the position that predicts each completion token,
            (completion_tokens,).
        targets: Id of each completion token, (completion_tokens,).
        lengths: Tokens of each completion, (2 * batch,), on the CPU.
        shared: Whether rows hold several branches, so that `visible` and not plain causality says which
            tokens see each other.
        num_tokens: Tokens that are not padding.
        spans: Lengths of prompt, chosen and rejected of each pair in the order in which they stand in a
            single row without padding, (pairs, 3), on the CPU; None for other layouts.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment: Tensor
    branch: Tensor
    predict: Tensor
    targets: Tensor
    lengths: Tensor
    shared: bool
    num_tokens: int
    spans: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor:
        """1 for tokens and 0 for padding, (rows, seq_len)."""
        return (self.segment != _PADDING).long()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of tokens placed in a row: part of the flat ids from `start`, laid at `column` of `row`."""

    row: int
    column: int
    start: int
    length: int
    position: int
    segment: int
    branch: int


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as best-fit decreasing finds.

    Args:
        lengths: Size of each item; none may exceed `capacity`.
        capacity: Size of a row.

    Returns:
        Item indices of each row, each item once.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, space in enumerate(free) if space >= lengths[item]]
        if fitting:
            row = min(fitting, key=free.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(item)
        free[row] -= lengths[item]
    return rows


def shared_rows(batch: PairBatch, *, multiple: int = 1, single_row: bool = False) -> Rows:
    """Lay each pair out once, as [prompt | chosen | rejected], and pack pairs into rows.

    A row is as long as the longest pair of the batch, so packing costs no more attention than padding
    would, and hardly any position is padding. Positions restart after the prompt for the rejected
    completion, so each completion is computed as if it alone followed the prompt.

    Args:
        batch: The pairs.
        multiple: Row lengths are rounded up to a multiple of this.
        single_row: Put all pairs into one row, without padding; for attention that goes pair by pair.
    """
    prompts, chosen, rejected = _host_lengths(batch)
    totals = [sum(parts) for parts in zip(prompts, chosen, rejected, strict=True)]
    starts = _starts(batch)
    pieces: list[_Piece] = []
    packed = [list(range(len(batch)))] if single_row else pack(totals, max(totals))
    first_columns = [0] * len(batch)
    row_of = [0] * len(batch)
    for row, pairs in enumerate(packed):
        column = 0
        for pair in pairs:
            row_of[pair], first_columns[pair] = row, column
            length = prompts[pair]
            pieces += [
                _Piece(row, column, starts[0][pair], length, 0, pair, _PROMPT),
                _Piece(row, column + length, starts[1][pair], chosen[pair], length, pair, _CHOSEN),
                _Piece(
                    row,
                    column + length + chosen[pair],
                    starts[2][pair],
                    rejected[pair],
                    length,
                    pair,
                    _REJECTED,
                ),
            ]
            column += totals[pair]
    width = _round_up(sum(totals) if single_row else max(totals), multiple)
    base = [row_of[i] * width + first_columns[i] for i in range(len(batch))]
    last_prompt = [base[i] + prompts[i] - 1 for i in range(len(batch))]
    after = [
        *(base[i] + prompts[i] for i in range(len(batch))),
        *(base[i] + prompts[i] + chosen[i] for i in range(len(batch))),
    ]
    shape = (len(packed), width)
    rows = _rows(batch, pieces, shape=shape, first=last_prompt * 2, after=after, shared=True)
    return replace(rows, spans=torch.tensor([prompts, chosen, rejected]).T) if single_row else rows


def concatenated_rows(batch: PairBatch) -> Rows:
    """Lay each completion out with its own copy of the prompt, one row each, padded on the right."""
    prompts, chosen, rejected = _host_lengths(batch)
    starts = _starts(batch)
    completions = [*chosen, *rejected]
    completion_starts = [*starts[1], *starts[2]]
    width = max(prompts[i % len(batch)] + length for i, length in enumerate(completions))
    pieces: list[_Piece] = []
    for row, length in enumerate(completions):
        pair = row % len(batch)
        branch = _CHOSEN if row < len(batch) else _REJECTED
        pieces += [
            _Piece(row, 0, starts[0][pair], prompts[pair], 0, row, _PROMPT),
            _Piece(row, prompts[pair], completion_starts[row], length, prompts[pair], row, branch),
        ]
    after = [row * width + prompts[row % len(batch)] for row in range(len(completions))]
    return _rows(
        batch,
        pieces,
        shape=(len(completions), width),
        first=[index - 1 for index in after],
        after=after,
        shared=False,
    )


def visible(
    rows: Rows,
    row: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    window: int | None = None,
) -> Tensor:
    """Whether a query token sees a key token: itself and what precedes it in its own sequence.

    A completion sees its prompt and itself, never the other completion. The arguments are index tensors
    that broadcast together, which is the form that both dense masks and FlexAttention want.

    Args:
        rows: The layout.
        row: Row index.
        query: Column of the query.
        key: Column of the key.
        window: Keys this many positions back, or more, are out of sight; measured in position ids, since
            columns count the other completion too.
    """
    key_branch = rows.branch[row, key]
    seen = (
        (key <= query)
        & (rows.segment[row, key] == rows.segment[row, query])
        & ((key_branch == _PROMPT) | (key_branch == rows.branch[row, query]))
    )
    if window is not None:
        seen = seen & (rows.position_ids[row, query] - rows.position_ids[row, key] < window)
    return seen


def _rows(
    batch: PairBatch,
    pieces: list[_Piece],
    *,
    shape: tuple[int, int],
    first: list[int],
    after: list[int],
    shared: bool,
) -> Rows:
    """Build the tensors: indices on the CPU, one copy to the batch's device, one gather of ids there."""
    device = batch.prompt_ids.device
    table = torch.tensor(
        [[p.row * shape[1] + p.column, p.start, p.length, p.position, p.segment, p.branch] for p in pieces]
    )
    offsets = _ranges(table[:, 2])
    destination, start, position, segment, branch = (
        table[:, column].repeat_interleave(table[:, 2]) for column in (0, 1, 3, 4, 5)
    )
    destination = destination + offsets
    plan = torch.zeros(4, shape[0] * shape[1], dtype=torch.long)
    plan[2].fill_(_PADDING)
    plan[:, destination] = torch.stack([start + offsets, position + offsets, segment, branch])
    lengths = torch.cat([batch.chosen_lengths, batch.rejected_lengths])
    within = _ranges(lengths)
    predict = torch.tensor(after).repeat_interleave(lengths) + within - 1
    predict[within == 0] = torch.tensor(first)
    source, position_ids, segment, branch = plan.to(device, non_blocking=True).view(4, *shape).unbind()
    ids = torch.cat([batch.prompt_ids, batch.chosen_ids, batch.rejected_ids])
    return Rows(
        input_ids=ids[source].masked_fill(segment == _PADDING, 0),
        position_ids=position_ids,
        segment=segment,
        branch=branch,
        predict=predict.to(device, non_blocking=True),
        targets=torch.cat([batch.chosen_ids, batch.rejected_ids]),
        lengths=lengths,
        shared=shared,
        num_tokens=len(destination),
    )


def _host_lengths(batch: PairBatch) -> tuple[list[int], list[int], list[int]]:
    return batch.prompt_lengths.tolist(), batch.chosen_lengths.tolist(), batch.rejected_lengths.tolist()


def _starts(batch: PairBatch) -> list[list[int]]:
    """Where each part begins in the ids of all prompts, all chosen and all rejected, end to end."""
    lengths = torch.cat([batch.prompt_lengths, batch.chosen_lengths, batch.rejected_lengths])
    return (lengths.cumsum(0) - lengths).view(3, -1).tolist()


def _ranges(lengths: Tensor) -> Tensor:
    """0 .. n - 1 for each n, end to end."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
