"""Public data set formats -> PreferencePair.

| name | columns |
|---|---|
| text | `chosen`, `rejected` and optionally `prompt`: text; without a prompt, what both begin with is it |
| chat | the same, taken as one user turn and its answers; with `system` where there is one |
| hh | `chosen`, `rejected`: whole dialogues as text, turns marked Human and Assistant (hh-rlhf) |
| messages | `chosen`, `rejected`, optionally `prompt`: chat messages; `prompt` may be text (UltraFeedback) |
| sharegpt | `conversations`: the turns before `chosen` and `rejected`, one turn each |

Messages take `role` and `content`, or ShareGPT's `from` and `value`. Formats other than text and hh also take
`system` and `tools` columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats.messages import as_messages, as_tools, with_system
from lightning_dpo.types import Message, PreferencePair

__all__ = ["FORMATS", "Row", "detect_format", "hh_text", "parse_row"]

Row: TypeAlias = Mapping[str, Any]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


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
    pair = FORMATS[format](row)
    for name in ("chosen", "rejected"):
        if _is_empty(getattr(pair, name)):
            raise BadRow(Reason.EMPTY, f"`{name}` is empty")
    if pair.chosen == pair.rejected:
        raise BadRow(Reason.IDENTICAL, "`chosen` and `rejected` are the same")
    return pair


def detect_format(rows: Iterable[Row], *, argument: str = "train") -> str:
    """Find the format of a data set from a few of its rows.

    Args:
        rows: Rows from its start; the format that fits most of them is taken.
        argument: Named in the error.

    Raises:
        ValueError: If no format fits.
    """
    columns: dict[str, str] = {}
    votes: Counter[str] = Counter()
    for row in rows:
        columns |= {str(name): _kind(value) for name, value in row.items()}
        name = _format_of(row)
        if name:
            votes[name] += 1
    if votes:
        return votes.most_common(1)[0][0]
    found = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "no rows"
    raise ValueError(
        f"`{argument}` must have columns `chosen` and `rejected` (text or messages), with `prompt` or "
        f"`conversations` where they do not hold the prompt; got {found}. Rename columns with "
        '`columns={"chosen": "your_column"}`, or name a `format`: ' + ", ".join(FORMATS)
    )


def hh_text(pair: PreferencePair) -> PreferencePair:
    """A dialogue in the plain form of hh-rlhf, for tokenizers without a chat template.

    Args:
        pair: One that the format "hh" gave.
    """

    def render(messages: str | list[Message]) -> str:
        assert not isinstance(messages, str)
        marks = {"user": _HUMAN, "assistant": _ASSISTANT}
        return "".join(f"{marks[message['role']]} {message['content']}" for message in messages)

    chosen, rejected = (render(part).removeprefix(_ASSISTANT) for part in (pair.chosen, pair.rejected))
    return PreferencePair(render(pair.prompt) + _ASSISTANT, chosen, rejected)


def _text(row: Row) -> PreferencePair:
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    if row.get("prompt") is not None:
        return PreferencePair(_string(row, "prompt"), chosen, rejected)
    if chosen == rejected:
        raise BadRow(Reason.IDENTICAL, "`chosen` and `rejected` are the same")
    # The prompt ends with the last white space of what both share, so that no word is cut in two.
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    while length and not chosen[length - 1].isspace():
        length -= 1
    prompt = chosen[:length].rstrip()
    if not prompt:
        raise BadRow(Reason.DIVERGING, "there is no `prompt` column and the completions begin differently")
    return PreferencePair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def _chat(row: Row) -> PreferencePair:
    prompt, chosen, rejected = (_string(row, name) for name in ("prompt", "chosen", "rejected"))
    turns = with_system(row, [{"role": "user", "content": prompt}])
    return PreferencePair(turns, _answer(chosen), _answer(rejected), as_tools(row))


def _hh(row: Row) -> PreferencePair:
    start = _string(row, "prompt") if row.get("prompt") is not None else ""
    chosen, rejected = (_hh_turns(start + _string(row, name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow(Reason.DIVERGING, "the dialogues differ before the last Assistant turn")
    return PreferencePair(chosen[:-1], chosen[-1:], rejected[-1:])


def _hh_turns(text: str, name: str) -> list[Message]:
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise BadRow(Reason.MALFORMED, f"`{name}` does not begin with '\\n\\nHuman:'")
    turns: list[Message] = [
        {"role": _HH_ROLES[mark], "content": content.strip()}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1]["role"] != "assistant":
        raise BadRow(Reason.MALFORMED, f"`{name}` does not end with an Assistant turn")
    if len(turns) == 1:
        raise BadRow(Reason.MALFORMED, f"`{name}` has no Human turn")
    return turns


def _messages(row: Row) -> PreferencePair:
    chosen, rejected = (as_messages(row, name) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        turns: list[Message] = [{"role": "user", "content": prompt}]
        repeated = any(_without_system(part)[:1] == turns for part in (chosen, rejected))
    else:
        turns = as_messages(row, "prompt") if prompt is not None else []
        repeated = not turns or (chosen[: len(turns)] == turns and rejected[: len(turns)] == turns)
    if repeated:
        shared = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        shared = min(shared, max(len(chosen), len(rejected)) - 1)
        turns, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return _conversation(row, turns, chosen, rejected)


def _sharegpt(row: Row) -> PreferencePair:
    turns, chosen, rejected = (as_messages(row, name) for name in ("conversations", "chosen", "rejected"))
    return _conversation(row, turns, chosen, rejected)


def _conversation(
    row: Row, turns: list[Message], chosen: list[Message], rejected: list[Message]
) -> PreferencePair:
    for name, part in (("chosen", chosen), ("rejected", rejected)):
        strays = [message["role"] for message in part if message["role"] not in ("assistant", "tool")]
        if strays or (part and part[0]["role"] != "assistant"):
            where = f"a {strays[0]} turn" if strays else "a tool's answer first"
            raise BadRow(Reason.DIVERGING, f"where the conversations part, `{name}` has {where}")
    if not turns:
        raise BadRow(Reason.DIVERGING, "there is no prompt: the conversations share no turn")
    return PreferencePair(with_system(row, turns), chosen, rejected, as_tools(row))


def _without_system(turns: list[Message]) -> list[Message]:
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _string(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if value is None and name != "prompt":
        raise BadRow(Reason.EMPTY if name in row else Reason.MALFORMED, f"`{name}` is missing")
    raise BadRow(Reason.MALFORMED, f"`{name}` is not text but {_kind(value)}")


def _is_empty(completion: str | list[Message]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or (not completion[-1]["content"].strip() and not completion[-1].get("tool_calls"))


def _format_of(row: Row) -> str | None:
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if not chosen or not rejected:
        return None
    if row.get("conversations") is not None:
        return "sharegpt"
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, (list, tuple)):
            return "messages"
        return _text_format(row, prompt, chosen, rejected)
    if isinstance(chosen, (list, tuple, Mapping)) and isinstance(rejected, (list, tuple, Mapping)):
        return "messages"
    return None


def _text_format(row: Row, prompt: Any, chosen: str, rejected: str) -> str | None:
    if isinstance(prompt, str):
        if prompt.startswith(_HUMAN) and prompt.rstrip().endswith(_ASSISTANT):
            return "hh"
        return "chat" if isinstance(row.get("system"), str) else "text"
    dialogue = all(text.startswith(_HUMAN) and _ASSISTANT in text for text in (chosen, rejected))
    return "hh" if dialogue else "text"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return f"list of {_kind(value[0])}" if value else "empty list"
    return "object" if isinstance(value, Mapping) else type(value).__name__


FORMATS: Mapping[str, Callable[[Row], PreferencePair]] = {
    "text": _text,
    "chat": _chat,
    "hh": _hh,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
"""How a row of each format is read."""
