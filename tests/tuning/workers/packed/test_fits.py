"""Trials that train in one process, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trial_jobs import run_in, spec_of, steps

from lightning_dpo.models import build
from lightning_dpo.tuning.search.space import SearchSpace
from lightning_dpo.tuning.trial import one_process
from lightning_dpo.tuning.trial.checkpoints import CheckpointPlan
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.workers.mailbox import Event
from lightning_dpo.tuning.workers.packed.fits import PackedFits

BETA, RATE = "model.loss.beta", "model.optimizer.lr"
SPACE = SearchSpace.parse({BETA: {"choice": [0.1, 0.2, 0.3, 0.4]}, RATE: {"choice": [1e-3, 3e-3]}})
VALUES = {"a": (0.1, 1e-3), "b": (0.2, 3e-3), "c": (0.3, 1e-3), "broken": (0.4, 1e-3)}


def _spec(project: Path, location: Path) -> TrialSpec:
    return spec_of(
        project,
        location,
        space=SPACE,
        checkpoint_plan=CheckpointPlan(full_state_every=1),
        callbacks=({"class_path": "trial_jobs.NoteSteps", "init_args": {"broken": 0.4}},),
        overrides={"model.lora": {"r": 2}, "model.reference": "adapter", "data.batch_size": 4},
    )


def _config(trial: str) -> dict[str, Any]:
    return dict(zip((BETA, RATE), VALUES[trial], strict=True))


def _adapter(record: TrialRecord) -> Mapping[str, Any]:
    weights: Mapping[str, Any] = torch.load(Path(str(record.checkpoint), "trial.ckpt"))["state_dict"]
    assert all("lora_" in name for name in weights)
    return weights


def _follow(
    fits: PackedFits, trials: list[str], *, stop: tuple[str, int] = ("", 0)
) -> dict[str, list[Event]]:
    """What happens in trials that run together, until each of them has ended or was stopped."""
    events: dict[str, list[Event]] = {trial: [] for trial in trials}
    waiting = list(trials)
    while waiting:
        for trial in list(waiting):
            event = fits.seat(trial).next_event(0.01)
            if event is None:
                continue
            events[trial].append(event)
            if event.kind != "report":
                waiting.remove(trial)
            elif (trial, event.metrics["step"]) == stop:
                fits.seat(trial).stop()
                waiting.remove(trial)
            else:
                fits.seat(trial).answer()
    return events


@pytest.mark.slow
def test_trials_of_one_process_are_those_that_run_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(one_process, "ray", ray)
    alone: dict[str, TrialRecord] = {}
    for trial in ("a", "b"):
        spec = _spec(project, tmp_path / f"alone_{trial}")
        _, alone[trial] = run_in(spec, TrialRecord(trial, _config(trial)))

    loads: list[str] = []
    load = build.load_model
    monkeypatch.setattr(build, "load_model", lambda name, **kw: loads.append(name) or load(name, **kw))
    spec = _spec(project, tmp_path / "packed")
    fits = PackedFits()
    steps.clear()
    with fits._baton.held():  # all of them wait before one begins
        for trial in VALUES:
            fits.begin(spec, trial, _config(trial), None)
    events = _follow(fits, list(VALUES), stop=("c", 2))

    assert (len(loads), fits.loads) == (1, 1)
    first = [step for step in steps if step[1] < 2]
    assert first == [(beta, step) for step in (0, 1) for beta in (0.1, 0.2, 0.3, 0.4)]
    assert [event.kind for event in events["c"]] == ["report"]
    records = {trial: TrialRecord.load(spec.records, trial) for trial in VALUES}
    assert {trial: record and (str(record.status), record.step) for trial, record in records.items()} == {
        "a": ("finished", 6),
        "b": ("finished", 6),
        "c": ("running", 2),
        "broken": ("failed", 2),
    }
    for trial, expected in alone.items():
        record = records[trial]
        assert record is not None
        for ours, theirs in zip(record.history, expected.history, strict=True):
            for name in [name for name in theirs if name.startswith("val/")]:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
        weights = _adapter(record)
        torch.testing.assert_close(weights, _adapter(expected), rtol=0, atol=1e-7)

    # As after the death of its process at Tune's: the trial goes on where it was.
    assert [event.kind for event in _begun_again(fits, spec, "c")] == ["report", "report", "done"]
    record = TrialRecord.load(spec.records, "c")
    assert record is not None
    assert (str(record.status), record.starts, record.step) == ("finished", 2, 6)
    assert fits.loads == 1


def _begun_again(fits: PackedFits, spec: TrialSpec, trial: str) -> list[Event]:
    fits.begin(spec, trial, _config(trial), None)
    return _follow(fits, [trial])[trial]
