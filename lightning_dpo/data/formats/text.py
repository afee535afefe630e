"""Format "text": `chosen` and `rejected` as text, and `prompt` unless it is what both begin with."""

from __future__ import annotations

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats.base import Format, Row, has_text_completions, read_text, shared_length
from lightning_dpo.types import PreferencePair

__all__ = ["TEXT"]


def _read(row: Row) -> PreferencePair:
    chosen, rejected = read_text(row, "chosen"), read_text(row, "rejected")
    if row.get("prompt") is not None:
        return PreferencePair(read_text(row, "prompt"), chosen, rejected)
    if chosen == rejected:
        raise BadRow(Reason.IDENTICAL, "`chosen` and `rejected` are the same")
    # The prompt ends with the last white space of what both share, so that no word is cut in two.
    length = shared_length(chosen, rejected)
    while length and not chosen[length - 1].isspace():
        length -= 1
    prompt = chosen[:length].rstrip()
    if not prompt:
        raise BadRow(Reason.DIVERGING, "there is no `prompt` column and the completions begin differently")
    return PreferencePair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


TEXT = Format(has_text_completions, _read, is_chat=False)
"""Text that goes to the model as it is."""
