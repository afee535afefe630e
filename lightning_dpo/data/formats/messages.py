"""Format "messages": `chosen` and `rejected` as chat messages, `prompt` as messages, as text or repeated."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_dpo.data.formats.base import Format, Row, has_text_completions, shared_length
from lightning_dpo.data.formats.turns import as_messages, conversation
from lightning_dpo.types import Message, PreferencePair

__all__ = ["MESSAGES"]


def _fits(row: Row) -> bool:
    if has_text_completions(row):
        return isinstance(row.get("prompt"), (list, tuple))
    completions = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(value, (list, tuple, Mapping)) and value for value in completions)


def _read(row: Row) -> PreferencePair:
    chosen, rejected = (as_messages(row, name) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        turns: list[Message] = [{"role": "user", "content": prompt}]
        repeated = any(_without_system(part)[:1] == turns for part in (chosen, rejected))
    else:
        turns = as_messages(row, "prompt") if prompt is not None else []
        repeated = not turns or (chosen[: len(turns)] == turns and rejected[: len(turns)] == turns)
    if repeated:
        shared = min(shared_length(chosen, rejected), max(len(chosen), len(rejected)) - 1)
        turns, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return conversation(row, turns, chosen, rejected)


def _without_system(turns: list[Message]) -> list[Message]:
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


MESSAGES = Format(_fits, _read, has_turns=True)
"""Conversations as chat templates take them, such as UltraFeedback."""
