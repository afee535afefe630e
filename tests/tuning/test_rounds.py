"""Trials that are run again with other seeds: which, with what, and what becomes of the ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ray.tune.search.variant_generator import generate_variants
from sweep_project import settings
from sweep_results import ACCURACY, KL

from lightning_dpo.tuning import Objective, SearchSpace, SweepConfig, sweep
from lightning_dpo.tuning.recipe.recipe import Recipe
from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.runs import counted_runs, run_mean
from lightning_dpo.tuning.rounds.rerun import RerunSpace, check_seeds, confirmations, repetitions, seed_paths
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.status import TrialStatus

RECIPE = Recipe(overrides={"model.policy": "a/b", "data.train": "x.jsonl", "seed_everything": 7})
SEED, ORDER = "seed_everything", "data.shuffle_seed"


def run(
    name: str, accuracy: float, *, of: str = "", purpose: str = "", status: str = "finished"
) -> TrialRecord:
    entry = {ACCURACY: accuracy, "step": 4}
    values = {"model.loss.beta": 0.1}
    return TrialRecord(name, values, TrialStatus(status), history=(entry,), rerun_of=of, purpose=purpose)


def test_every_complete_trial_is_repeated_with_seeds_of_its_own() -> None:
    trials = [run("a", 0.7), run("b", 0.8, status="stopped"), run("c", 0.6, status="failed"), run("d", 0.5)]
    reruns = repetitions(trials, repeats=3, recipe=RECIPE)
    assert [(one.trial, one.overrides[SEED], one.overrides[ORDER]) for one in reruns] == [
        ("a", 8, 8),
        ("a", 9, 9),
        ("d", 8, 8),
        ("d", 9, 9),
    ]
    assert all(one.overrides["model.loss.beta"] == 0.1 for one in reruns)
    assert repetitions(trials, repeats=1, recipe=RECIPE) == []


def test_the_best_are_confirmed_with_seeds_that_none_had() -> None:
    trials = [run("s", 0.9, status="stopped"), run("a", 0.8), run("b", 0.7), run("c", 0.6)]
    reruns = confirmations(trials, confirm=2, seeds=2, first_seed=3, recipe=RECIPE)
    assert [(one.trial, one.overrides[SEED]) for one in reruns] == [
        ("a", 10),
        ("a", 11),
        ("b", 10),
        ("b", 11),
    ]
    assert {one.purpose for one in reruns} == {"confirm"}


def test_a_data_module_of_ones_own_gets_the_seed_alone() -> None:
    own = Recipe(module="own_modules.PromptLengths", data="own_modules.Ones")
    assert seed_paths(RECIPE) == (SEED, ORDER)
    assert seed_paths(own) == (SEED,)


def test_ray_runs_each_rerun_once() -> None:
    reruns = tuple(repetitions([run("a", 0.7), run("b", 0.8)], repeats=2, recipe=RECIPE))
    space = RerunSpace((), reruns)
    configs = [config for _, config in generate_variants(space.ray_config())]
    assert space.grid_size == len(configs) == 2
    assert [space.overrides(config) for config in configs] == [dict(one.overrides) for one in reruns]
    assert [space.origin(config) for config in configs] == [("a", "repeat"), ("b", "repeat")]
    assert SearchSpace.parse({"model.loss.beta": 1}).origin({}) == ("", "")


def test_the_mean_ranks_and_its_error_is_told() -> None:
    lucky, steady = run("lucky", 0.80), run("steady", 0.75)
    reruns = [
        run("l1", 0.66, of="lucky", purpose="repeat"),
        run("l2", 0.70, of="lucky", purpose="repeat"),
        run("s1", 0.74, of="steady", purpose="repeat"),
        run("s2", 0.0, of="steady", purpose="repeat", status="diverged"),
    ]
    assert [t.id for t in rank([lucky, steady], Objective.parse(ACCURACY))] == ["lucky", "steady"]
    assert [t.id for t in rank([lucky, steady], Objective.parse(ACCURACY), reruns)] == ["steady", "lucky"]
    found = run_mean(lucky, reruns, ACCURACY)
    assert found is not None
    assert found.mean == pytest.approx(0.72)
    # Deviations 0.08, -0.06, -0.02: variance 0.0052, over three runs.
    assert found.error == pytest.approx((0.0052 / 3) ** 0.5)
    assert found.runs == 3
    single = run_mean(run("x", 0.5), reruns, ACCURACY)
    assert single is not None
    assert single.error is None
    assert run_mean(lucky, reruns, KL) is None


def test_only_the_new_runs_count_for_a_trial_that_was_confirmed() -> None:
    lucky, other = run("lucky", 0.95), run("other", 0.70)
    reruns = [
        run("c1", 0.60, of="lucky", purpose="confirm"),
        run("c2", 0.66, of="other", purpose="confirm"),
    ]
    assert [t.id for t in counted_runs(lucky, reruns)] == ["c1"]
    third = run("third", 0.9, status="stopped")
    ranked = rank([lucky, other, third], Objective.parse(ACCURACY), reruns)
    assert [t.id for t in ranked] == ["other", "lucky", "third"]


def test_a_trial_that_failed_to_confirm_comes_after_those_that_did_not() -> None:
    half, whole = run("half", 0.9), run("whole", 0.7)
    reruns = [
        run("h1", 0.8, of="half", purpose="confirm"),
        run("h2", 0.0, of="half", purpose="confirm", status="diverged"),
        run("w1", 0.7, of="whole", purpose="confirm"),
        run("w2", 0.71, of="whole", purpose="confirm"),
    ]
    ranked = rank([half, whole, run("once", 0.95)], Objective.parse(ACCURACY), reruns)
    assert [trial.id for trial in ranked] == ["whole", "half", "once"]


def test_what_stop_ended_is_complete_and_what_a_scheduler_ended_is_not() -> None:
    enough, stopped = (replace(run(name, 0.9, status="stopped"), enough=name == "e") for name in "es")
    assert [one.trial for one in repetitions([enough, stopped], repeats=2, recipe=RECIPE)] == ["e"]
    options = {"seeds": 1, "first_seed": 1, "recipe": RECIPE}
    assert [one.trial for one in confirmations([stopped, enough], confirm=2, **options)] == ["e"]
    again = replace(run("r", 0.8, of="e", purpose="confirm", status="stopped"), enough=True)
    by_hand = replace(again, id="h", enough=False)
    assert [one.id for one in counted_runs(enough, [again, by_hand])] == ["r"]


def test_a_space_that_varies_the_seed_cannot_be_repeated() -> None:
    space = SearchSpace.parse({"seed_everything": {"choice": [1, 2]}})
    check_seeds(space, repeats=1, confirm=0)
    for words, given in {"repeats": (2, 0), "confirm": (1, 2)}.items():
        with pytest.raises(ValueError, match=f"`{words}`.*varies seed_everything"):
            check_seeds(space, repeats=given[0], confirm=given[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ({"confirm": -1}, "`confirm` must not be negative, got -1"),
        ({"confidence": 95}, "`confidence` must be between 0 and 1"),
    ],
)
def test_mistakes(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SweepConfig(space={"model.loss.beta": 1}, **changes)


@pytest.mark.heavy
def test_a_sweep_repeats_and_confirms(cluster: None, project: Path) -> None:
    config = SweepConfig(
        space={"model.loss.beta": {"grid": [0.05, 0.2]}},
        samples=1,
        search="grid",
        repeats=2,
        confirm=1,
        confirm_seeds=2,
        name="rounds",
        export=False,
        **settings(project, overrides={"model.optimizer.lr": 3e-3}),
    )
    result = sweep(config, verbose=False)
    assert len(result.trials) == 2
    assert [one.purpose for one in result.reruns] == ["repeat", "repeat", "confirm", "confirm"]
    assert all(one.status == "finished" for one in result.reruns)
    assert [one.overrides[ORDER] for one in result.reruns if one.purpose == "confirm"] == [2, 3]
    assert {one.rerun_of for one in result.reruns if one.purpose == "confirm"} == {result.best.id}
    # The order of the data differs and the pairs that are held out do not.
    assert len({one.metrics["val/logratio/margin"] for one in result.reruns}) == 4
    assert [one.runs for one in result.comparisons.values()] == [2, 2]
    assert ">over seeds<" in Path(result.report_path).read_text()
    loaded = load_result(result.location)
    assert loaded.trials == result.trials
    assert sorted(loaded.reruns, key=lambda one: one.id) == sorted(result.reruns, key=lambda one: one.id)
    again = sweep(config, resume=True, verbose=False)
    assert [one.id for one in again.reruns] == [one.id for one in result.reruns]
