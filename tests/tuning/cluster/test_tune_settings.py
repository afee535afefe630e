from __future__ import annotations

import logging
import os

import pytest

from lightning_dpo.tuning.cluster.tune_settings import tune_settings

EVERY, LOGGERS = "TUNE_GLOBAL_CHECKPOINT_S", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"


@pytest.mark.parametrize(("trials", "seconds"), [(1, "2"), (149, "2"), (1000, "20"), (10_000, "200")])
def test_the_more_trials_the_less_often_all_of_them_are_written(
    trials: int, seconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (EVERY, LOGGERS):
        monkeypatch.delenv(name, raising=False)
    log = logging.getLogger("ray.tune.analysis.experiment_analysis")
    before = log.level
    with tune_settings(trials):
        assert (os.environ[EVERY], os.environ[LOGGERS]) == (seconds, "1")
        assert not log.isEnabledFor(logging.WARNING)
    assert EVERY not in os.environ
    assert LOGGERS not in os.environ
    assert log.level == before


def test_what_the_user_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVERY, "7")
    monkeypatch.setenv(LOGGERS, "0")
    with tune_settings(1000):
        assert (os.environ[EVERY], os.environ[LOGGERS]) == ("7", "0")
    assert (os.environ[EVERY], os.environ[LOGGERS]) == ("7", "0")
