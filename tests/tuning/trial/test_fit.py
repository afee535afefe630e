"""A trial's training run, without Ray."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from processes import process_context
from trial_jobs import run_trial, seen

from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.outcomes import load_outcomes


@pytest.mark.slow
def test_a_trial_reports_and_leaves_no_model_in_memory(project: Path, tmp_path: Path) -> None:
    """Nor does one that fails: the traceback of its error would keep the model alive."""
    with ProcessPoolExecutor(1, mp_context=process_context(), initializer=seen.clear) as process:
        good = process.submit(run_trial, project, tmp_path / "good", None).result()
        bad = process.submit(run_trial, project, tmp_path / "bad", 3).result()
    assert (good.status, [one["step"] for one in good.reports]) == ("finished", [2, 4, 6])
    assert (bad.status, [one["step"] for one in bad.reports]) == ("failed", [2])
    assert (good.models, bad.models) == (0, 0)
    for name, trial in {"good": good, "bad": bad}.items():
        found = load_outcomes(Storage(tmp_path / name / "outcomes"), "t", step=trial.reports[-1]["step"])
        assert found is not None
        assert found.mean == pytest.approx(trial.reports[-1]["val/rewards/accuracy"])
