"""What the formats share: what a format is, and how text is read from a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.types import Message

__all__ = [
    "Format",
    "Row",
    "has_text_completions",
    "is_empty",
    "kind_of",
    "read_number",
    "read_text",
    "shared_length",
]

_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
"""About the smallest float32 above 0, with all its digits, and the largest."""

Row: TypeAlias = Mapping[str, Any]
"""One row of a data file: column names and values."""


class Format(NamedTuple):
    """A way in which public data sets write preference pairs or judged completions.

    Attributes:
        fits: Whether a row looks like it; it may assume that no format further down in `FORMATS` fits.
        read: Row -> pair or judged completion. It raises `BadRow` where the row does not hold one.
        is_chat: Whether its parts are messages, for which the tokenizer needs a chat template.
        as_text: Messages -> text, for tokenizers without a chat template; None if there is no such form.
        has_turns: Whether completions may be of several turns.
    """

    fits: Callable[[Row], bool]
    read: Callable[[Row], Any]
    is_chat: bool = True
    as_text: Callable[[Any], Any] | None = None
    has_turns: bool = False


def has_text_completions(row: Row) -> bool:
    """Whether `chosen` and `rejected` are both text, and not empty."""
    completions = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(completion, str) and completion for completion in completions)


def read_text(row: Row, column: str) -> str:
    """Read a column of text.

    Raises:
        BadRow: If it is missing or holds something else.
    """
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None and column != "prompt":
        raise BadRow(Reason.EMPTY if column in row else Reason.MALFORMED, f"`{column}` is missing")
    raise BadRow(Reason.MALFORMED, f"`{column}` is not text but {kind_of(value)}")


def read_number(row: Row, column: str) -> float | None:
    """Read an optional column of numbers that are at least 0; in CSV files they are text.

    Returns:
        The number, as 0 where it is too small for float32; None where the row has none.

    Raises:
        BadRow: If it holds something else.
    """
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    is_number = isinstance(value, (int, float, Decimal, str)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= _LARGEST:
        shown = repr(value) if is_number else kind_of(value)
        raise BadRow(Reason.MALFORMED, f"`{column}` is not a finite number of at least 0 but {shown:.40}")
    return number if number >= _SMALLEST else 0.0


def kind_of(value: Any) -> str:
    """What a column holds, in the words of an error message."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return f"list of {kind_of(value[0])}" if value else "empty list"
    return "object" if isinstance(value, Mapping) else type(value).__name__


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters or turns two sequences have in common at their start."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def is_empty(completion: str | list[Message]) -> bool:
    """Whether a completion says nothing: no text, and no tool call."""
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or (not completion[-1]["content"].strip() and not completion[-1].get("tool_calls"))
