"""Rows with half of a surrogate pair, as scraped data has them, are bad rows like any other."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_rows import GOOD, jsonl, ready
from tiny_tokenizers import TOOLS, byte_level

from lightning_dpo.data.bad_rows import Reason

TOKENIZER = byte_level(template=TOOLS)
PAIR = {"prompt": "who", "chosen": "yes", "rejected": "no"}
ASKED = [{"role": "user", "content": "who"}]
BROKEN = [{"role": "user", "content": "who HALF"}]
TOOL = {"name": "look HALF", "description": ""}
DIALOGUE = "\n\nHuman: who HALF\n\nAssistant: "


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("text.jsonl", {**PAIR, "prompt": "the HALF sky"}, "prompt"),
        ("text.jsonl.gz", {**PAIR, "chosen": "HALF"}, "chosen"),
        ("text.json", {**PAIR, "rejected": "no HALF"}, "rejected"),
        ("chat.jsonl", {**PAIR, "system": "Be HALF brief."}, "prompt"),
        ("chat.jsonl", {**PAIR, "system": "", "tools": [TOOL]}, "prompt"),
        ("messages.jsonl", {**PAIR, "prompt": BROKEN}, "prompt"),
        ("messages.jsonl", {**PAIR, "prompt": ASKED, "rejected": "no HALF"}, "rejected"),
        ("messages.jsonl", {**PAIR, "prompt": ASKED, "tools": json.dumps([TOOL])}, "prompt"),
        ("messages.csv", {**PAIR, "prompt": BROKEN}, "prompt"),
        ("sharegpt.jsonl", {**PAIR, "conversations": ASKED, "chosen": "HALF"}, "chosen"),
        ("hh.jsonl", {"chosen": DIALOGUE + "yes", "rejected": DIALOGUE + "no"}, "prompt"),
    ],
)
def test_such_a_row_is_counted_with_its_place(
    tmp_path: Path, caplog, name: str, row: dict, column: str
) -> None:
    path = tmp_path / name
    lines = [json.dumps(row).replace("HALF", half) for half in ("half", r"\ud83d", r"\ud83d\ude00")]
    with (gzip.open if name.endswith(".gz") else open)(path, "wt", newline="") as file:
        if name.endswith(".csv"):
            prompts = [line[line.index("[") : line.index("]") + 1] for line in lines]
            csv.writer(file).writerows([row, *([prompt, "yes", "no"] for prompt in prompts)])
        else:
            file.write("[{},\n{},\n{}]".format(*lines) if name.endswith(".json") else "\n".join(lines))
    line = 3 if name.endswith(".csv") else 2
    with caplog.at_level(logging.INFO):
        report = ready(str(path), tokenizer=TOKENIZER, max_bad_fraction=0.5).report
    assert (report.format, report.rows, report.kept) == (name.split(".")[0], 3, 2)
    assert report.counts == {Reason.UNICODE: 1}
    place, detail = report.examples[Reason.UNICODE]
    assert place == f"{name}:{line}"
    assert f"the text of `{column}` has half of a surrogate pair" in detail
    assert r"\ud83d" in detail
    assert f"  not valid Unicode     1  {name}:{line}: the text" in caplog.text
    with pytest.raises(ValueError, match=f"bad row at {name}:{line}, not valid Unicode: the text of"):
        ready(str(path), tokenizer=TOKENIZER, on_bad_row="raise")


@pytest.mark.parametrize("as_table", [False, True])
def test_bytes_of_a_table_that_are_not_utf8(tmp_path: Path, tokenizer, as_table) -> None:
    columns = pa.Table.from_pylist(GOOD[:20])
    chosen = [row["chosen"].encode() for row in GOOD[:19]] + [b"\xed\xa0\x80"]
    column = pa.array(chosen, pa.binary()).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(columns.set_column(1, "chosen", column), path)
    train = datasets.Dataset.from_parquet(str(path), keep_in_memory=True) if as_table else str(path)
    report = ready(train, tokenizer=tokenizer).report
    assert (report.kept, report.counts) == (19, {Reason.UNICODE: 1})
    assert report.examples[Reason.UNICODE].place == ("Dataset:20" if as_table else "a.parquet:20")


def test_columns_that_are_not_used_may_hold_anything(tokenizer) -> None:
    assert ready([{**row, "url": "\ud800"} for row in GOOD], tokenizer=tokenizer).report.bad == 0


def test_a_file_with_nothing_else_is_refused_with_the_table(tokenizer) -> None:
    message = r"bad rows, got 40 of 40 (.|\n)*not valid Unicode +40  rows:1"
    with pytest.raises(ValueError, match=message):
        ready([{**row, "prompt": "\ud800"} for row in GOOD], tokenizer=tokenizer)


def test_what_a_message_quotes_can_be_printed(tokenizer) -> None:
    template = "{{ raise_exception(messages[0]['content']) }}"
    rows = [{"prompt": "\ud800", "chosen": "a", "rejected": "b"}]
    with pytest.raises(ValueError, match=r"raises: .ud800") as caught:
        ready(rows, tokenizer=tokenizer, format="chat", chat_template=template)
    str(caught.value).encode()


def strange_texts() -> st.SearchStrategy[str]:
    chosen = [
        "\ud800",
        "\udfff",
        "\x00",
        "\ufeff",
        "\uffff",
        "\u2028",
        "\u202e",
        "\x1b",
        "<|im_end|>",
        "{{",
        "\n\nHuman:",
    ]
    return st.lists(st.characters() | st.sampled_from(chosen)).map("".join)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(*[strange_texts()] * 4), max_size=4))
@pytest.mark.parametrize("kind", ["text", "chat", "messages", "hh"])
def test_no_text_ends_the_preparation(tmp_path: Path, kind: str, texts: list[tuple[str, ...]]) -> None:
    def row(prompt: str, chosen: str, rejected: str, more: str) -> dict[str, Any]:
        if kind == "hh":
            start = f"\n\nHuman: {prompt}\n\nAssistant:"
            return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}
        if kind != "messages":
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "system": more}
        turns = [{"role": "system", "content": more}, {"role": "user", "content": prompt}]
        return {"prompt": turns, "chosen": chosen, "rejected": rejected, "tools": [{"name": more}]}

    rows = [row("who", "yes", "no", "brief"), *(row(*part) for part in texts)]
    path = jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", rows)
    report = ready(path, tokenizer=TOKENIZER, format=kind, max_bad_fraction=1.0).report
    assert report.rows == len(rows) == report.kept + sum(report.counts.values())
    read = [json.loads(json.dumps("|".join(part[:3]))) for part in texts]  # two halves may meet
    broken = [text for text in read if any("\ud800" <= character <= "\udfff" for character in text)]
    assert report.kept <= len(rows) - len(broken)


@pytest.mark.parametrize(
    "line", ['{"prompt": ' + "[" * 100_000, "[" * 100_000, "\x00", '{"prompt": "a\x00"}', '{"chosen": 1e999}']
)
def test_no_line_ends_the_preparation(tmp_path: Path, tokenizer, line: str) -> None:
    report = ready(jsonl(tmp_path / "a.jsonl", [*GOOD, line]), tokenizer=tokenizer).report
    assert (report.kept, report.counts) == (40, {Reason.MALFORMED: 1})
