from __future__ import annotations

import time

import pytest

from lightning_dpo.tuning.report.trial_table import TrialLine


class TestTimeLeft:
    def test_it_counts_down_from_the_last_report(self) -> None:
        line = TrialLine("1", {})
        line.report({"step": 10, "total_steps": 30, "seconds": 5.0})
        assert line.seconds_left() == pytest.approx(10, abs=0.5)
        line.reported_at = time.time() - 4
        assert line.seconds_left() == pytest.approx(6, abs=0.5)

    def test_a_trial_that_was_taken_up_in_the_middle(self) -> None:
        line = TrialLine("1", {})
        line.report({"step": 100, "total_steps": 300, "seconds": 1.0})
        line.report({"step": 110, "total_steps": 300, "seconds": 11.0})
        assert line.seconds_left() == pytest.approx(190, abs=1)

    def test_none_is_told_where_none_is_known(self) -> None:
        line = TrialLine("1", {})
        assert line.seconds_left() is None
        line.report({"step": 10, "total_steps": 0, "seconds": 5.0})
        assert line.seconds_left() is None
