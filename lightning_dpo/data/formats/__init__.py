"""Public data set formats -> PreferencePair.

| name | columns |
|---|---|
| text | `chosen`, `rejected` and optionally `prompt`: text; without a prompt, what both begin with is it |
| chat | `prompt`, `chosen`, `rejected`: text, taken as one user turn and its answers; with `system` |
| hh | `chosen`, `rejected`: whole dialogues as text, turns marked Human and Assistant (hh-rlhf) |
| messages | `chosen`, `rejected`, optionally `prompt`: chat messages; `prompt` may be text (UltraFeedback) |
| sharegpt | `conversations`: the turns before `chosen` and `rejected`, one turn each |

Messages take `role` and `content`, or ShareGPT's `from` and `value`. Formats other than text and hh also take
`system` and `tools` columns, and all formats those of `NUMBER_COLUMNS`. A further format is a file with a
`Format`, and a line in `FORMATS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats.base import Format, Row, is_empty, kind_of, read_number
from lightning_dpo.data.formats.chat import CHAT
from lightning_dpo.data.formats.feedback import FEEDBACK_FORMATS, parse_feedback
from lightning_dpo.data.formats.hh import HH, hh_text
from lightning_dpo.data.formats.messages import MESSAGES
from lightning_dpo.data.formats.sharegpt import SHAREGPT
from lightning_dpo.data.formats.text import TEXT
from lightning_dpo.types import Feedback, PreferencePair

__all__ = [
    "FEEDBACK",
    "FEEDBACK_FORMATS",
    "FORMATS",
    "NUMBER_COLUMNS",
    "PAIRS",
    "Format",
    "Row",
    "RowKind",
    "detect_format",
    "hh_text",
    "parse_row",
]

FORMATS: Mapping[str, Format] = {
    "text": TEXT,
    "chat": CHAT,
    "hh": HH,
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
}
"""The formats by name, from the general to the special: a row is of the last one that fits it."""

NUMBER_COLUMNS = ("margin", "weight")
"""Optional columns of every format of pairs, numbers of at least 0.

`margin` is by how much the chosen completion's score is above the rejected one's, `weight` what the pair
counts in losses and metrics.
"""


def parse_row(row: Row, *, format: str) -> PreferencePair:
    """Read one row.

    Args:
        row: Column names and values.
        format: One of `FORMATS`.

    Returns:
        A pair with two different, non-empty completions of one prompt.

    Raises:
        BadRow: If the row does not hold that.
    """
    pair: PreferencePair = FORMATS[format].read(row)
    for name in ("chosen", "rejected"):
        if is_empty(getattr(pair, name)):
            raise BadRow(Reason.EMPTY, f"`{name}` is empty")
    if pair.chosen == pair.rejected:
        raise BadRow(Reason.IDENTICAL, "`chosen` and `rejected` are the same")
    margin, weight = (read_number(row, name) for name in NUMBER_COLUMNS)
    if weight == 0:
        raise BadRow(Reason.WEIGHTLESS, "`weight` is 0")
    return pair if margin is None and weight is None else replace(pair, margin=margin, weight=weight)


class RowKind(NamedTuple):
    """What rows hold: pairs, or judged completions.

    Attributes:
        formats: The ways in which they are written, by name.
        parse: Reads one row that is written in the format of that name.
        columns: What columns they have, in the words of an error message.
        example: One of them.
        others: The formats of the other kind, which may have been given by mistake.
        hint: What to do then.
        numbers: Optional columns of numbers.
    """

    formats: Mapping[str, Format]
    parse: Callable[..., PreferencePair | Feedback]
    columns: str
    example: str
    others: Mapping[str, Format]
    hint: str
    numbers: tuple[str, ...] = ()


PAIRS = RowKind(
    FORMATS,
    parse_row,
    "`chosen` and `rejected` (text or messages), with `prompt` or `conversations` where they do not hold the "
    "prompt",
    "chosen",
    FEEDBACK_FORMATS,
    "These are judged completions and no pairs: read them with FeedbackDataModule, without "
    "`unpaired_from_pairs`, and train with KTOModule",
    NUMBER_COLUMNS,
)
FEEDBACK = RowKind(
    FEEDBACK_FORMATS,
    parse_feedback,
    "`prompt`, `completion` (text or messages) and `label` (true or false)",
    "completion",
    FORMATS,
    "These are pairs: set `unpaired_from_pairs: true` to make two judged completions of each, or read them "
    "with PreferenceDataModule and train with DPOModule",
    ("weight",),
)


def detect_format(rows: Iterable[Row], *, argument: str = "train", kind: RowKind = PAIRS) -> str:
    """Find the format of a data set from a few of its rows.

    Args:
        rows: Rows from its start; the format that fits most of them is taken.
        argument: Named in the error.
        kind: What the rows should hold.

    Raises:
        ValueError: If no format fits.
    """
    columns: dict[str, str] = {}
    votes: Counter[str] = Counter()
    strays = 0
    for row in rows:
        columns |= {str(name): kind_of(value) for name, value in row.items()}
        fitting = [name for name, format in kind.formats.items() if format.fits(row)]
        votes.update(fitting[-1:])
        strays += any(format.fits(row) for format in kind.others.values())
    if votes:
        return votes.most_common(1)[0][0]
    found = ", ".join(f"{name} ({type})" for name, type in columns.items()) or "no rows"
    fix = (
        f'Rename columns with `columns={{"{kind.example}": "your_column"}}`, or name a `format`: '
        f"{', '.join(kind.formats)}"
    )
    raise ValueError(
        f"`{argument}` must have columns {kind.columns}; got {found}. {kind.hint if strays else fix}"
    )
