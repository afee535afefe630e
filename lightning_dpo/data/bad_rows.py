"""What became of every row of a data set: kept, truncated, or left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias

__all__ = ["BadRow", "BadRowAction", "BadRowHandling", "Example", "Reason", "RowReport"]

BadRowAction: TypeAlias = Literal["drop", "raise"]


class Reason(StrEnum):
    """Why a row cannot be used."""

    MALFORMED = "malformed"
    UNICODE = "not valid Unicode"
    EMPTY = "empty completion"
    IDENTICAL = "identical completions"
    DIVERGING = "diverging prompts"
    LABEL = "not a label"
    TEMPLATE = "refused by the chat template"
    LONG = "over-long"
    WEIGHTLESS = "weight 0"


_WANTED = frozenset({Reason.LONG, Reason.WEIGHTLESS})
"""Reasons that are no fault of a row: the user asked for such rows to be left out."""


class BadRow(Exception):  # noqa: N818 - a finding about the data, not always an error
    """A row that cannot be used.

    Attributes:
        reason: What is wrong with it, as counted.
        detail: What is wrong with this one.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        # It may quote the row, and half a character can be printed nowhere.
        detail = detail.encode("utf-8", "backslashreplace").decode()
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BadRowHandling(NamedTuple):
    """What happens where rows are bad.

    Attributes:
        action: Go on without them ("drop"), or stop at the first ("raise").
        max_fraction: Stop if a larger share of the rows is bad.
    """

    action: BadRowAction = "drop"
    max_fraction: float = 0.05

    def check(self) -> None:
        """Check the settings, named as the arguments of `PreferenceDataModule`.

        Raises:
            ValueError: If one is out of range.
        """
        if self.action not in ("drop", "raise"):
            raise ValueError(f"`on_bad_row` must be 'drop' or 'raise', got {self.action!r}")
        if not 0 <= self.max_fraction <= 1:
            raise ValueError(f"`max_bad_fraction` must be between 0 and 1, got {self.max_fraction}")

    def apply_to_row(self, reason: Reason, *, place: str, detail: str) -> None:
        """Stop at a row that was left out, if that is wanted; over-long and weightless ones are not bad.

        Raises:
            ValueError: If it is bad, and the first bad row is to end the run.
        """
        if self.action == "raise" and reason not in _WANTED:
            raise ValueError(
                f"bad row at {place}, {reason}: {detail}. Correct it, or go on without it: "
                '`on_bad_row="drop"`'
            )

    def apply_to_report(self, report: RowReport, *, split: str) -> None:
        """Stop if too many rows of a split are bad.

        Args:
            report: What became of the rows.
            split: The argument that named them.

        Raises:
            ValueError: If there are more bad rows than are allowed.
        """
        for reason, example in report.examples.items():
            self.apply_to_row(reason, place=example.place, detail=example.detail)
        if report.bad_fraction > self.max_fraction:
            raise ValueError(
                f"`{split}` must have at most a share of {self.max_fraction:.1%} bad rows, got "
                f"{report.bad} of {report.rows} ({report.bad_fraction:.1%}). Correct them, or raise "
                f"`max_bad_fraction`.\n{report.table()}"
            )


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
        """Rows at fault. Over-long rows and rows of weight 0 are not: the user asked to leave them out."""
        return sum(count for reason, count in self.counts.items() if reason not in _WANTED)

    @property
    def bad_fraction(self) -> float:
        """Share of the rows that is at fault."""
        return self.bad / self.rows if self.rows else 0.0

    def add(self, reason: Reason, *, place: str, detail: str) -> None:
        """Count a row that was left out; call in the order of the rows."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, Example(place, detail))

    def merge(self, more: RowReport) -> None:
        """Add the rows of another report, which were read after those of this one."""
        self.rows += more.rows
        self.kept += more.kept
        self.truncated += more.truncated
        for reason, count in more.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, more.examples[reason])

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
        lines = [("left out", "rows", "first example")]
        lines += [(r, str(self.counts[r]), "{}: {}".format(*self.examples[r])) for r in ordered]
        return "\n".join([summary, *_aligned(lines)])

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
        """Read a report that `to_dict` wrote."""
        plain = {name: values[name] for name in ("source", "format", "rows", "kept", "truncated")}
        report = cls(**plain)
        for item in values["left_out"]:
            reason = Reason(item["reason"])
            report.counts[reason] = item["rows"]
            report.examples[reason] = Example(item["place"], item["detail"])
        return report


def _aligned(lines: Sequence[tuple[str, str, str]]) -> list[str]:
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return [f"  {a:<{first}}  {b:>{second}}  {c}" for a, b, c in lines]
