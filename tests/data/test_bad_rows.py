from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from pair_rows import BAD, GOOD, jsonl, ready

from lightning_dpo.data.bad_rows import Reason, RowReport


def test_bad_rows_are_counted_with_their_first_places(tmp_path: Path, tokenizer, caplog) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD[0], "{oops", *BAD, *GOOD[1:], "[1]"])
    with caplog.at_level(logging.INFO):
        data = ready(path, tokenizer=tokenizer, max_bad_fraction=0.2)
    report = data.report
    assert (report.rows, report.kept, report.truncated) == (45, 40, 0)
    assert report.counts == {Reason.MALFORMED: 2, Reason.EMPTY: 2, Reason.IDENTICAL: 1}
    assert report.examples[Reason.MALFORMED].place == "a.jsonl:2"
    assert report.examples[Reason.EMPTY] == ("a.jsonl:3", "`chosen` is empty")
    assert report.examples[Reason.IDENTICAL].place == "a.jsonl:4"
    assert "a.jsonl (text): 45 rows, 40 kept, 5 left out (11.1%)" in caplog.text
    assert "  empty completion          2  a.jsonl:3: `chosen` is empty" in caplog.text
    assert RowReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    # Pairs know their rows: the second good row is the sixth of the file.
    assert [data.train_pairs.row(k) for k in (0, 1, 39)] == [0, 5, 43]


def test_too_many_bad_rows_are_an_error_with_the_table(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*GOOD, *BAD])
    message = r"`train` must have at most a share of 5.0% bad rows, got 3 of 43 \(7.0%\)(.|\n)*a.jsonl:41"
    with pytest.raises(ValueError, match=message):
        ready(path, tokenizer=tokenizer)
    assert ready(path, tokenizer=tokenizer, max_bad_fraction=0.07).report.kept == 40


@pytest.mark.parametrize("tokenised_before", [False, True])
def test_raise_stops_at_the_first_bad_row(tmp_path: Path, tokenizer, tokenised_before) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*GOOD, *BAD])
    if tokenised_before:
        ready(path, tokenizer=tokenizer, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match=r"bad row at a.jsonl:41, empty completion: `chosen` is empty"):
        ready(path, tokenizer=tokenizer, on_bad_row="raise")
