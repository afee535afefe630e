"""Prompts and completions as rows of a model's input: prompts shared by their completions, or repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dpo.types import CompletionBatch
from lightning_dpo.types.devices import send

__all__ = ["InputRows", "pack", "packed_rows", "separate_rows", "single_row", "visible"]

_PROMPT = 0
_PADDING = -1


@dataclass(frozen=True, slots=True)
class InputRows:
    """Input of one forward pass, and where its completion tokens are predicted.

    Completion tokens are listed in the order of the batch's completions, without those that do not count.

    Attributes:
        input_ids: Token ids, (rows, seq_len); padding is 0.
        position_ids: Position of each token in its own sequence, (rows, seq_len); all completions of a prompt
            start at the same position.
        sequence: Which prompt, with what follows it, a token belongs to, (rows, seq_len); -1 is padding.
        completion: Which of its prompt's completions a token belongs to, from 1, (rows, seq_len); 0 is the
            prompt itself.
        predict: Flat index into rows * seq_len of the position that predicts each completion token,
            (completion_tokens,).
        targets: Id of each completion token, (completion_tokens,).
        last: Flat index of the position of each completion's last token, (completions,).
        shared: Whether rows hold several completions, so that `visible` and not plain causality says which
            tokens see each other.
        num_tokens: Tokens that are not padding.
        spans: Lengths of each prompt and of its completions, in the order in which they stand in a single row
            without padding, (prompts, 1 + completions of a prompt at most), on the CPU, 0 where a prompt has
            fewer completions; None for other layouts.
        masks: Attention masks that were made for these rows, for all layers and models of a batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence: Tensor
    completion: Tensor
    predict: Tensor
    targets: Tensor
    last: Tensor
    shared: bool
    num_tokens: int
    spans: Tensor | None = None
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def attention_mask(self) -> Tensor:
        """1 for tokens and 0 for padding, (rows, seq_len)."""
        return (self.sequence != _PADDING).long()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of tokens placed in a row: part of the flat ids from `start`, laid at `column` of `row`."""

    row: int
    column: int
    start: int
    length: int
    position: int
    sequence: int
    completion: int


class _Sizes:
    """Lengths and places of a batch's parts as plain numbers."""

    def __init__(self, batch: CompletionBatch) -> None:
        self.prompts: list[int] = batch.prompt_lengths.tolist()
        self.completions: list[int] = batch.completion_lengths.tolist()
        # Where each part begins in the ids of all prompts and all completions, end to end.
        lengths = torch.cat([batch.prompt_lengths, batch.completion_lengths])
        starts: list[int] = (lengths.cumsum(0) - lengths).tolist()
        self.prompt_starts, self.completion_starts = starts[: len(self.prompts)], starts[len(self.prompts) :]
        self.prompt_of: list[int] = batch.prompt_of.tolist()
        self.answers: list[list[int]] = [[] for _ in self.prompts]
        for completion, prompt in enumerate(self.prompt_of):
            self.answers[prompt].append(completion)
        self.totals = [
            prompt + sum(self.completions[c] for c in answers)
            for prompt, answers in zip(self.prompts, self.answers, strict=True)
        ]


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


