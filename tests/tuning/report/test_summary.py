from __future__ import annotations

from dataclasses import replace

import pytest
from sweep_results import made_up

from lightning_dpo.tuning.report.summary import print_summary


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    result = replace(made_up("/sweeps/x", trials=8, wide=False), model="/sweeps/x/best/model")
    print_summary(result)
    text = capsys.readouterr().out
    assert text.startswith("best: accuracy 0.7")
    assert "KL" in text.splitlines()[0]
    assert text.endswith("report: /sweeps/x/report.html\n")
