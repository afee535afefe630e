"""What a trial writes and when: bytes are counted, files are whole, a resumed trial loses what it says."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import trial_jobs
from sweep_project import make_project
from trial_jobs import EVERY_REPORT, run_in, spec_of

from lightning_dpo.training.saving.checkpoint_io import AtomicCheckpointIO
from lightning_dpo.tuning.results.export import export_trial
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT, CheckpointPlan, SavedFolder
from lightning_dpo.tuning.trial.resume import remove_spent

LONG = {"trainer.max_epochs": 3}
"""Nine reports of two steps each."""

WITNESS = {"class_path": "trial_jobs.Witness"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Of each checkpoint: its folder's name, bytes of its tensors, bytes of its file."""
    found: list[tuple[str, int, int]] = []
    own = AtomicCheckpointIO.save_checkpoint

    def save(self: Any, checkpoint: dict[str, Any], path: Path, options: Any = None) -> None:
        own(self, checkpoint, path, options)
        found.append((Path(path).parent.name, _tensor_bytes(checkpoint), Path(path).stat().st_size))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    return found


def _tensor_bytes(nest: Any) -> int:
    """Bytes of the tensors in a nest, those that share memory counted once."""
    storages: dict[int, int] = {}

    def look(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, dict):
            list(map(look, part.values()))
        elif isinstance(part, list | tuple):
            list(map(look, part))

    look(nest)
    return sum(storages.values())


def _weights(location: Path, folder: str) -> dict[str, torch.Tensor]:
    path = location / "checkpoints/t" / folder / CHECKPOINT
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("policy."): value for name, value in state.items()}


def _names(location: Path) -> list[str]:
    return sorted(path.name for path in (location / "checkpoints/t").iterdir())


