from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.record import TrialRecord, load_records
from lightning_dpo.tuning.trial.status import TrialStatus

# As it was written before states had a type of their own.
OLDER = """{
 "id": "79493_00001",
 "overrides": {"model.loss.beta": 0.1},
 "status": "out of memory",
 "reason": "CUDA out of memory",
 "history": [{"val/rewards/accuracy": 0.5, "step": 2, "epoch": 0, "total_steps": 6, "seconds": 1.5}],
 "starts": 1,
 "total_steps": 6,
 "startup_seconds": 0.2,
 "reference_passes": 0,
 "checkpoint": null,
 "extra": {"node": "a", "traceback": ""}
}"""
REPORT = {"step": 2, "total_steps": 6, "startup_seconds": 0.2, "reference_passes": 0}


@pytest.mark.parametrize(
    ("status", "is_over", "is_ranked", "went_wrong"),
    [
        ("running", False, False, False),
        ("finished", True, True, False),
        ("stopped", True, True, False),
        ("diverged", True, False, True),
        ("out of memory", True, False, True),
        ("failed", True, False, True),
    ],
)
def test_what_a_status_means(status: str, is_over: bool, is_ranked: bool, went_wrong: bool) -> None:
    found = TrialStatus(status)
    assert found == status == f"{found}"
    assert (found.is_over, found.is_ranked, found.went_wrong) == (is_over, is_ranked, went_wrong)


def test_there_are_no_other_states() -> None:
    assert len(TrialStatus) == 6


def test_an_older_record_loads_and_is_written_as_it_was(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("79493_00001.json", OLDER)
    (record,) = load_records(storage)
    assert record.status is TrialStatus.OUT_OF_MEMORY
    assert not record.is_ranked
    record.save(storage)
    assert json.loads(storage.read("79493_00001.json") or "") == json.loads(OLDER)


def test_a_record_from_its_start_to_its_end(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    record = TrialRecord("a", {}).restarted().reported(REPORT)
    assert (record.status, record.starts, record.step, record.total_steps) == ("running", 1, 2, 6)
    again = record.reported({**REPORT, "step": 4}).restarted(REPORT)
    assert [entry["step"] for entry in again.history] == [2]
    ended = again.ended(TrialStatus.FAILED, reason="why", traceback="where")
    ended.save(storage)
    assert TrialRecord.load(storage, "a") == ended
    assert ended.extra["traceback"] == "where"
    assert not list(tmp_path.glob("*.tmp"))
