from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from typing import Any

import pytest
from sweep_results import ACCURACY, made_up

from lightning_dpo.tuning import Objective, SweepResult
from lightning_dpo.tuning.results.importance import ENOUGH_TRIALS, parameter_importance
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.status import TrialStatus

BETA, LR, LOSS = "model.loss.beta", "model.optimizer.lr", "model.loss.class_path"


def sweep_of(count: int, *, mode: str = "max", **changes: Any) -> SweepResult:
    """The learning rate decides all of the metric, beta and a choice nothing."""
    draw = random.Random(0)
    trials = []
    for number in range(count):
        lr = 10 ** draw.uniform(-6, -4)
        values = {
            BETA: draw.uniform(0.1, 0.5),
            LR: lr,
            LOSS: draw.choice(["a.DPOLoss", "a.IPOLoss"]),
            "fixed": 1,
        }
        entry = {"m": math.log10(lr) * (1 if mode == "max" else -1), "step": 4}
        trials.append(
            TrialRecord(f"t{number}", {**values, **changes}, TrialStatus.FINISHED, history=(entry,))
        )
    objective = Objective.parse("m" if mode == "max" else {"minimize": "m"})
    return SweepResult("/sweeps/known", objective, tuple(trials))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_decides_the_objective_comes_first(mode: str) -> None:
    found = parameter_importance(sweep_of(40, mode=mode))
    assert found is not None
    assert next(iter(found.shares)) == LR
    assert found.shares[LR] > 0.6
    assert set(found.shares) == {BETA, LR, LOSS}  # and not what is the same in all
    assert sum(found.shares.values()) == pytest.approx(1)
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)
    assert found.trials == 40


def test_without_scikit_learn_and_with_it() -> None:
    found = parameter_importance(sweep_of(20))
    assert found is not None
    try:
        import sklearn  # noqa: F401
    except ImportError:
        assert found.method == "PED-ANOVA"
    else:
        assert found.method == "fANOVA"
    assert parameter_importance(sweep_of(20)) == found  # no chance in it


def test_too_few_trials_say_nothing() -> None:
    assert parameter_importance(sweep_of(ENOUGH_TRIALS - 1)) is None
    assert parameter_importance(sweep_of(ENOUGH_TRIALS)) is not None
    one_stopped = sweep_of(ENOUGH_TRIALS)
    stopped = replace(one_stopped.trials[0], status=TrialStatus.STOPPED)
    assert parameter_importance(replace(one_stopped, trials=(stopped, *one_stopped.trials[1:]))) is None


def test_nothing_is_said_where_nothing_differs() -> None:
    assert parameter_importance(sweep_of(10, **{BETA: 0.1, LOSS: "a.DPOLoss"})) is None  # one parameter alone
    same = sweep_of(10)
    level = tuple(replace(trial, history=({"m": 0.5, "step": 4},)) for trial in same.trials)
    assert parameter_importance(replace(same, trials=level)) is None


def test_paths_that_some_trials_do_not_set_are_named() -> None:
    wide = made_up("/sweeps/wide")
    found = parameter_importance(wide)
    assert found is not None
    assert found.trials == sum(trial.status == "finished" for trial in wide.trials)
    assert set(found.shares) == {BETA, LR, LOSS}
    assert "model.loss.label_smoothing" in found.left_out
    assert wide.objective.primary.metric == ACCURACY


def test_without_optuna_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known = sweep_of(10)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parameter_importance(known) is None
