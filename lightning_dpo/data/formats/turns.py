"""Chat turns as public data sets write them -> messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats.base import Row
from lightning_dpo.types import Message, PreferencePair

__all__ = ["answer", "as_messages", "as_tools", "check_continuation", "conversation", "with_system"]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
_KNOWN_ROLES = frozenset({"user", "assistant", "system", "developer", "tool"})


def answer(text: str) -> list[Message]:
    """The text of an answer as a conversation of one turn."""
    return [{"role": "assistant", "content": text}]


def as_messages(row: Row, column: str) -> list[Message]:
    """Read a column of turns: a list of them, a single one, or the text of an answer.

    Raises:
        BadRow: If it holds something else.
    """
    value = row.get(column)
    if isinstance(value, str):
        return answer(value)
    if isinstance(value, Mapping):
        value = [value]
    if value is None or (isinstance(value, (list, tuple)) and not value and column != "prompt"):
        reason = Reason.EMPTY if column in ("chosen", "rejected", "completion") else Reason.MALFORMED
        raise BadRow(reason, f"`{column}` is {'missing' if value is None else 'empty'}")
    if not isinstance(value, (list, tuple)):
        raise BadRow(Reason.MALFORMED, f"`{column}` is not a list of messages but {type(value).__name__}")
    return [_message(turn, column) for turn in value]


def as_tools(row: Row) -> list[dict[str, Any]] | None:
    """Read the tool schemas of a row, a list or JSON text; None where there are none.

    Raises:
        BadRow: If they are something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRow(Reason.MALFORMED, f"`tools` is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(Reason.MALFORMED, "`tools` is not a list of schemas")
    return [dict(tool) for tool in tools]


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """Put the row's `system` column, where it has one, before its turns."""
    system = row.get("system")
    if not isinstance(system, str) or not system or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def conversation(
    row: Row, turns: list[Message], chosen: list[Message], rejected: list[Message]
) -> PreferencePair:
    """Make a pair of two ways to go on with a conversation, with the row's `system` and `tools` columns.

    Args:
        row: Where the other columns are.
        turns: The prompt.
        chosen: The preferred continuation.
        rejected: The other continuation.

    Raises:
        BadRow: If there is no prompt, or a continuation does not begin with a model's turn and end as one.
    """
    for name, part in (("chosen", chosen), ("rejected", rejected)):
        check_continuation(name, part)
    if not turns:
        raise BadRow(Reason.DIVERGING, "there is no prompt: the conversations share no turn")
    return PreferencePair(with_system(row, turns), chosen, rejected, as_tools(row))


def check_continuation(column: str, part: list[Message]) -> None:
    """Refuse a continuation that a model does not begin, or that ends with a turn that asks it to go on.

    Turns of users and tools in between are what a model is answered; none of them is trained on.

    Args:
        column: Where the conversation is.
        part: Its turns behind the prompt.

    Raises:
        BadRow: If its first turn is not the assistant's, or its last one neither that nor a tool's answer.
    """
    if part and part[0]["role"] != "assistant":
        where = "a tool's answer first" if part[0]["role"] == "tool" else f"a {part[0]['role']} turn"
        raise BadRow(Reason.DIVERGING, f"where the conversations part, `{column}` has {where}")
    if part and part[-1]["role"] not in ("assistant", "tool"):
        raise BadRow(Reason.MALFORMED, f"`{column}` ends with a {part[-1]['role']} turn")


def _message(turn: Any, column: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(Reason.MALFORMED, f"a turn of `{column}` is not an object but {type(turn).__name__}")
    name = turn.get("role", turn.get("from"))
    if name == "function_call":
        return _function_call(turn.get("value", turn.get("content")), column)
    role = _ROLES.get(name, name) if isinstance(name, str) else None
    if role not in _KNOWN_ROLES:
        raise BadRow(Reason.MALFORMED, f"a turn of `{column}` has the role {name!r}")
    rest = {
        key: value
        for key, value in turn.items()
        if key not in ("role", "from", "content", "value", "weight") and value is not None
    }
    return {"role": role, "content": _content(turn, column), **rest}


def _content(turn: Mapping[str, Any], column: str) -> str:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        return content
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise BadRow(Reason.MALFORMED, f"a turn of `{column}` has content that is not text")


def _function_call(value: Any, column: str) -> Message:
    """ShareGPT writes a tool call as JSON text in a turn of its own."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(Reason.MALFORMED, f"a function_call of `{column}` is not JSON: {error}") from None
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(isinstance(c, Mapping) and "name" in c for c in calls):
        raise BadRow(Reason.MALFORMED, f"a function_call of `{column}` does not name a function")
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }
