from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.formats import detect_format, hh_text, parse_row
from lightning_dpo.types import PreferencePair


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"name": "weather", "parameters": {"city": "string"}}

# name, row, what it must become
CASES = [
    (
        "text",
        {"prompt": "Sky?", "chosen": " blue", "rejected": " green"},
        PreferencePair("Sky?", " blue", " green"),
    ),
    (
        "text",
        {"chosen": "The sky is blue.", "rejected": "The sky is blunt."},
        PreferencePair("The sky is", " blue.", " blunt."),
    ),
    (
        "chat",
        {"system": "Be brief.", "prompt": "Sky?", "chosen": "blue", "rejected": "green"},
        PreferencePair([SYSTEM, user("Sky?")], [assistant("blue")], [assistant("green")]),
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nWhich colour?\n\nAssistant: Blue",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nWhich colour?\n\nAssistant: Red",
        },
        PreferencePair(
            [user("Hi"), assistant("Yes?"), user("Sky?\n\nWhich colour?")],
            [assistant("Blue")],
            [assistant("Red")],
        ),
    ),
    (
        "hh",
        {"prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": " Blue", "rejected": " Red"},
        PreferencePair([user("Sky?")], [assistant("Blue")], [assistant("Red")]),
    ),
    (  # explicit prompt
        "messages",
        {"prompt": [SYSTEM, user("Sky?")], "chosen": [assistant("blue")], "rejected": [assistant("red")]},
        PreferencePair([SYSTEM, user("Sky?")], [assistant("blue")], [assistant("red")]),
    ),
    (  # implicit prompt, several turns
        "messages",
        {
            "chosen": [user("Hi"), assistant("Yes?"), user("Sky?"), assistant("blue")],
            "rejected": [user("Hi"), assistant("Yes?"), user("Sky?"), assistant("red")],
        },
        PreferencePair(
            [user("Hi"), assistant("Yes?"), user("Sky?")], [assistant("blue")], [assistant("red")]
        ),
    ),
    (  # explicit prompt that the completions repeat
        "messages",
        {
            "prompt": [user("Sky?")],
            "chosen": [user("Sky?"), assistant("blue")],
            "rejected": [user("Sky?"), assistant("red")],
        },
        PreferencePair([user("Sky?")], [assistant("blue")], [assistant("red")]),
    ),
    (  # UltraFeedback: the prompt as text, repeated as the first turn; further columns
        "messages",
        {
            "prompt": "Sky?",
            "prompt_id": "x",
            "chosen": [user("Sky?"), assistant("blue")],
            "rejected": [user("Sky?"), assistant("red")],
            "score_chosen": 8.0,
        },
        PreferencePair([user("Sky?")], [assistant("blue")], [assistant("red")]),
    ),
    (  # a prompt as text that the completions do not repeat
        "messages",
        {"prompt": "Sky?", "chosen": [assistant("blue")], "rejected": [assistant("red")]},
        PreferencePair([user("Sky?")], [assistant("blue")], [assistant("red")]),
    ),
    (  # answers as text, content in parts, single messages
        "messages",
        {"prompt": [user("Sky?")], "chosen": "blue", "rejected": "red"},
        PreferencePair([user("Sky?")], [assistant("blue")], [assistant("red")]),
    ),
    (
        "messages",
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Sky?"}]}],
            "chosen": assistant("blue"),
            "rejected": assistant("red"),
        },
        PreferencePair([user("Sky?")], [assistant("blue")], [assistant("red")]),
    ),
    (  # tools, as JSON text; a call and its answer are part of the completion
        "messages",
        {
            "prompt": [user("Rain?")],
            "chosen": [
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]},
                {"role": "tool", "name": "weather", "content": "dry"},
                assistant("No."),
            ],
            "rejected": [assistant("Yes.")],
            "tools": json.dumps([TOOL]),
        },
        PreferencePair(
            [user("Rain?")],
            [
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]},
                {"role": "tool", "content": "dry", "name": "weather"},
                assistant("No."),
            ],
            [assistant("Yes.")],
            tools=[TOOL],
        ),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes?"},
                {"from": "human", "value": "Sky?"},
            ],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "red"},
            "system": "Be brief.",
        },
        PreferencePair(
            [SYSTEM, user("Hi"), assistant("Yes?"), user("Sky?")], [assistant("blue")], [assistant("red")]
        ),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
                {"from": "observation", "value": "dry"},
            ],
            "chosen": [{"from": "gpt", "value": "No."}],
            "rejected": [{"from": "gpt", "value": "Yes."}],
            "tools": [TOOL],
        },
        PreferencePair(
            [
                user("Rain?"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
                    ],
                },
                {"role": "tool", "content": "dry"},
            ],
            [assistant("No.")],
            [assistant("Yes.")],
            tools=[TOOL],
        ),
    ),
]


@pytest.mark.parametrize(("name", "row", "pair"), CASES)
def test_each_format_is_detected_and_read(name: str, row: dict, pair: PreferencePair) -> None:
    assert detect_format([row]) == name
    assert parse_row(row, format=name) == pair


HH_START = "\n\nHuman: Hi\n\nAssistant:"

