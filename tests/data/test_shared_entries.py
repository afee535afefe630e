"""Tokenised rows in an object store, which two machines with caches of their own share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pair_rows import GOOD, jsonl, ready

from lightning_dpo.data import PreferenceDataModule, preprocess

URL = "s3://bucket/runs/tokens"
Machine = Callable[..., PreferenceDataModule]


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the rows of each chunk that is tokenised."""
    found: list[int] = []
    own = preprocess._tokenise_chunk

    def counted(first: int, records: list[Any], *others: Any) -> Any:
        found.append(len(records))
        return own(first, records, *others)

    monkeypatch.setattr(preprocess, "_tokenise_chunk", counted)
    return found


@pytest.fixture
def machine(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Prepares the same rows on a machine of a name, which has a cache of its own."""
    path = jsonl(tmp_path / "a.jsonl", GOOD)

    def prepare(name: str, cache_dir: str | None = URL) -> PreferenceDataModule:
        monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / name))
        return ready(path, tokenizer=tokenizer, num_processes=1, cache_dir=cache_dir)

    return prepare


def test_rows_are_tokenised_once_for_all_machines(
    bucket: Any, machine: Machine, tokenised: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first, second = machine("one"), machine("two")
    assert tokenised == [len(GOOD)]
    told = [record.message for record in caplog.records if "tokenised" in record.message]
    assert [line.split()[0] for line in told] == ["tokenised", "stored", "fetched"]
    assert told[2] == f"fetched {len(GOOD)} tokenised train rows from {URL}"
    assert second.report == first.report
    for k in range(len(GOOD)):
        ours, theirs = (data.train_pairs.pair(k) for data in (first, second))
        assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]
    assert not [path for path in bucket.find("bucket") if path.endswith(".tmp")]
    stored = bucket.find("bucket/runs/tokens", detail=True)
    machine("one")
    machine("two")
    assert bucket.find("bucket/runs/tokens", detail=True) == stored
    assert tokenised == [len(GOOD)]
    caches = [Path(data._parts["train"].path).parents[1] for data in (first, second)]
    (ours,), (theirs,) = (list(cache.glob("completion_keys/*")) for cache in caches)
    assert ours.read_bytes() == theirs.read_bytes()


def test_rows_that_a_machine_had_before_are_stored_for_others(
    bucket: Any, machine: Machine, tokenised: list[int]
) -> None:
    machine("one", cache_dir=None)
    machine("one")
    machine("two")
    assert tokenised == [len(GOOD)]


def test_a_damaged_copy_is_not_used(bucket: Any, machine: Machine, tokenised: list[int]) -> None:
    machine("one")
    (rows,) = bucket.glob("bucket/runs/tokens/*/*/pairs.arrow")
    bucket.pipe_file(rows, bucket.cat_file(rows)[:-20])
    with pytest.warns(UserWarning, match=r"tokens are made anew, for those in s3://.* cannot be fetched"):
        data = machine("two")
    assert data.report.kept == len(GOOD)
    assert tokenised == [len(GOOD)] * 2


def test_without_the_store_every_machine_makes_its_own(
    bucket: Any, machine: Machine, tokenised: list[int]
) -> None:
    for name in ("one", "two"):
        with pytest.warns(UserWarning, match="every machine makes its own tokens, for s3://bukcet/tokens"):
            machine(name, "s3://bukcet/tokens")
    assert tokenised == [len(GOOD)] * 2
    assert bucket.ls("") == ["bucket"]


def test_a_url_that_cannot_be_opened_is_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match=r"`cache_dir` must be a folder or a URL.*nothing://x"):
        machine("one", "nothing://x")
