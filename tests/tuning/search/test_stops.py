"""What ends a trial or a sweep early, apart from schedulers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from lightning_dpo.tuning import Objective
from lightning_dpo.tuning.search.ray_callbacks import make_callbacks
from lightning_dpo.tuning.search.stops import StopRules, SweepStopper

ACCURACY = "val/rewards/accuracy"


def stopper(rules: dict[str, Any] | None, location: Path, *, fail_fast: int = 3) -> SweepStopper:
    return SweepStopper(
        StopRules.parse(rules),
        objective=Objective.parse(ACCURACY),
        location=str(location),
        fail_fast=fail_fast,
    )


def reports(stop: SweepStopper, *values: float, trial: str = "79493_00000") -> list[bool]:
    return [stop(trial, {ACCURACY: value, "step": 10 * (n + 1)}) for n, value in enumerate(values)]


def test_nothing_stops_without_rules(tmp_path: Path) -> None:
    stop = stopper(None, tmp_path)
    assert reports(stop, *[0.5] * 20) == [False] * 20
    assert not stop.stop_all()


def test_steps(tmp_path: Path) -> None:
    assert reports(stopper({"steps": 25}, tmp_path), 0.5, 0.6, 0.7) == [False, False, True]


def test_a_threshold_of_any_metric(tmp_path: Path) -> None:
    assert reports(stopper({"threshold": {ACCURACY: {"above": 0.7}}}, tmp_path), 0.6, 0.7) == [False, True]
    stop = stopper({"threshold": {"val/kl": {"above": 50}, "val/loss": {"below": 0.1}}}, tmp_path)
    assert not stop("a", {ACCURACY: 0.9, "step": 1, "val/kl": 49.0, "val/loss": 0.2})
    assert stop("a", {ACCURACY: 0.9, "step": 2, "val/kl": 51.0, "val/loss": 0.2})
    assert stop("b", {ACCURACY: 0.9, "step": 2, "val/kl": 1.0, "val/loss": 0.05})


def test_a_plateau_of_the_first_goal_each_trial_for_itself(tmp_path: Path) -> None:
    stop = stopper({"plateau": {"patience": 2, "min_delta": 0.01}}, tmp_path)
    assert reports(stop, 0.5, 0.6, 0.605, 0.7, 0.705, 0.709) == [False] * 5 + [True]
    assert reports(stop, 0.5, 0.5, trial="79493_00001") == [False, False]


def test_a_plateau_of_what_is_minimised(tmp_path: Path) -> None:
    stop = SweepStopper(
        StopRules.parse({"plateau": {"patience": 1}}),
        objective=Objective.parse({"minimize": "val/kl"}),
        location=str(tmp_path),
        fail_fast=0,
    )
    assert [stop("a", {"val/kl": kl, "step": 1}) for kl in (3.0, 2.0, 2.5)] == [False, False, True]


def test_a_file_stops_one_trial(tmp_path: Path) -> None:
    stop = stopper(None, tmp_path)
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop" / "00001").touch()
    assert reports(stop, 0.5) == [False]
    assert reports(stop, 0.5, trial="79493_00001") == [True]


def failed(trial: str, reason: str) -> tuple[str, dict[str, Any]]:
    return trial, {ACCURACY: 0.0, "status": "failed", "reason": reason}


def test_the_same_failure_of_the_first_trials_ends_the_sweep(tmp_path: Path) -> None:
    stop = stopper(None, tmp_path)
    for number in range(2):
        stop(*failed(f"t{number}", f"RuntimeError: no kernel at step {number}"))
    assert not stop.stop_all()
    stop(*failed("t2", "RuntimeError: no kernel at step 17"))
    assert stop.stop_all()


def test_other_failures_or_a_result_let_the_sweep_go_on(tmp_path: Path) -> None:
    differ, one_works, off = (stopper(None, tmp_path, fail_fast=n) for n in (3, 3, 0))
    for number in range(3):
        differ(*failed(f"t{number}", "abc"[number]))
        one_works(*failed(f"t{number}", "the same"))
        off(*failed(f"t{number}", "the same"))
    reports(one_works, 0.5)
    assert not any(stop.stop_all() for stop in (differ, one_works, off))


def test_ray_can_keep_it(tmp_path: Path) -> None:
    stop = stopper({"plateau": {"patience": 1}}, tmp_path)
    reports(stop, 0.6)
    assert reports(pickle.loads(pickle.dumps(stop)), 0.6) == [True]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"step": 5}, "`stop` takes steps, threshold, plateau, got 'step'"),
        ({"steps": 0}, "`stop.steps`"),
        ({"steps": "1h"}, "`stop.steps`"),
        ({"threshold": {ACCURACY: 0.7}}, "above: NUMBER"),
        ({"plateau": {"pace": 1}}, "`stop.plateau`"),
        ({"plateau": {"patience": 0}}, "patience of at least 1"),
    ],
)
def test_mistakes_in_the_rules(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StopRules.parse(rules)


def test_callbacks_of_ray_by_class_path() -> None:
    path = "ray.tune.logger.CSVLoggerCallback"
    assert [type(one).__name__ for one in make_callbacks([path, {"class_path": path}])] == [
        "CSVLoggerCallback"
    ] * 2
    assert all(isinstance(one, tune.Callback) for one in make_callbacks([path]))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("CSVLoggerCallback", "by class path"),
        ("lightning.pytorch.callbacks.EarlyStopping", "Lightning's belong to"),
        ("ray.tune.logger.Nothing", "importable"),
        ({"class_path": "ray.tune.logger.CSVLoggerCallback", "init_args": {"pace": 1}}, "does not take"),
    ],
)
def test_mistakes_in_callbacks(choice: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_callbacks([choice])
