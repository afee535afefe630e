"""Which trials can be told from the best one, and which is recommended."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from sweep_results import ACCURACY, KL, compared, made_up

from lightning_dpo.evaluation.student import student_quantile
from lightning_dpo.tuning.objective import Goal
from lightning_dpo.tuning.results.comparison import Comparison, compare
from lightning_dpo.tuning.results.folder import load_result, save_result
from lightning_dpo.tuning.results.paired import mcnemar_p_value
from lightning_dpo.tuning.results.recommendation import recommend
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.outcomes import PairOutcomes
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.status import TrialStatus

GOAL = Goal(ACCURACY, "max")


def outcomes(right: list[int], pairs: int = 400, *, first_key: int = 0) -> PairOutcomes:
    values = np.zeros(pairs)
    values[right] = 1
    return PairOutcomes(np.arange(first_key, first_key + pairs, dtype=np.uint64), values, np.ones(pairs))


def trial(name: str, accuracy: float, kl: float | None, status: str = "finished") -> TrialRecord:
    entry = {ACCURACY: accuracy, "step": 4, **({} if kl is None else {KL: kl})}
    return TrialRecord(name, {}, TrialStatus(status), history=(entry,), total_steps=4)


BEST = outcomes(list(range(300)))
LEVEL = outcomes(list(range(3, 300)))
WORSE = outcomes(list(range(60, 300)))


def test_trials_that_can_be_told_from_the_best_and_those_that_cannot() -> None:
    found = compare({"a": [BEST], "b": [LEVEL], "c": [WORSE]}, goal=GOAL, confidence=0.95)
    assert [one.is_level for one in found.values()] == [True, True, False]
    assert found["b"].difference == pytest.approx(-3 / 400)
    assert found["b"].p_value == pytest.approx(mcnemar_p_value(0, 3))
    assert found["c"].difference_interval.high < 0
    assert found["a"].mean == 0.75
    assert (found["a"].pairs, found["a"].runs) == (400, 1)


def test_where_less_is_better_a_larger_mean_is_worse() -> None:
    losses = np.random.default_rng(0).uniform(size=200)
    runs = {
        name: [PairOutcomes(np.arange(200, dtype=np.uint64), losses + more, np.ones(200))]
        for name, more in (("a", 0.0), ("b", 0.2))
    }
    found = compare(runs, goal=Goal("val/loss", "min"), confidence=0.95)
    assert found["a"].is_level
    assert not found["b"].is_level


@pytest.mark.parametrize("seeds", [2, 8])
def test_the_variance_between_seeds_is_that_of_a_sample(seeds: int) -> None:
    """Of pairs that are all alike, two means over n seeds differ by an error of sqrt(2 variance / n)."""
    keys, ones = np.arange(50, dtype=np.uint64), np.ones(50)
    runs = [PairOutcomes(keys, np.full(50, 5 + 0.01 * (-1) ** k), ones) for k in range(seeds)]
    found = compare({"a": runs, "b": runs}, goal=Goal("val/score", "max"), confidence=0.95)["b"]
    variance = seeds * 0.01**2 / (seeds - 1)
    half = student_quantile(0.95, freedom=2 * (seeds - 1)) * math.sqrt(2 * variance / seeds)
    assert found.difference_interval == pytest.approx((-half, half), rel=1e-6)


def test_more_confidence_tells_fewer_trials_apart() -> None:
    near = outcomes(list(range(6, 300)))
    at_95, at_99 = (compare({"a": [BEST], "b": [near]}, goal=GOAL, confidence=c)["b"] for c in (0.95, 0.99))
    assert at_95.p_value == at_99.p_value == pytest.approx(2 / 2**6)
    assert (at_95.is_level, at_99.is_level) == (False, True)


def test_pairs_of_other_texts_are_not_compared() -> None:
    other = outcomes([], first_key=7)
    assert list(compare({"a": [BEST], "b": [other]}, goal=GOAL, confidence=0.95)) == ["a"]
    assert compare({}, goal=GOAL, confidence=0.95) == {}


def test_seeds_that_disagree_make_trials_hard_to_tell_apart() -> None:
    steady = [outcomes(list(range(300))), outcomes(list(range(1, 301)))]
    worse = [outcomes(list(range(270))), outcomes(list(range(1, 271)))]
    wild = [outcomes(list(range(330))), outcomes(list(range(270)))]
    assert not compare({"a": steady, "b": worse}, goal=GOAL, confidence=0.95)["b"].is_level
    assert compare({"a": wild, "b": worse}, goal=GOAL, confidence=0.95)["b"].is_level


def test_trials_that_are_equal_are_told_apart_as_seldom_as_is_said() -> None:
    """With two seeds each the variance between seeds is known from three numbers alone."""
    random = np.random.default_rng(0)
    told = 0
    for _ in range(400):
        drawn = {}
        for name in "abc":
            shares = np.clip(0.7 + random.normal(0, 0.02, 2), 0, 1)
            drawn[name] = [
                outcomes(np.flatnonzero(random.uniform(size=2000) < s).tolist(), 2000) for s in shares
            ]
        told += compare(drawn, goal=GOAL, confidence=0.95)["b"].p_value < 0.05
    assert told / 400 < 0.07


def test_the_truly_best_trial_is_nearly_always_marked() -> None:
    """Eight trials of which one is the best by a little: it may win or not."""
    random = np.random.default_rng(0)
    kept = 0
    for _ in range(200):
        skill = random.beta(6, 3, size=400)
        drawn = {
            str(n): [outcomes(np.flatnonzero(random.uniform(size=400) < skill + 0.01 * (n == 0)).tolist())]
            for n in range(8)
        }
        order = sorted(drawn, key=lambda name: -drawn[name][0].mean)
        kept += compare({name: drawn[name] for name in order}, goal=GOAL, confidence=0.95)["0"].is_level
    assert kept >= 180


def test_of_trials_that_cannot_be_told_apart_the_lowest_kl_is_recommended() -> None:
    found = compare({"a": [BEST], "b": [LEVEL], "c": [WORSE]}, goal=GOAL, confidence=0.95)
    trials = [trial("a", 0.75, 9.0), trial("b", 0.7425, 3.0), trial("c", 0.6, 1.0)]
    chosen, reason = recommend(trials, found, confidence=0.95)
    assert chosen.id == "b"
    assert "1 other trial cannot be told from the best one at 95% confidence on 400 pairs" in reason
    assert "lowest KL, 3 and not 9" in reason
    assert "-0.0075" in reason


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([trial("a", 0.75, 2.0), trial("b", 0.74, 3.0)], "the best one has the lowest KL of them, 2"),
        ([trial("a", 0.75, None), trial("b", 0.74, None)], "the KL was not measured"),
        ([trial("a", 0.75, 2.0), trial("b", 0.74, 1.0, "stopped")], "none of them ran to its end"),
        ([trial("a", 0.75, 2.0)], "nothing to compare"),
    ],
)
def test_where_the_best_is_recommended_the_reason_is_told(trials: list[TrialRecord], words: str) -> None:
    given = {"a": [BEST], "b": [LEVEL]}
    found = compare({t.id: given[t.id] for t in trials}, goal=GOAL, confidence=0.95)
    chosen, reason = recommend(trials, found, confidence=0.95)
    assert chosen is trials[0]
    assert words in reason


def test_a_best_trial_that_stands_apart() -> None:
    found = compare({"a": [BEST], "c": [WORSE]}, goal=GOAL, confidence=0.95)
    trials = [trial("a", 0.75, 9.0), trial("c", 0.6, 1.0)]
    reason = recommend(trials, found, confidence=0.95).reason
    assert "can be told from the best one at 95% confidence" in reason


def test_comparisons_are_saved_with_the_sweep(tmp_path: Path) -> None:
    result = compared(made_up(str(tmp_path)))
    for record in result.trials:
        record.save(Storage(tmp_path / "trials"))
    save_result(replace(result, recommended_recipe="# the one"))
    loaded = load_result(str(tmp_path))
    assert loaded.comparisons == result.comparisons
    assert loaded.recommended.id == result.recommended.id != result.best.id
    assert loaded.recommended_recipe == "# the one"
    assert json.loads((tmp_path / "sweep.json").read_text())["recommended"] == result.recommended.id
    one = next(iter(result.comparisons.values()))
    assert Comparison.from_json(json.loads(json.dumps(asdict(one)))) == one
