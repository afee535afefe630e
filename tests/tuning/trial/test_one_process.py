"""What a trial's process tells Tune and takes from it, with a stand-in for Tune's session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sweep_project import make_project
from trial_jobs import spec_of

from lightning_dpo.tuning.trial import ending, one_process
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT, CheckpointPlan
from lightning_dpo.tuning.trial.one_process import run_in_one_process
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec


class FakeCheckpoint:
    """A folder that Tune keeps."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def from_directory(cls, path: str) -> FakeCheckpoint:
        return cls(str(path))

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield self.path


class FakeTune:
    """Keeps copies of what it is given, as Tune does, and stops a trial as a scheduler would."""

    Checkpoint = FakeCheckpoint

    def __init__(
        self, folder: Path, *, given: FakeCheckpoint | None = None, stop_at: int | None = None
    ) -> None:
        self.folder = folder
        self.given = given
        self.stop_at = stop_at
        self.reports: list[tuple[int, FakeCheckpoint | None]] = []

    def get_checkpoint(self) -> FakeCheckpoint | None:
        return self.given

    def report(self, metrics: dict[str, Any], checkpoint: FakeCheckpoint | None = None) -> None:
        kept = None
        if checkpoint is not None:
            kept = FakeCheckpoint(str(self.folder / f"checkpoint_{len(self.reports):06d}"))
            shutil.copytree(checkpoint.path, kept.path)
        self.reports.append((metrics["step"], kept))
        if metrics["step"] == self.stop_at:
            raise SystemExit(0)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


def _run(
    monkeypatch: pytest.MonkeyPatch, spec: TrialSpec, tune: FakeTune, trial: str, **values: Any
) -> TrialRecord:
    ray = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(one_process, "ray", ray)
    monkeypatch.setattr(one_process, "tune", tune)
    monkeypatch.setattr(ending, "tune", tune)
    known = TrialRecord.load(spec.records, trial) or TrialRecord(trial, {"model.loss.beta": 0.1, **values})
    try:
        run_in_one_process(spec, known)
    except SystemExit:
        assert tune.stop_at is not None
    record = TrialRecord.load(spec.records, trial)
    assert record is not None
    return record


def _names(spec: TrialSpec, trial: str) -> list[str]:
    return sorted(path.name for path in Path(spec.checkpoints.folder(trial).path).iterdir())


@pytest.mark.slow
def test_a_trial_that_is_stopped_has_whole_weights_and_one_that_goes_on_its_state(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(project, tmp_path, checkpoint_plan=CheckpointPlan(full_state_every=2))
    tune = FakeTune(tmp_path / "tune", stop_at=6)
    record = _run(monkeypatch, spec, tune, "a")
    # Tune holds a pointer for the one report with a full state.
    assert [(step, kept is not None) for step, kept in tune.reports] == [(2, False), (4, True), (6, False)]
    (pointer,) = [kept for _, kept in tune.reports if kept is not None]
    assert sum(path.stat().st_size for path in Path(pointer.path).iterdir()) < 200
    assert (record.status, record.checkpoint) == (
        "running",
        spec.checkpoints.folder("a").path + "/1_000006.weights",
    )
    assert Path(record.checkpoint, CHECKPOINT).is_file()

    # As after the death of the process: Tune starts the trial with what it was given.
    again = FakeTune(tmp_path / "again", given=pointer)
    record = _run(monkeypatch, spec, again, "a")
    assert [step for step, _ in again.reports] == [6]
    assert (record.status, record.starts, record.again) == ("finished", 2, 2)
    assert [entry["step"] for entry in record.history] == [2, 4, 6]
    assert _names(spec, "a") == ["2_000006.weights"]


@pytest.mark.slow
def test_a_trial_takes_over_the_state_of_another_one(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with population-based training: the weights are the other's, and so is the optimizer's state."""
    plan = CheckpointPlan(full_state_every=1, kept_states=4, is_exchanged=True)
    spec = spec_of(project, tmp_path, checkpoint_plan=plan)
    donor = FakeTune(tmp_path / "donor")
    _run(monkeypatch, spec, donor, "donor", **{"model.optimizer.lr": 3e-3})
    assert _names(spec, "donor") == ["1_000002.state", "1_000004.state", "1_000006.state"]
    _run(monkeypatch, spec, FakeTune(tmp_path / "taker", stop_at=2), "taker", **{"model.optimizer.lr": 1e-9})

    taking = FakeTune(tmp_path / "taking", given=donor.reports[1][1])
    record = _run(monkeypatch, spec, taking, "taker")
    assert (record.status, record.starts, record.again) == ("finished", 2, 0)
    assert [step for step, _ in taking.reports] == [6]
    taken = torch.load(
        Path(spec.checkpoints.folder("donor").path, "1_000004.state", CHECKPOINT), weights_only=False
    )
    last = torch.load(Path(str(record.checkpoint), CHECKPOINT), weights_only=False)
    for name, value in taken["state_dict"].items():  # its own rate moves nothing
        torch.testing.assert_close(last["state_dict"][name], value, rtol=0, atol=1e-6)
    assert last["optimizer_states"][0]["state"][0]["step"] == 6

    # Where nothing is left to train, Tune is told of the other's last report, and the model is the other's.
    ended = FakeTune(tmp_path / "ended", given=donor.reports[2][1])
    record = _run(monkeypatch, spec, ended, "third")
    assert [step for step, _ in ended.reports] == [6]
    assert record.checkpoint == spec.checkpoints.folder("donor").path + "/1_000006.state"


@pytest.mark.slow
def test_a_checkpoint_that_an_older_version_gave_tune_is_gone_on_from(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(project, tmp_path, checkpoint_plan=CheckpointPlan(full_state_every=1, kept_states=3))
    _run(monkeypatch, spec, FakeTune(tmp_path / "first", stop_at=4), "a")
    older = tmp_path / "checkpoint_000001"
    shutil.move(spec.checkpoints.folder("a").path + "/1_000004.state", older)
    shutil.rmtree(tmp_path / "checkpoints")
    record = _run(monkeypatch, spec, FakeTune(tmp_path / "second", given=FakeCheckpoint(str(older))), "a")
    assert (record.status, record.starts, record.again) == ("finished", 2, 0)
    assert [entry["step"] for entry in record.history] == [2, 4, 6]
