"""Sweeps whose trials share a process and a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_faults import BROKEN, KILLED
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig, SweepResult, sweep

QUIET = 0.25
ADAPTER = {"model.lora": {"r": 2}, "data.batch_size": 4}


def _sweep(project: Path, name: str, *, space: dict[str, Any], **changes: Any) -> SweepResult:
    overrides = {**ADAPTER, **changes.pop("overrides", {})}
    config = SweepConfig(
        space={path: {"grid": values} for path, values in space.items()},
        samples=1,
        search="grid",
        full_state_every=1,
        name=name,
        **settings(project, overrides=overrides, **changes),
    )
    return sweep(config)


def _by_values(result: SweepResult) -> dict[tuple[float, float], Any]:
    return {
        (trial.overrides["model.loss.beta"], trial.overrides["model.optimizer.lr"]): trial
        for trial in result.trials
    }


def _adapter(trial: Any) -> dict[str, torch.Tensor]:
    weights = torch.load(Path(trial.checkpoint) / "trial.ckpt", weights_only=True)["state_dict"]
    assert weights
    assert all("lora_" in name for name in weights)
    return weights


def _assert_same(ours: Any, theirs: Any) -> None:
    assert (ours.status, theirs.status) == ("finished", "finished"), (ours.reason, ours.extra)
    assert [one["step"] for one in ours.history] == [one["step"] for one in theirs.history] == [2, 4, 6]
    for mine, other in zip(ours.history, theirs.history, strict=True):
        for name in [name for name in other if name.startswith("val/")]:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    weights = _adapter(ours)
    torch.testing.assert_close(weights, _adapter(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.heavy
def test_packed_trials_are_those_that_run_alone(
    cluster: None, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"model.loss.beta": [KILLED, QUIET], "model.optimizer.lr": [1e-3, 3e-3]}
    alone = _by_values(_sweep(project, "alone", space=space))
    capsys.readouterr()
    result = _sweep(project, "packed", space=space, packed_trials=4)
    shown = capsys.readouterr().out
    packed = _by_values(result)
    assert "up to 4 trials share one base model in one process on 1 CPUs" in shown
    assert "\n4 trials shared one base model on " in shown
    assert packed.keys() == alone.keys()
    assert len({packed[point].metrics["val/logratio/margin"] for point in packed}) == 4
    for point, trial in packed.items():
        _assert_same(trial, alone[point])
        assert trial.starts == 1
    assert result.reference_passes == 1
    assert all(trial.reference_passes == 0 for trial in result.trials)
    assert result.model is not None

    # The process is killed once, and a trial fails by itself: that one alone has failed in the end.
    marker = tmp_path / "marker"
    where = {"marker": str(marker), "records": str(project / "sweeps" / "packed_faults" / "trials")}
    trouble = {"class_path": "sweep_faults.Trouble", "init_args": where}
    space = {"model.loss.beta": [KILLED, BROKEN, QUIET], "model.optimizer.lr": [1e-3]}
    result = _sweep(
        project,
        "packed_faults",
        space=space,
        packed_trials=3,
        retries=1,
        overrides={"trainer.callbacks": [trouble]},
    )
    died = marker.read_text().split()
    assert died
    assert all(trial.starts == 1 + (trial.id in died) for trial in result.trials)
    faulty = _by_values(result)
    for beta in (KILLED, QUIET):
        _assert_same(faulty[beta, 1e-3], alone[beta, 1e-3])
    broken = faulty[BROKEN, 1e-3]
    assert broken.status == "failed"
    assert "a mistake of one's own" in broken.reason


@pytest.mark.heavy
def test_one_of_the_packed_trials_is_stopped_and_the_process_of_another_at_tune_killed(
    cluster: None, project: Path
) -> None:
    result = _sweep(
        project,
        "packed_meddled",
        space={"model.loss.beta": [QUIET], "model.optimizer.lr": [1e-3, 2e-3, 3e-3]},
        packed_trials=3,
        scheduler={"class_path": "sweep_faults.Meddler"},
        export=False,
    )
    ends = sorted((str(trial.status), trial.step, trial.starts) for trial in result.trials)
    assert ends == [("finished", 6, 1), ("finished", 6, 2), ("stopped", 4, 1)]
    for trial in result.trials:
        assert [entry["step"] for entry in trial.history] == [2, 4, 6][: trial.step // 2]
        assert _adapter(trial)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overrides": {"model.lora": None}}, "`packed_trials` needs adapters.*no `model.lora`"),
        ({"space": {"model.lora": [None, {"r": 2}]}}, "`packed_trials` needs adapters"),
        ({"space": {"trainer.precision": ["32-true", "bf16-true"]}}, "leave trainer.precision alone"),
        ({"space": {"model.policy": ["a", "b"]}}, "leave model.policy alone"),
        ({"workers": 2}, "`packed_trials` are trials of one process: got 4 and workers=2"),
        ({"gpus": 2}, "`packed_trials` share one GPU"),
        ({"packed_trials": 0}, "`packed_trials` must be at least 1, got 0"),
        (
            {"overrides": {"trainer.logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}}},
            "does not go with WandbLogger",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    project: Path, changes: dict[str, Any], words: str
) -> None:
    given = {"packed_trials": 4, "space": {"model.loss.beta": [0.1, 0.2]}, **changes}
    with pytest.raises(ValueError, match=words):
        _sweep(project, "mistaken", **given)
