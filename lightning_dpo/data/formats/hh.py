"""Format "hh": `chosen` and `rejected` as whole dialogues in one text, turns marked as in hh-rlhf."""

from __future__ import annotations

import re

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats.base import Format, Row, has_text_completions, read_text
from lightning_dpo.types import Message, PreferencePair

__all__ = ["HH", "hh_text"]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_MARKS = {"user": _HUMAN, "assistant": _ASSISTANT}


def hh_text(pair: PreferencePair) -> PreferencePair:
    """A dialogue in the plain form of hh-rlhf, for tokenizers without a chat template.

    Args:
        pair: One that the format "hh" gave.
    """

    def write(messages: str | list[Message]) -> str:
        assert not isinstance(messages, str)
        return "".join(f"{_MARKS[message['role']]} {message['content']}" for message in messages)

    chosen, rejected = (write(part).removeprefix(_ASSISTANT) for part in (pair.chosen, pair.rejected))
    return PreferencePair(write(pair.prompt) + _ASSISTANT, chosen, rejected)


def _fits(row: Row) -> bool:
    if not has_text_completions(row):
        return False
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt.startswith(_HUMAN) and prompt.rstrip().endswith(_ASSISTANT)
    return all(row[name].startswith(_HUMAN) and _ASSISTANT in row[name] for name in ("chosen", "rejected"))


def _read(row: Row) -> PreferencePair:
    start = read_text(row, "prompt") if row.get("prompt") is not None else ""
    chosen, rejected = (_turns(start + read_text(row, name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow(Reason.DIVERGING, "the dialogues differ before the last Assistant turn")
    return PreferencePair(chosen[:-1], chosen[-1:], rejected[-1:])


def _turns(text: str, column: str) -> list[Message]:
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise BadRow(Reason.MALFORMED, f"`{column}` does not begin with '\\n\\nHuman:'")
    turns: list[Message] = [
        {"role": _ROLES[mark], "content": content.strip()}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1]["role"] != "assistant":
        raise BadRow(Reason.MALFORMED, f"`{column}` does not end with an Assistant turn")
    if len(turns) == 1:
        raise BadRow(Reason.MALFORMED, f"`{column}` has no Human turn")
    return turns


HH = Format(_fits, _read, as_text=hh_text)
"""Dialogues between Human and Assistant that part at the last answer."""
