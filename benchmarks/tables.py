"""Medians, ratios with their spread, and tables of text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["aligned", "markdown", "median", "spread"]

T = TypeVar("T")


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(rounds: Iterable[T], ratio: Callable[[T], float]) -> str:
    """The median of a ratio that is taken within each round, and its range."""
    values = [ratio(each) for each in rounds]
    return f"{median(values):.2f}x ({min(values):.2f}-{max(values):.2f})"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """The same as a table of Markdown; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in table)
    return [head, "|---" * len(table[0]) + "|", *body]