def packed_rows(batch: CompletionBatch, *, multiple: int = 1) -> InputRows:
    """Lay each prompt out once, followed by all its completions, and pack several prompts into a row.

    A row is as long as the longest prompt with its completions, so packing costs no more attention than
    padding would, and hardly any position is padding. Positions restart after the prompt for each completion,
    so each is computed as if it alone followed the prompt.

    Args:
        batch: Prompts and completions.
        multiple: Row lengths are rounded up to a multiple of this.
    """
    sizes = _Sizes(batch)
    longest = max(sizes.totals)
    width = -(-longest // multiple) * multiple
    return _shared_rows(batch, sizes, pack(sizes.totals, longest), width)


def single_row(batch: CompletionBatch, *, multiple: int | None = None) -> InputRows:
    """Lay everything out in one row, for attention that computes nothing that nobody sees.

    Args:
        batch: Prompts and completions; each prompt is followed by all its completions.
        multiple: The row's length is rounded up to a multiple of this, for attention that goes by a mask; by
            default there is no padding, and `spans` say how attention goes prompt by prompt.
    """
    sizes = _Sizes(batch)
    width = -(-sum(sizes.totals) // (multiple or 1)) * (multiple or 1)
    rows = _shared_rows(batch, sizes, [list(range(len(sizes.prompts)))], width)
    if multiple is not None:
        return rows
    most = max(map(len, sizes.answers))
    spans = [
        [prompt, *(sizes.completions[c] for c in answers), *[0] * (most - len(answers))]
        for prompt, answers in zip(sizes.prompts, sizes.answers, strict=True)
    ]
    return replace(rows, spans=torch.tensor(spans))


def separate_rows(batch: CompletionBatch) -> InputRows:
    """Lay each completion out with a copy of its prompt of its own, one row each, padded on the right."""
    sizes = _Sizes(batch)
    width = max(sizes.prompts[p] + n for p, n in zip(sizes.prompt_of, sizes.completions, strict=True))
    pieces: list[_Piece] = []
    after: list[int] = []
    for row, length in enumerate(sizes.completions):
        prompt = sizes.prompt_of[row]
        start = sizes.prompts[prompt]
        pieces += [
            _Piece(row, 0, sizes.prompt_starts[prompt], start, 0, row, _PROMPT),
            _Piece(row, start, sizes.completion_starts[row], length, start, row, 1),
        ]
        after.append(row * width + start)
    first = [index - 1 for index in after]
    shape = (len(sizes.completions), width)
    return _rows(batch, pieces, shape=shape, first=first, after=after, shared=False)


def visible(
    rows: InputRows,
    row: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    window: int | None = None,
) -> Tensor:
    """Whether a query token sees a key token: itself and what precedes it in its own sequence.

    A completion sees its prompt and itself, never another completion. The arguments are index tensors
    that broadcast together, which is the form that both dense masks and FlexAttention want.

    Args:
        rows: The layout.
        row: Row index.
        query: Column of the query.
        key: Column of the key.
        window: Keys this many positions back, or more, are out of sight; measured in position ids, since
            columns count other completions too.
    """
    key_completion = rows.completion[row, key]
    seen = (
        (key <= query)
        & (rows.sequence[row, key] == rows.sequence[row, query])
        & ((key_completion == _PROMPT) | (key_completion == rows.completion[row, query]))
    )
    if window is not None:
        seen = seen & (rows.position_ids[row, query] - rows.position_ids[row, key] < window)
    return seen


def _shared_rows(batch: CompletionBatch, sizes: _Sizes, packed: list[list[int]], width: int) -> InputRows:
    """Rows in which each prompt is followed by its completions; `packed` says which prompts share a row."""
    pieces: list[_Piece] = []
    first = [0] * len(sizes.completions)
    after = [0] * len(sizes.completions)
    for row, prompts in enumerate(packed):
        column = 0
        for prompt in prompts:
            length = sizes.prompts[prompt]
            pieces.append(_Piece(row, column, sizes.prompt_starts[prompt], length, 0, prompt, _PROMPT))
            column += length
            last = row * width + column - 1
            for number, completion in enumerate(sizes.answers[prompt], start=1):
                size, start = sizes.completions[completion], sizes.completion_starts[completion]
                pieces.append(_Piece(row, column, start, size, length, prompt, number))
                first[completion], after[completion] = last, row * width + column
                column += size
    return _rows(batch, pieces, shape=(len(packed), width), first=first, after=after, shared=True)


def _rows(
    batch: CompletionBatch,
    pieces: list[_Piece],
    *,
    shape: tuple[int, int],
    first: list[int],
    after: list[int],
    shared: bool,
) -> InputRows:
    """Build the tensors: indices on the CPU, one copy to the batch's device, one gather of ids there."""
    device = batch.prompt_ids.device
    table = torch.tensor(
        [
            [p.row * shape[1] + p.column, p.start, p.length, p.position, p.sequence, p.completion]
            for p in pieces
        ]
    )
    offsets = _ranges(table[:, 2])
    destination, start, position, sequence, completion = (
        table[:, column].repeat_interleave(table[:, 2]) for column in (0, 1, 3, 4, 5)
    )
    destination = destination + offsets
    indices = torch.zeros(4, shape[0] * shape[1], dtype=torch.long)
    indices[2].fill_(_PADDING)
    indices[:, destination] = torch.stack([start + offsets, position + offsets, sequence, completion])
    lengths = batch.completion_lengths
    within = _ranges(lengths)
    predict = torch.tensor(after).repeat_interleave(lengths) + within - 1
    predict[within == 0] = torch.tensor(first)
    targets = batch.completion_ids
    if batch.counted is not None:
        # The head need not run where nothing is asked of it.
        places = batch.counted.nonzero().squeeze(1)
        predict, targets = predict[places], targets[send(places, device)]
    last = torch.tensor(after) + lengths - 1
    source, position_ids, sequence, completion = send(indices, device).view(4, *shape).unbind()
    ids = torch.cat([batch.prompt_ids, batch.completion_ids])
    return InputRows(
        input_ids=ids[source].masked_fill(sequence == _PADDING, 0),
        position_ids=position_ids,
        sequence=sequence,
        completion=completion,
        predict=send(predict, device),
        targets=targets,
        last=send(last, device),
        shared=shared,
        num_tokens=len(destination),
    )


def _ranges(lengths: Tensor) -> Tensor:
    """0 .. n - 1 for each n, end to end."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