BAD = [
    ("text", {"prompt": "a", "chosen": " ", "rejected": "b"}, Reason.EMPTY, "`chosen` is empty"),
    ("text", {"prompt": "a", "chosen": "b", "rejected": None}, Reason.EMPTY, "`rejected` is missing"),
    ("text", {"prompt": "a", "chosen": "b"}, Reason.MALFORMED, "`rejected` is missing"),
    ("text", {"prompt": "a", "chosen": "b", "rejected": "b"}, Reason.IDENTICAL, "are the same"),
    ("text", {"chosen": "blue", "rejected": "red"}, Reason.DIVERGING, "no `prompt` column"),
    ("text", {"chosen": "same words", "rejected": "same words"}, Reason.IDENTICAL, "are the same"),
    ("text", {"prompt": "a", "chosen": 1, "rejected": "b"}, Reason.MALFORMED, "not text but int"),
    ("hh", {"chosen": HH_START, "rejected": HH_START + " No"}, Reason.EMPTY, "`chosen` is empty"),
    (
        "hh",
        {"chosen": HH_START + " A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
        Reason.DIVERGING,
        "before the last Assistant turn",
    ),
    (
        "hh",
        {"chosen": HH_START + " A\n\nHuman: Bye", "rejected": HH_START + " B"},
        Reason.MALFORMED,
        "does not end with an Assistant turn",
    ),
    ("hh", {"chosen": "Hi", "rejected": HH_START + " B"}, Reason.MALFORMED, "does not begin with"),
    (
        "messages",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        Reason.DIVERGING,
        "`chosen` has a user turn",
    ),
    (
        "messages",
        {
            "chosen": [user("a"), assistant("b"), user("c")],
            "rejected": [user("a"), assistant("x"), user("c"), assistant("e")],
        },
        Reason.MALFORMED,
        "`chosen` ends with a user turn",
    ),
    (
        "messages",
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        Reason.DIVERGING,
        "share no turn",
    ),
    (
        "messages",
        {"prompt": [user("a")], "chosen": [], "rejected": [assistant("b")]},
        Reason.EMPTY,
        "`chosen` is empty",
    ),
    (
        "messages",
        {"prompt": [user("a")], "chosen": [{"role": "wizard", "content": "b"}], "rejected": [assistant("c")]},
        Reason.MALFORMED,
        "role 'wizard'",
    ),
    (
        "messages",
        {"prompt": [user("a")], "chosen": [{"role": "assistant", "content": 3}], "rejected": "c"},
        Reason.MALFORMED,
        "content that is not text",
    ),
    (
        "messages",
        {"prompt": [user("a")], "chosen": "b", "rejected": "c", "tools": "{"},
        Reason.MALFORMED,
        "`tools` is not JSON",
    ),
    (
        "sharegpt",
        {"conversations": None, "chosen": "a", "rejected": "b"},
        Reason.MALFORMED,
        "`conversations` is missing",
    ),
]


@pytest.mark.parametrize(("name", "row", "reason", "detail"), BAD)
def test_bad_rows_say_why(name: str, row: dict, reason: Reason, detail: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(row, format=name)
    assert caught.value.reason is reason
    assert detail in caught.value.detail


def test_the_format_of_most_rows_is_taken() -> None:
    good = {"chosen": HH_START + " A", "rejected": HH_START + " B"}
    odd = {"chosen": "odd one", "rejected": "odd two"}
    assert detect_format([odd, good, good]) == "hh"


def test_a_wrong_column_names_what_is_there_and_the_fix() -> None:
    with pytest.raises(ValueError, match=r"`validation` must have columns.*question \(text\).*columns="):
        detect_format([{"question": "a", "good": "b", "bad": "c"}], argument="validation")


def test_hh_keeps_its_plain_form() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant:"
    pair = parse_row({"chosen": text + " Blue", "rejected": text + " Red"}, format="hh")
    assert hh_text(pair) == PreferencePair(text, " Blue", " Red")


def test_real_hh_rows_are_read_except_the_bad_ones(shared_data: Path) -> None:
    path = shared_data / "hh-harmless" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert detect_format(rows[:64]) == "hh"
    found: Counter[str] = Counter()
    for row in rows:
        try:
            pair = parse_row(row, format="hh")
        except BadRow as bad:
            found[bad.reason] += 1
            continue
        # Nothing is lost: the plain form is the row again, but for white space.
        plain = hh_text(pair)
        for name in ("chosen", "rejected"):
            assert (plain.prompt + getattr(plain, name)).split() == row[name].split()
    assert found == {Reason.EMPTY: 4}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_sharegpt_rows_are_read(shared_data: Path, language: str) -> None:
    rows = json.loads((shared_data / "sharegpt-dpo" / f"{language}.json").read_text(encoding="utf-8"))
    assert detect_format(rows) == "sharegpt"
    with_system = 0
    for row in rows:
        pair = parse_row(row, format="sharegpt")
        assert [m["content"] for m in pair.prompt] == [turn["value"] for turn in row["conversations"]]
        assert pair.chosen == [assistant(row["chosen"]["value"])]
        assert pair.rejected == [assistant(row["rejected"]["value"])]
        with_system += pair.prompt[0]["role"] == "system"
    assert (len(rows), with_system) == (150, {"en": 43, "zh": 28}[language])
