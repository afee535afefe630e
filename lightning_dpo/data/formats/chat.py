"""Format "chat": the columns of "text", taken as one user turn and its answers, with `system` and `tools`."""

from __future__ import annotations

from lightning_dpo.data.formats.base import Format, Row, has_text_completions, read_text
from lightning_dpo.data.formats.turns import answer, as_tools, with_system
from lightning_dpo.types import PreferencePair

__all__ = ["CHAT"]


def _fits(row: Row) -> bool:
    return has_text_completions(row) and all(isinstance(row.get(name), str) for name in ("prompt", "system"))


def _read(row: Row) -> PreferencePair:
    prompt, chosen, rejected = (read_text(row, name) for name in ("prompt", "chosen", "rejected"))
    turns = with_system(row, [{"role": "user", "content": prompt}])
    return PreferencePair(turns, answer(chosen), answer(rejected), as_tools(row))


CHAT = Format(_fits, _read)
"""One question and its two answers; only rows with a `system` text are detected as such."""
