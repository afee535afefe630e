"""Formats of judged completions: `prompt`, `completion` and `label`, as text or as chat messages.

| name | columns |
|---|---|
| text | `prompt` and `completion`: text |
| chat | `prompt` and `completion`: text, taken as one user turn and its answer; with `system` |
| messages | `completion`: chat messages; `prompt`: messages, or text that is one user turn |

All take a column `weight`, a number of at least 0: what the row counts in losses and metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats.base import Format, Row, is_empty, read_number, read_text
from lightning_dpo.data.formats.turns import answer, as_messages, as_tools, check_continuation, with_system
from lightning_dpo.types import Feedback, Message

__all__ = ["FEEDBACK_FORMATS", "as_label", "parse_feedback"]

_TRUE = ("true", "1", "1.0", "up", "thumbs_up", "thumbs up", "\N{THUMBS UP SIGN}")
_FALSE = ("false", "0", "0.0", "down", "thumbs_down", "thumbs down", "\N{THUMBS DOWN SIGN}")
_LABELS = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}
"""Labels as they are written, in small letters."""


def as_label(value: Any) -> bool:
    """Read a label: true or false, 1 or 0, thumbs up or down.

    Raises:
        BadRow: If it is something else.
    """
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow(
            Reason.LABEL, f"`label` must be true or false, 1 or 0, or thumbs_up or thumbs_down, got {value!r}"
        )
    return label


def parse_feedback(row: Row, *, format: str) -> Feedback:
    """Read one row.

    Args:
        row: Column names and values.
        format: One of `FEEDBACK_FORMATS`.

    Returns:
        A prompt with one completion that is not empty, and its label.

    Raises:
        BadRow: If the row does not hold that.
    """
    feedback: Feedback = FEEDBACK_FORMATS[format].read(row)
    if is_empty(feedback.completion):
        raise BadRow(Reason.EMPTY, "`completion` is empty")
    weight = read_number(row, "weight")
    if weight == 0:
        raise BadRow(Reason.WEIGHTLESS, "`weight` is 0")
    return feedback if weight is None else replace(feedback, weight=weight)


def _is_text(row: Row) -> bool:
    return isinstance(row.get("completion"), str) and isinstance(row.get("prompt"), str) and "label" in row


def _is_chat(row: Row) -> bool:
    return _is_text(row) and isinstance(row.get("system"), str)


def _is_messages(row: Row) -> bool:
    parts = (row.get("completion"), row.get("prompt"))
    return "label" in row and all(parts) and any(isinstance(part, (list, tuple, Mapping)) for part in parts)


def _read_text(row: Row) -> Feedback:
    return Feedback(read_text(row, "prompt"), read_text(row, "completion"), _label(row))


def _read_chat(row: Row) -> Feedback:
    turns = with_system(row, [{"role": "user", "content": read_text(row, "prompt")}])
    return Feedback(turns, answer(read_text(row, "completion")), _label(row), as_tools(row))


def _read_messages(row: Row) -> Feedback:
    prompt, completion = row.get("prompt"), as_messages(row, "completion")
    turns: list[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_messages(row, "prompt")
    )
    if len(completion) > len(turns) and completion[: len(turns)] == turns:
        completion = completion[len(turns) :]  # the whole conversation
    check_continuation("completion", completion)
    return Feedback(with_system(row, turns), completion, _label(row), as_tools(row))


def _label(row: Row) -> bool:
    if "label" not in row:
        raise BadRow(Reason.MALFORMED, "`label` is missing")
    return as_label(row["label"])


FEEDBACK_FORMATS: Mapping[str, Format] = {
    "text": Format(_is_text, _read_text, is_chat=False),
    "chat": Format(_is_chat, _read_chat),
    "messages": Format(_is_messages, _read_messages, has_turns=True),
}
"""The formats by name, from the general to the special: a row is of the last one that fits it."""
