"""Which format rows have, and record -> PreferencePair or Feedback."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats import PAIRS, Row, RowKind, detect_format
from lightning_dpo.data.readers import Record, decode
from lightning_dpo.data.sources import RowSource
from lightning_dpo.types import Feedback, PreferencePair

__all__ = ["PROBED_ROWS", "RowParser", "choose_parser"]

PROBED_ROWS = 64
"""How many rows are looked at before all are read."""


class RowParser(NamedTuple):
    """Record -> pair, or judged completion.

    Attributes:
        format: One of the formats of its kind.
        columns: Our name of a column -> its name in the data.
        kind: What the rows hold.
        numbers: Which of the kind's columns of numbers the data have.
    """

    format: str
    columns: Mapping[str, str]
    kind: RowKind = PAIRS
    numbers: tuple[str, ...] = ()

    def __call__(self, record: Record) -> PreferencePair | Feedback:
        """Read a record.

        Raises:
            BadRow: If it holds nothing that can be used.
        """
        pair = self.kind.parse(_renamed(decode(record), self.columns), format=self.format)
        for name in self.kind.numbers:
            if name not in self.numbers and getattr(pair, name) is not None:
                detail = f"`{name}` is given, but in none of the first {PROBED_ROWS} rows"
                raise BadRow(Reason.MALFORMED, detail)
        if "margin" in self.numbers and getattr(pair, "margin", None) is None:
            raise BadRow(Reason.MALFORMED, "`margin` is missing, and other rows have it")
        return pair


def choose_parser(
    source: RowSource,
    *,
    split: str,
    format: str | None,
    columns: Mapping[str, str],
    kind: RowKind = PAIRS,
) -> RowParser:
    """Check or detect the format, from the first rows.

    Args:
        source: The rows.
        split: The argument that named them.
        format: One of the formats of the kind; None detects it.
        columns: Our name of a column -> its name in the data.
        kind: What the rows should hold.

    Raises:
        ValueError: If there are no rows, the format is unknown, or the columns fit none.
    """
    if format is not None and format not in kind.formats:
        hint = f". {kind.hint}" if format in kind.others else ""
        raise ValueError(f"`format` must be one of {', '.join(kind.formats)}, got {format!r}{hint}")
    first = list(islice(source, PROBED_ROWS))
    if not first:
        raise ValueError(f"`{split}` must hold at least one row, got none in {source.name!r}")
    rows: list[Row] = []
    malformed: list[str] = []
    for file, record in first:
        try:
            row = decode(record)
            rows.append(row)
            if format is not None:
                kind.parse(_renamed(row, columns), format=format)
        except BadRow as error:
            if error.reason in (Reason.MALFORMED, Reason.UNICODE):
                malformed.append(f"{file}:{record.line}: {error.detail}")
    for ours, theirs in columns.items():
        if rows and not any(theirs in row for row in rows):
            raise ValueError(
                f"`columns` must name columns of `{split}` ({', '.join(map(str, rows[0]))}), "
                f"got {theirs!r} for {ours!r}"
            )
    if len(malformed) == len(first):
        expected = "rows" if format is None else f"rows of the format {format!r}"
        raise ValueError(
            f"`{split}` must hold {expected}, got none among the first {len(first)}; {malformed[0]}"
        )
    named = [_renamed(row, columns) for row in rows]
    numbers = tuple(name for name in kind.numbers if any(_is_given(row, name) for row in named))
    found = format or detect_format(named, argument=split, kind=kind)
    return RowParser(found, columns, kind, numbers)


def _is_given(row: Row, column: str) -> bool:
    value = row.get(column)
    return value is not None and str(value).strip() != ""


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if not columns:
        return row
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
