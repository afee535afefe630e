"""What became of every row of a data set: kept, truncated, or left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

__all__ = ["BadRow", "Example", "Reason", "RowReport"]


class Reason(StrEnum):
    """Why a row cannot be used."""

    MALFORMED = "malformed"
    EMPTY = "empty completion"
    IDENTICAL = "identical completions"
    DIVERGING = "diverging prompts"
    TEMPLATE = "refused by the chat template"
    LONG = "over-long"


class BadRow(Exception):  # noqa: N818 - a finding about the data, not always an error
    """A row that cannot be used.

    Attributes:
        reason: What is wrong with it, as counted.
        detail: What is wrong with this one.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Example(NamedTuple):
    """The first row that was left out for some reason.

    Attributes:
        place: Where it is, as ``file:line``.
        detail: What is wrong with it.
    """

    place: str
    detail: str


@dataclass(slots=True)
class RowReport:
    """Counts of the rows of one split; nothing is left out that is not counted here.

    Attributes:
        source: What was read.
        format: The format it was read as.
        rows: Rows that were read.
        kept: Rows that can be trained on.
        truncated: Kept rows that were shortened to fit.
        counts: Rows left out, by reason.
        examples: The first row left out for each reason.
    """

    source: str
    format: str
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    counts: dict[Reason, int] = field(default_factory=dict)
    examples: dict[Reason, Example] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """Rows at fault. Over-long rows are not: they are dropped only where the user asked for that."""
        return sum(count for reason, count in self.counts.items() if reason is not Reason.LONG)

    @property
    def bad_fraction(self) -> float:
        """Share of the rows that is at fault."""
        return self.bad / self.rows if self.rows else 0.0

    def add(self, reason: Reason, *, place: str, detail: str) -> None:
        """Count a row that was left out; call in the order of the rows."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, Example(place, detail))

    def table(self) -> str:
        """The report as aligned text."""
        summary = f"{self.source} ({self.format}): {self.rows} rows, {self.kept} kept"
        if self.truncated:
            summary += f" ({self.truncated} truncated)"
        if not self.counts:
            return summary
        left_out = self.rows - self.kept
        summary += f", {left_out} left out ({left_out / self.rows:.1%})"
        ordered = sorted(self.counts, key=lambda reason: -self.counts[reason])
        cells = [("left out", "rows", "first example")]
        cells += [(r, str(self.counts[r]), "{}: {}".format(*self.examples[r])) for r in ordered]
        return "\n".join([summary, *_aligned(cells)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "source": self.source,
            "format": self.format,
            "rows": self.rows,
            "kept": self.kept,
            "truncated": self.truncated,
            "left_out": [
                {"reason": str(reason), "rows": count, **self.examples[reason]._asdict()}
                for reason, count in self.counts.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RowReport:
        """The inverse of `to_dict`."""
        plain = {name: values[name] for name in ("source", "format", "rows", "kept", "truncated")}
        report = cls(**plain)
        for item in values["left_out"]:
            reason = Reason(item["reason"])
            report.counts[reason] = item["rows"]
            report.examples[reason] = Example(item["place"], item["detail"])
        return report


def _aligned(cells: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = list(cells)
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {a:<{first}}  {b:>{second}}  {c}" for a, b, c in rows]
