"""Sweeps that keep their trials' best steps, and that write full states now and then only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sweep_project import settings
from transformers import AutoModelForCausalLM

from lightning_dpo.cli.main import main
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT

METRIC = "val/rewards/accuracy"


@pytest.mark.heavy
def test_the_best_step_is_ranked_and_exported_from_the_command_line(
    cluster: None, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process of one trial is killed after its third validation, and goes on from its full state."""
    witness = {"class_path": "trial_jobs.Witness", "init_args": {"forget_at": 9}}
    killed = {
        "class_path": "sweep_faults.Trouble",
        "init_args": {"marker": str(tmp_path / "killed"), "step": 7},
    }
    overrides: dict[str, Any] = {
        "trainer.callbacks": [witness, killed],
        "trainer.max_epochs": 2,
        "data.validation": str(project / "pairs.jsonl"),
        "data.validation_split": None,
    }
    config = {
        "space": {"model.optimizer.lr": {"grid": [3e-3, 1e-5]}, "model.loss.beta": 0.1},
        "samples": 1,
        "concurrency": 1,
        "keep": "best",
        "full_state_every": 2,
        **settings(project, overrides=overrides),
        "storage": str(tmp_path / "sweeps"),
    }
    (tmp_path / "peaks.yaml").write_text(yaml.safe_dump(config))
    main(["tune", f"--config={tmp_path / 'peaks.yaml'}"])
    shown = capsys.readouterr().out
    result = load_result(str(tmp_path / "sweeps/peaks"))
    best = result.best
    assert [trial.status for trial in result.trials] == ["finished"] * 2
    assert best.kept is not None
    assert best.overrides["model.optimizer.lr"] == 3e-3
    assert best.model_step < 9 < best.step == 16
    assert f"The model is that of step {best.model_step} of 16" in shown
    assert best.metrics[METRIC] == best.kept.ranking == result.comparisons[best.id].mean
    assert best.kept.choosing > best.last[METRIC]

    (again,) = [trial for trial in result.trials if trial.starts == 2]
    assert (tmp_path / "killed").exists()
    # Its full state is that of step 4; step 6 may have been reported by then: its file takes its time.
    assert again.again in (0, 2)
    assert ("ran again what was reported since" in shown) == (again.again > 0)
    assert [entry["step"] for entry in again.history] == list(range(2, 17, 2))

    state = torch.load(Path(str(best.checkpoint)) / CHECKPOINT, weights_only=True)
    assert state["global_step"] == best.model_step
    # The best step may be one whose full state was kept: it is the model then, and stays as it is.
    assert ("optimizer_states" in state) == (Path(str(best.checkpoint)).suffix == ".state")
    exported = AutoModelForCausalLM.from_pretrained(str(result.model)).state_dict()
    for name, value in exported.items():
        assert torch.equal(state["state_dict"][f"policy.{name}"], value), name
    left = {path.parent for path in Path(result.location, "checkpoints").glob("*/*/trial.ckpt")}
    models = {Path(str(trial.checkpoint)) for trial in result.trials}
    assert left >= models
    assert not [path for path in left - models if path.suffix == ".state"]
    table = pq.read_table(Path(result.location) / "results.parquet").to_pandas()
    assert table[table.kept].set_index("trial").step.to_dict() == {t.id: t.model_step for t in result.trials}