@pytest.mark.slow
def test_bytes_of_a_trial(project: Path, tmp_path: Path, written: list[tuple[str, int, int]]) -> None:
    """AdamW keeps two numbers and a count of steps for each weight; float32 takes four bytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(project / "model")
    weights = 4 * sum(value.numel() for value in model.parameters())
    optimizer = 2 * weights + 4 * len(list(model.parameters()))

    outcome, _ = run_in(spec_of(project, tmp_path / "all", overrides=LONG, checkpoint_plan=EVERY_REPORT))
    assert outcome.status == "finished", outcome
    everything = sum(tensors for _, tensors, _ in written)
    assert everything == 9 * (weights + optimizer)
    files = sum(size for *_, size in written)
    written.clear()

    plan = CheckpointPlan(full_state_every=4)
    run_in(spec_of(project, tmp_path / "some", overrides=LONG, checkpoint_plan=plan))
    kinds = [name.partition(".")[2] for name, *_ in written]
    assert kinds == ["weights"] * 3 + ["state"] + ["weights"] * 3 + ["state"] + ["weights"]
    assert sum(tensors for _, tensors, _ in written) == 9 * weights + 2 * optimizer
    # Beside its tensors a file holds their names and shapes.
    for _, tensors, size in written:
        assert tensors < size < tensors + 64 * 1024
    assert sum(size for *_, size in written) < files
    assert _names(tmp_path / "some") == ["1_000016.state", "1_000018.weights"]


@pytest.mark.slow
def test_training_goes_on_while_a_file_is_written(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of step 2 is written when step 3 begins, and holds step 2; it is reported when it is whole."""
    went_on, order = threading.Event(), []
    own = AtomicCheckpointIO.save_checkpoint
    own_start = trial_jobs.Remember.on_train_batch_start

    def save(self: Any, checkpoint: dict[str, Any], path: Path, options: Any = None) -> None:
        if checkpoint["global_step"] == 2:
            assert went_on.wait(60)
        own(self, checkpoint, path, options)
        order.append(("whole", checkpoint["global_step"]))

    def start(self: Any, trainer: pl.Trainer, *rest: Any) -> None:
        own_start(self, trainer, *rest)
        if trainer.global_step == 3:
            order.append(("begins", 3))
            went_on.set()

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    monkeypatch.setattr(trial_jobs.Remember, "on_train_batch_start", start)
    trial_jobs.validated.clear()

    class Reports(list):
        def append(self, metrics: dict[str, Any]) -> None:
            order.append(("reported", metrics["step"]))

    # Of all reports: that none of the files is removed before it is looked at.
    plan = CheckpointPlan(full_state_every=1, kept_states=9)
    spec = spec_of(project, tmp_path, callbacks=(WITNESS,), checkpoint_plan=plan)
    outcome, record = run_in(spec, reports=Reports())
    assert (outcome.status, record.step) == ("finished", 6)
    assert order[:3] == [("begins", 3), ("whole", 2), ("reported", 2)]
    assert [entry for entry in order if entry[0] == "reported"] == [("reported", s) for s in (2, 4, 6)]
    for step, weights, _ in trial_jobs.validated:
        saved = _weights(tmp_path, f"1_{step:06d}.state")
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_a_failure_in_the_background_ends_the_trial(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.save

    def save(checkpoint: Any, file: Any) -> None:
        if checkpoint["global_step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        own(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    reports: list[dict[str, Any]] = []
    outcome, record = run_in(spec_of(project, tmp_path), reports=reports)
    assert outcome.status == "failed"
    assert "No space left on device" in outcome.reason
    assert [report["step"] for report in reports] == [2]
    # What was whole is still there, and what is half has no name that anyone looks for.
    assert record.checkpoint == str(tmp_path / "checkpoints/t/1_000002.state")
    assert not (tmp_path / "checkpoints/t/1_000004.state" / CHECKPOINT).exists()
    spec = spec_of(project, tmp_path)
    assert spec.checkpoints.whole("t") == [SavedFolder(1, 2, is_state=True)]
    remove_spent(spec, "t", [record.checkpoint])
    assert _names(tmp_path) == ["1_000002.state"]


def test_what_trials_keep_is_found_where_the_sweep_was_moved_to(project: Path, tmp_path: Path) -> None:
    kept, other = SavedFolder(1, 4, is_state=False), SavedFolder(1, 2, is_state=True)
    spec = spec_of(project, tmp_path / "before")
    for trial in ("t", "u"):
        for saved in (kept, other):
            spec.checkpoints.folder(trial).write(f"{saved.name}/progress.json", "{}")
    location = spec.checkpoints.location("t", kept)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = spec_of(project, tmp_path / "after")
    # A trial may keep the weights of another one, under a name that its own have too.
    for trial in ("t", "u"):
        remove_spent(moved, trial, [location])
    assert moved.checkpoints.whole("t") == [kept]
    assert moved.checkpoints.whole("u") == []


@pytest.mark.slow
def test_a_trial_that_goes_on_loses_no_more_than_it_says(project: Path, tmp_path: Path) -> None:
    plan = CheckpointPlan(full_state_every=2)
    _, whole = run_in(spec_of(project, tmp_path / "whole", overrides=LONG, checkpoint_plan=plan))
    spec = spec_of(project, tmp_path / "cut", raise_at=13, overrides=LONG, checkpoint_plan=plan)
    outcome, record = run_in(spec)
    assert (outcome.status, record.step, record.again) == ("failed", 12, 0)
    spec = spec_of(project, tmp_path / "cut", overrides=LONG, checkpoint_plan=plan)
    spec.checkpoints.folder("t").remove(spec.checkpoints.location("t", SavedFolder(1, 12, is_state=True)))
    reports: list[dict[str, Any]] = []
    outcome, record = run_in(spec, record, reports=reports)
    assert (outcome.status, record.starts) == ("finished", 2), outcome
    # Without its one full state it begins anew, and says so.
    assert record.again == 12
    assert [entry["step"] for entry in record.history] == list(range(2, 19, 2))

    spec = spec_of(project, tmp_path / "again", raise_at=11, overrides=LONG, checkpoint_plan=plan)
    _, record = run_in(spec)
    spec = spec_of(project, tmp_path / "again", overrides=LONG, checkpoint_plan=plan)
    reports.clear()
    outcome, record = run_in(spec, record, reports=reports)
    assert [report["step"] for report in reports] == [10, 12, 14, 16, 18]
    assert (outcome.status, record.again) == ("finished", 2)
    last = _weights(tmp_path / "again", "2_000018.weights")
    torch.testing.assert_close(last, _weights(tmp_path / "whole", "1_000018.weights"), rtol=0, atol=0)
    assert record.metrics["val/loss"] == whole.metrics["val/loss"]


@pytest.mark.slow
def test_weights_alone_are_exported(project: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trial_jobs.validated.clear()
    plan = CheckpointPlan(full_state_every=0)
    _, record = run_in(spec_of(project, tmp_path, callbacks=(WITNESS,), checkpoint_plan=plan))
    assert _names(tmp_path) == ["1_000006.weights"]
    model = export_trial(Storage(tmp_path), record.checkpoint, tmp_path / "model")
    assert model is not None
    exported = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.testing.assert_close(exported, trial_jobs.validated[-1][1], rtol=0, atol=0)


@pytest.mark.slow
def test_an_object_store_gets_whole_checkpoints(project: Path, tmp_path: Path) -> None:
    location = f"memory://{tmp_path.name}"
    plan = CheckpointPlan(full_state_every=2)
    spec = replace(spec_of(project, tmp_path, overrides=LONG, checkpoint_plan=plan), location=location)
    outcome, record = run_in(spec)
    assert outcome.status == "finished", outcome
    found = [SavedFolder(1, 16, is_state=True), SavedFolder(1, 18, is_state=False)]
    assert spec.checkpoints.whole("t") == found
    with spec.checkpoints.opened("t", found[0]) as folder:
        assert "optimizer_states" in torch.load(folder / CHECKPOINT, weights_only=False)
    assert export_trial(Storage(location), record.checkpoint, tmp_path / "model") is not None
    remove_spent(spec, "t", [record.checkpoint])
    assert spec.checkpoints.whole("t") == found[1:]


@pytest.mark.parametrize(
    ("plan", "last", "kinds"),
    [
        (CheckpointPlan(full_state_every=1), 3, [True, True, True]),
        (CheckpointPlan(full_state_every=2), 4, [False, True, False, False]),
        (CheckpointPlan(full_state_every=0), 2, [False, False]),
        (CheckpointPlan(full_state_every=2, is_exchanged=True), 2, [False, True]),
    ],
)
def test_which_reports_have_full_states(plan: CheckpointPlan, last: int, kinds: list[bool]) -> None:
    assert [plan.is_state(report, is_last=report == last) for report in range(1, last + 1)] == kinds


def test_names_of_folders() -> None:
    for saved in (SavedFolder(1, 4, is_state=True), SavedFolder(12, 1_234_567, is_state=False)):
        assert SavedFolder.parse(saved.name) == saved
    for name in ("group_1", "1_000004", "a_000004.state", "1_4.partial", ".state"):
        assert SavedFolder.parse(name) is None
