from __future__ import annotations

from dataclasses import replace

import pytest
from sweep_results import made_up

from lightning_dpo.tuning.report.summary import print_summary
from lightning_dpo.tuning.trial.status import TrialStatus


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    result = replace(made_up("/sweeps/x", trials=8, wide=False), model="/sweeps/x/best/model")
    print_summary(result)
    text = capsys.readouterr().out
    assert text.startswith("best: accuracy 0.7")
    assert "KL" in text.splitlines()[0]
    assert text.endswith("report: /sweeps/x/report.html\n")


def test_the_summary_says_why_trials_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    made = made_up("/sweeps/x", trials=8, wide=False)
    reason = "`beta` must be above 0, got -0.1"
    lost = [replace(trial, status=TrialStatus.FAILED, reason=reason) for trial in made.trials[6:]]
    print_summary(replace(made, trials=(*made.trials[:6], *lost)))
    assert f"failed: {reason} (2 trials)" in capsys.readouterr().out.splitlines()
