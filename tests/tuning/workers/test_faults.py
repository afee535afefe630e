from __future__ import annotations

from pathlib import Path

import pytest
from sweep_faults import BROKEN, EXHAUSTED, KILLED, KILLED_NEXT
from sweep_project import settings

from lightning_dpo.tuning import SweepConfig, sweep


@pytest.mark.heavy
def test_a_group_that_loses_a_worker_starts_again_from_its_checkpoint(
    cluster: None, project: Path, tmp_path: Path
) -> None:
    undisturbed = KILLED + 2e-9
    trouble = {"class_path": "sweep_faults.WorkerTrouble", "init_args": {"marker": str(tmp_path / "marker")}}
    config = SweepConfig(
        space={"model.loss.beta": {"grid": [KILLED, KILLED_NEXT, EXHAUSTED, BROKEN, undisturbed]}},
        samples=1,
        search="grid",
        concurrency=1,
        workers=2,
        cpus=0.9,
        retries=1,
        full_state_every=1,
        name="worker_faults",
        **settings(
            project,
            overrides={
                "trainer.callbacks": [trouble],
                "model.optimizer.lr": 1e-3,
                "data.batch_size": 2,
            },
        ),
    )
    result = sweep(config, verbose=False)
    by_beta = {trial.overrides["model.loss.beta"]: trial for trial in result.trials}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed0", "killed1"]
    for beta in (KILLED, KILLED_NEXT):
        trial = by_beta[beta]
        assert (trial.status, trial.starts) == ("finished", 2), (trial.reason, trial.extra)
        assert trial.again == 0
        assert [entry["step"] for entry in trial.history] == [2, 4, 6]
        for name, value in by_beta[undisturbed].metrics.items():
            if name.startswith("val/"):
                assert trial.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    lost = by_beta[EXHAUSTED]
    assert (lost.status, lost.starts) == ("failed", 2)
    assert "died" in lost.reason
    assert (by_beta[BROKEN].status, by_beta[BROKEN].starts) == ("failed", 1)
    assert "a mistake of one's own" in by_beta[BROKEN].reason
    assert (by_beta[undisturbed].status, by_beta[undisturbed].starts) == ("finished", 1)
    # Of each trial its last checkpoint is kept, and no other one.
    kept = {path.parent for path in Path(result.location, "checkpoints").glob("*/*/trial.ckpt")}
    ended = [trial for trial in result.trials if trial.history]
    assert kept == {Path(str(trial.checkpoint)) for trial in ended}
    assert result.model is not None


@pytest.mark.heavy
@pytest.mark.parametrize("reuse", [True, False])
def test_trials_whose_driver_is_stopped_or_killed_leave_room_for_others(
    cluster: None, project: Path, reuse: bool
) -> None:
    config = SweepConfig(
        space={"model.optimizer.lr": {"grid": [1e-3, 2e-3, 3e-3]}},
        samples=1,
        search="grid",
        scheduler={"class_path": "sweep_faults.Meddler"},
        concurrency=1,
        workers=2,
        cpus=0.9,
        reuse_processes=reuse,
        export=False,
        name=f"meddled_{reuse}",
        **settings(project, overrides={"data.batch_size": 2}),
    )
    result = sweep(config, verbose=False)
    by_rate = {trial.overrides["model.optimizer.lr"]: trial for trial in result.trials}
    stopped, killed, last = (by_rate[rate] for rate in (1e-3, 2e-3, 3e-3))
    assert (stopped.status, stopped.step, stopped.starts) == ("stopped", 4, 1)
    assert (killed.status, killed.starts) == ("finished", 2)
    assert (last.status, last.starts) == ("finished", 1)
    for trial in (killed, last):
        assert [entry["step"] for entry in trial.history] == [2, 4, 6]
        assert Path(str(trial.checkpoint), "trial.ckpt").is_file()
