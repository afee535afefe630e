from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
from data_files import ROWS, contents, write

from lightning_dpo.data.sources import open_source


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
            ({"train": []}, r"`train` must be one data set, got several \(train\); .* or name them"),
        ],
    )
    def test_wrong_sources_say_what_is_expected(self, rows, message, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("pairs.jsonl"), ROWS)
        Path("pairs.txt").write_text("x")
        Path("empty").mkdir()
        with pytest.raises(ValueError, match=message):
            open_source(rows, split="train")
