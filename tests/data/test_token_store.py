from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pair_rows import GOOD, ready

from lightning_dpo.data.bad_rows import Example, Reason, RowReport
from lightning_dpo.data.token_store import TokenStore, arrow_batch, new_entry
from lightning_dpo.types import TokenPair


def test_a_failure_is_not_taken_for_another_runs_success(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), new_entry(tmp_path / "key"):
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_that_tokenise_at_once_one_is_kept(tmp_path: Path) -> None:
    def entry(kept: int) -> Iterator[None]:
        with new_entry(tmp_path / "key") as writer:
            yield
            writer.write(arrow_batch([TokenPair([1], [2], [3])] * kept, rows=range(kept)))
            writer.finish(RowReport("a", "text", rows=kept, kept=kept))

    first, second = entry(1), entry(2)
    next(first)
    next(second)
    list(first)
    list(second)
    assert len(TokenStore(tmp_path / "key")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_pairs_can_be_sent_to_another_process(tokenizer) -> None:
    pairs = ready(GOOD, tokenizer=tokenizer).train_pairs
    data = pickle.dumps(pairs)
    assert len(data) < 5000  # not the tokens
    copied = pickle.loads(data)
    assert [p.tolist() for p in copied.pair(3)] == [p.tolist() for p in pairs.pair(3)]
    assert isinstance(copied.store[-1], TokenPair)
    with pytest.raises(IndexError):
        copied.store[40]


def test_an_entry_of_an_older_version_is_read(tmp_path: Path) -> None:
    ids = pa.list_(pa.int32())
    schema = pa.schema([("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids), ("row", pa.int64())])
    columns = [[[1, 2], [3]], [[4], [5, 6]], [[7], [8]], [0, 2]]
    with pa.OSFile(str(tmp_path / "pairs.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write(pa.record_batch(columns, schema))
    left_out = [
        {"reason": "empty completion", "rows": 1, "place": "a.jsonl:2", "detail": "`chosen` is empty"}
    ]
    report = {"source": "a.jsonl", "format": "text", "rows": 3, "kept": 2, "truncated": 0}
    (tmp_path / "report.json").write_text(json.dumps({**report, "left_out": left_out}))
    assert TokenStore.exists(tmp_path)
    store = TokenStore(tmp_path)
    assert [[part.tolist() for part in pair] for pair in store] == [[[1, 2], [4], [7]], [[3], [5, 6], [8]]]
    assert [store.row(index) for index in (0, 1)] == [0, 2]
    assert store.report.examples == {Reason.EMPTY: Example("a.jsonl:2", "`chosen` is empty")}
