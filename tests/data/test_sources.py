from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_dpo.data.bad_rows import BadRow, Reason
from lightning_dpo.data.readers import Record, decode, read_file
from lightning_dpo.data.sources import open_source

ROWS = [
    {"prompt": "Sky?", "chosen": "blue\nof course", "rejected": "red"},
    {"prompt": "Sea?", "chosen": "gré\u2028en, “mostly”", "rejected": 'a "stone"'},
    {"prompt": "Sun?", "chosen": "yellow", "rejected": "[not json"},
]


def write(path: Path, rows: list[dict]) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=2, ensure_ascii=False)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def contents(source) -> list[dict]:
    return [dict(decode(record)) for _, record in source]


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


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": n, "text": "x" * n} for n in range(60)]
    path = write(tmp_path / "a.json", rows)
    monkeypatch.setattr("lightning_dpo.data.readers._CHUNK", 7)
    assert [decode(record) for record in read_file(path)] == rows
    assert [record.line for record in read_file(path)] == [2 + 4 * n for n in range(60)]


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


class TestSources:
    def test_a_folder_is_its_files_in_order(self, tmp_path: Path) -> None:
        write(tmp_path / "b.csv", ROWS[2:])
        write(tmp_path / "a.jsonl.gz", ROWS[:2])
        (tmp_path / "README.md").write_text("not data")
        source = open_source(str(tmp_path), split="train")
        assert contents(source) == ROWS
        assert [file for file, _ in source] == ["a.jsonl.gz", "a.jsonl.gz", "b.csv"]

    def test_files_named_after_splits_are_told_apart(self, tmp_path: Path) -> None:
        write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
        write(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:2])
        write(tmp_path / "test.jsonl", ROWS[2:])
        assert contents(open_source(str(tmp_path), split="train")) == ROWS[:2]
        assert contents(open_source(str(tmp_path), split="validation")) == ROWS[2:]
        (tmp_path / "test.jsonl").unlink()
        with pytest.raises(ValueError, match=r"`validation` must find files named after the split"):
            open_source(str(tmp_path), split="validation")

    def test_a_pattern_and_a_list_join_files(self, tmp_path: Path) -> None:
        paths = [str(write(tmp_path / f"{n}.jsonl", [row])) for n, row in enumerate(ROWS)]
        assert contents(open_source(str(tmp_path / "*.jsonl"), split="train")) == ROWS
        assert contents(open_source(paths[::-1], split="train")) == ROWS[::-1]

    def test_data_sets_in_memory_and_on_disk(self, tmp_path: Path) -> None:
        table = datasets.Dataset.from_list(ROWS)
        assert contents(open_source(table, split="train")) == ROWS
        assert contents(open_source(ROWS, split="train")) == ROWS
        table.save_to_disk(str(tmp_path / "one"))
        assert contents(open_source(str(tmp_path / "one"), split="train")) == ROWS
        splits = datasets.DatasetDict({"train": table.select([0, 1]), "test": table.select([2])})
        splits.save_to_disk(str(tmp_path / "two"))
        assert contents(open_source(str(tmp_path / "two"), split="train")) == ROWS[:2]
        assert contents(open_source(str(tmp_path / "two"), split="validation")) == ROWS[2:]

    def test_a_hub_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load_dataset(name, configuration, *, split):
            asked.append((name, configuration, split))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "test"])
        assert contents(open_source("org/pairs", split="train")) == ROWS
        open_source("org/pairs", split="validation")
        open_source("org/pairs:train_prefs", split="train")
        open_source("org/pairs:small:dev", split="train")
        assert asked == [
            ("org/pairs", None, "train"),
            ("org/pairs", None, "test"),
            ("org/pairs", None, "train_prefs"),
            ("org/pairs", "small", "dev"),
        ]
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["easy", "hard"])
        with pytest.raises(ValueError, match=r"has easy, hard; write org/name:split"):
            open_source("org/pairs", split="train")

    def test_a_hub_id_that_cannot_be_reached(self) -> None:
        with pytest.raises(
            ValueError, match=r"`train` must be an existing file.*got 'org/pairs'.*the hub says"
        ):
            open_source("org/pairs", split="train")

    def test_fingerprints_change_with_the_rows(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", ROWS)
        first = open_source(str(path), split="train").fingerprint()
        assert open_source(str(path), split="train").fingerprint() == first
        os.utime(path, ns=(1, 1))
        assert open_source(str(path), split="train").fingerprint() != first
        tables = [datasets.Dataset.from_list(rows) for rows in (ROWS, ROWS, ROWS[:2])]
        same, again, other = (open_source(table, split="train").fingerprint() for table in tables)
        assert same == again
        assert same != other
        lists = [open_source(rows, split="train").fingerprint() for rows in (ROWS, ROWS[:2])]
        assert lists[0] != lists[1]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                "pears.jsonl",
                r"`train` must be an existing file.*got 'pears.jsonl'.*did you mean '.*pairs.jsonl'",
            ),
            ("nowhere/pairs.jsonl", r"there is no folder 'nowhere'"),
            ("pairs.txt", r"`train` must be a file of type .jsonl.*got 'pairs.txt'"),
            ("*.csv", r"`train` must match files.*matches none"),
            ("./nowhere", r"`train` must be an existing file, a folder or a hub id"),
            ("empty", r"`train` must hold files of type.*got the folder 'empty' with none"),
            ([], r"`train` must be .* got an empty list"),
            (3, r"`train` must be .* got int"),
            ({"train": []}, r"`train` must be one data set, got several \(train\)"),
        ],
    )
    def test_wrong_sources_say_what_is_expected(self, rows, message, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("pairs.jsonl"), ROWS)
        Path("pairs.txt").write_text("x")
        Path("empty").mkdir()
        with pytest.raises(ValueError, match=message):
            open_source(rows, split="train")
