from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data_files import ROWS, contents, write

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.readers import Record, decode, read_file
from lightning_dpo.data.sources import open_source

NAMES = [
    "a.jsonl",
    "a.jsonl.gz",
    "a.json",
    "a.json.gz",
    "a.csv",
    "a.csv.gz",
    "a.tsv",
    "a.parquet",
    "a.ndjson",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_type_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    source = open_source(str(write(tmp_path / name, ROWS)), split="train")
    assert contents(source) == ROWS
    assert contents(source) == ROWS  # any number of times
    assert {file for file, _ in source} == {name}


def test_lines_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}\r\n{"a": ')
    records = list(read_file(path))
    assert [record.line for record in records] == [1, 4, 5]
    assert [decode(record) for record in records[:2]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(BadRow, match="not JSON") as caught:
        decode(records[2])
    assert caught.value.reason is Reason.MALFORMED
    # The header, then a value over two lines.
    assert [record.line for record in read_file(write(tmp_path / "a.csv", ROWS))] == [2, 4, 5]
    # An indented array: `[`, then five lines for each row.
    assert [record.line for record in read_file(write(tmp_path / "a.json", ROWS))] == [2, 7, 12]
    assert [record.line for record in read_file(write(tmp_path / "a.parquet", ROWS))] == [1, 2, 3]


def test_rows_that_are_no_objects_are_malformed() -> None:
    for content in (b"[1]", b'"text"', b"null", b"\xff\xfe{"):
        with pytest.raises(BadRow) as caught:
            decode(Record(1, content))
        assert caught.value.reason is Reason.MALFORMED


def test_an_array_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    # 5 MB: an element of 2 MB, and so many others that one lies across the end of any piece.
    rows = [{"n": n, "text": 'é]}"' * (n * 2)} for n in range(600)]
    rows[300]["text"] = "x" * 2_000_000
    path = write(tmp_path / "a.json", rows)
    assert path.stat().st_size > 4e6
    assert [decode(record) for record in read_file(path)] == rows
    assert [record.line for record in read_file(path)] == [2 + 4 * n for n in range(600)]
    path.write_text(json.dumps(list(range(200_000))))
    assert [record.content for record in read_file(path)] == [str(n).encode() for n in range(200_000)]


def test_an_array_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": 2},\n{"a"')
    *good, last = read_file(path)
    assert [decode(record) for record in good] == [{"a": 1}, {"a": 2}]
    with pytest.raises(BadRow, match="breaks off"):
        decode(last)
    assert last.line == 3


def test_a_csv_row_with_another_number_of_values_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\n")
    first, short, long = read_file(path)
    assert decode(first) == {"prompt": "a", "chosen": "b", "rejected": "c"}
    for record, line in ((short, 3), (long, 4)):
        assert record.line == line
        with pytest.raises(BadRow, match="3 values"):
            decode(record)


def test_a_csv_file_with_a_column_without_a_name_is_read(tmp_path: Path) -> None:
    # What pandas' DataFrame.to_csv writes unless it is told to leave the index out.
    path = tmp_path / "a.csv"
    path.write_text(",prompt,chosen,rejected\n0,a,b,c\n1,a,b\n")
    good, short = read_file(path)
    assert decode(good) == {"": "0", "prompt": "a", "chosen": "b", "rejected": "c"}
    assert (good.line, short.line) == (2, 3)
    with pytest.raises(BadRow, match="4 values of the first line, ',prompt,chosen,rejected'"):
        decode(short)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.csv", "prompt,chosen,rejected\na,é,ü\na,b,c\n", 2),
        ("a.json", '[\n{"prompt": "a", "chosen": "é", "rejected": "b"},\n{"prompt": "c"}]', 2),
    ],
)
def test_text_in_another_encoding_is_no_row(tmp_path: Path, name: str, text: str, line: int) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert "é" in dict(decode(next(iter(read_file(path))))).values()
    path.write_text(text, encoding="latin-1")  # as Excel saves "CSV"
    bad, good = read_file(path)
    with pytest.raises(BadRow, match=r"not UTF-8 .*; save the file as UTF-8") as caught:
        decode(bad)
    assert (caught.value.reason, bad.line) == (Reason.UNICODE, line)
    assert decode(good)


def test_messages_in_a_csv_file_are_json(tmp_path: Path) -> None:
    row = {"chosen": [{"role": "user", "content": "a"}], "rejected": '[{"x": 1}]', "prompt": "{brace"}
    path = write(tmp_path / "a.csv", [{**row, "chosen": json.dumps(row["chosen"])}])
    assert contents(open_source(str(path), split="train")) == [row]


def test_keys_that_arrow_adds_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"tools": [{"name": "a", "city": "x"}], "chosen": [{"role": "assistant", "content": "b"}]},
        {"tools": [{"name": "b", "day": "y"}], "chosen": [{"role": "tool", "name": "n", "content": "c"}]},
    ]
    path = write(tmp_path / "a.parquet", rows)
    assert pq.read_table(path).to_pylist() != rows
    assert contents(open_source(str(path), split="train")) == rows


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-9])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"the file '.*{path.name}' cannot be read"):
            list(read_file(path))
