"""Optuna's study as Optuna itself reads it: exactly the trials of the sweep, their states and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_dpo.tuning import Objective, SearchSpace
from lightning_dpo.tuning.search.optuna_study import StudySearch
from lightning_dpo.tuning.search.pruning import PrunerScheduler
from lightning_dpo.tuning.search.searchers import has_pruner, learns_from_results, make_searcher
from lightning_dpo.tuning.search.starting_points import Start, StartingPoint

BETA, LOSS = "model.loss.beta", "model.loss.class_path"
DPO, IPO = "lightning_dpo.losses.DPOLoss", "lightning_dpo.losses.IPOLoss"
SPACE = SearchSpace.parse({BETA: {"loguniform": [0.01, 1.0]}})
CONDITIONAL = SearchSpace.parse(
    {
        LOSS: {"choice": [DPO, IPO]},
        BETA: [
            {"uniform": [0.0, 1.0], "when": {LOSS: DPO}},
            {"uniform": [2.0, 3.0], "when": {LOSS: IPO}},
        ],
    }
)
ONE, TWO = Objective.parse("m"), Objective.parse({"maximize": "a", "minimize": "b"})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def search(
    arguments: dict[str, Any] | None = None,
    *,
    space: SearchSpace = SPACE,
    objective: Objective = ONE,
    **options: Any,
) -> StudySearch:
    choice = {"class_path": "optuna", "init_args": arguments or {}}
    made: StudySearch = make_searcher(
        choice, space=space, objective=objective, seed=0, name="mine", **options
    )
    return made


def run(searcher: StudySearch, name: str, *reports: float) -> dict[str, Any]:
    """A trial as Tune runs it, with Tune's flat results."""
    config: dict[str, Any] = searcher.suggest(name)
    for number, value in enumerate(reports, start=1):
        searcher.on_trial_result(name, {"m": value, "training_iteration": number})
    searcher.on_trial_complete(name, {"m": reports[-1], "training_iteration": len(reports)})
    return config


def test_the_storage_holds_each_trial_with_its_name_and_values(url: str) -> None:
    searcher = search({"storage": url, "study_name": "own"})
    drawn = {f"t{number}": run(searcher, f"t{number}", 0.1 * number, 0.2 * number) for number in range(3)}
    study = optuna.load_study(study_name="own", storage=url)
    assert [trial.user_attrs["trial"] for trial in study.trials] == ["t0", "t1", "t2"]
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert [trial.value for trial in study.trials] == pytest.approx([0.0, 0.2, 0.4])
    assert [trial.params for trial in study.trials] == list(drawn.values())
    assert study.trials[2].intermediate_values == pytest.approx({1: 0.2, 2: 0.4})
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.metric_names == ["m"]


def test_points_run_first_and_results_are_told(url: str) -> None:
    start = Start(
        run=(StartingPoint({BETA: 0.3}, origin="start_from[1]"), StartingPoint({BETA: 0.4})),
        told=(
            StartingPoint({BETA: 0.2}, (0.9,), "start_from[0]"),
            StartingPoint({BETA: 0.1}, (0.8,), trial="x"),
        ),
    )
    searcher = search({"storage": url}, start=start)
    assert optuna.load_study(study_name="mine", storage=url).trials == []  # until the sweep begins
    assert [run(searcher, name, 0.5)[BETA] for name in ("t0", "t1")] == [0.3, 0.4]
    assert run(searcher, "t2", 0.5)[BETA] not in (0.1, 0.2, 0.3, 0.4)
    trials = optuna.load_study(study_name="mine", storage=url).trials
    assert [(t.params[BETA], t.value) for t in trials[:4]] == [(0.2, 0.9), (0.1, 0.8), (0.3, 0.5), (0.4, 0.5)]
    assert trials[0].user_attrs == {"origin": "start_from[0]"}
    assert trials[1].user_attrs["trial"] == "x"
    assert len(trials) == 5
    assert searcher.study.best_value == 0.9


def test_results_of_conditional_spaces_and_of_several_goals_are_told() -> None:
    point = StartingPoint({LOSS: IPO, BETA: 2.5}, (0.7, 3.0))
    searcher = search(space=CONDITIONAL, objective=TWO, start=Start(told=(point,)))
    searcher.suggest("t0")
    told = searcher.study.trials[0]
    assert told.params == {LOSS: IPO, f"{BETA}@1": 2.5}
    assert told.values == [0.7, 3.0]
    assert told.distributions[f"{BETA}@1"] == optuna.distributions.FloatDistribution(2.0, 3.0)
    assert len(searcher.study.best_trials) == 1


def test_what_was_told_changes_what_is_drawn() -> None:
    """Told that small values are good, the sampler draws small ones: it does know."""
    good = tuple(StartingPoint({BETA: 0.01 + 0.0005 * n}, (1.0 - 0.001 * n,)) for n in range(10))
    bad = tuple(StartingPoint({BETA: 0.9 - 0.05 * n}, (0.1,)) for n in range(10))
    knows = search(start=Start(told=(*good, *bad)))
    new = search()
    low = sorted(run(knows, f"t{n}", 0.5)[BETA] for n in range(8))
    ignorant = sorted(run(new, f"t{n}", 0.5)[BETA] for n in range(8))
    assert low[4] < 0.03 < ignorant[4]


def test_a_study_that_has_trials_is_not_taken_for_a_new_one(url: str) -> None:
    run(search({"storage": url}), "t0", 0.5)
    with pytest.raises(ValueError, match=r"`search.init_args.study_name` must be new, got 'mine'.*--resume"):
        search({"storage": url})
    assert run(search({"storage": url}, goes_on=True), "t1", 0.5)
    assert run(search({"storage": url, "study_name": "other"}), "t0", 0.5)


def test_a_saved_state_goes_on_and_drops_what_never_reported(url: str, tmp_path: Path) -> None:
    first = search({"storage": url})
    run(first, "t0", 0.5)
    first.suggest("t1")
    first.save_to_dir(str(tmp_path), "now")
    first.suggest("t2")  # after the last time that Tune saved: the driver was killed then
    again = search({"storage": url}, goes_on=True)
    again.restore_from_dir(str(tmp_path))
    states = {t.user_attrs["trial"]: t.state for t in again.study.trials}
    assert states == {"t0": TrialState.COMPLETE, "t1": TrialState.RUNNING, "t2": TrialState.FAIL}
    again.on_trial_complete("t1", {"m": 0.7, "training_iteration": 1})
    assert optuna.load_study(study_name="mine", storage=url).trials[1].value == 0.7


class _Sampler(optuna.samplers.RandomSampler):
    pass


def test_samplers_and_pruners_by_class_path() -> None:
    tpe = {"class_path": "optuna.samplers.TPESampler", "init_args": {"n_startup_trials": 3}}
    assert isinstance(search({"sampler": tpe}).study.sampler, optuna.samplers.TPESampler)
    assert isinstance(search({"sampler": "NSGAIISampler"}).study.sampler, optuna.samplers.NSGAIISampler)
    assert type(search({"sampler": f"{__name__}._Sampler"}).study.sampler).__name__ == "_Sampler"
    inner = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 2}}
    patient = {
        "class_path": "optuna.pruners.PatientPruner",
        "init_args": {"wrapped_pruner": inner, "patience": 1},
    }
    assert isinstance(search({"pruner": patient}).study.pruner, optuna.pruners.PatientPruner)
    assert isinstance(search().study.pruner, optuna.pruners.NopPruner)
    # The sweep's seed is the sampler's, unless it is given one.
    draws = [run(search({"sampler": "RandomSampler"}), "t", 0.5) for _ in range(2)]
    assert draws[0] == draws[1]
    own = {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 5}}
    assert run(search({"sampler": own}), "t", 0.5) != draws[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "optuna.samplers.TPESampeler"}, "importable"),
        ({"sampler": "TPE"}, r"`search.init_args.sampler` must be a sampler .*TPESampler.*got 'TPE'"),
        ({"pruner": "optuna.samplers.TPESampler"}, "`search.init_args.pruner` must be a pruner"),
        ({"sampler": {"class_path": "TPESampler", "init_args": {"startup": 3}}}, "does not take"),
        ({"pruner": 3}, r"must be a class path or \{class_path, init_args\}, got 3"),
        ({"storage": "study.db"}, r"must be a URL such as sqlite:///study.db, got 'study.db'"),
        ({"storage": "sqlite:////no/such/folder/study.db"}, "cannot be opened"),
        ({"startup": 3}, "`search` optuna does not take"),
    ],
)
def test_mistakes(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search(arguments)


def test_a_pruner_needs_one_goal() -> None:
    with pytest.raises(
        ValueError, match=r"`search.init_args.pruner` must be left out where there are several"
    ):
        search({"pruner": "MedianPruner"}, objective=TWO)


def test_a_pruner_stops_what_is_below_the_median() -> None:
    pruner = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 2}}
    searcher = search({"pruner": pruner})
    scheduler = PrunerScheduler(searcher)

    class Trial:
        def __init__(self, name: str) -> None:
            self.trial_id = name

    def report(name: str, value: float, number: int = 1, **more: Any) -> str:
        result = {"m": value, "training_iteration": number, **more}
        decision = scheduler.on_trial_result(None, Trial(name), result)
        if decision != "STOP":
            searcher.on_trial_result(name, result)
        return decision

    for name, value in (("a", 0.8), ("b", 0.6)):
        searcher.suggest(name)
        assert report(name, value) == "CONTINUE"
        searcher.on_trial_complete(name, {"m": value, "training_iteration": 1})
    searcher.suggest("c")
    searcher.suggest("d")
    searcher.suggest("e")
    # The median of 0.8 and 0.6 is 0.7.
    assert report("c", 0.69) == "STOP"
    searcher.on_trial_complete("c", {"m": 0.69, "training_iteration": 1})
    assert report("d", 0.71) == "CONTINUE"
    searcher.on_trial_complete("d", {"m": 0.71, "training_iteration": 1})
    # At its last report a trial has run to its end.
    searcher.suggest("f")
    assert report("f", 0.1, step=6, total_steps=6) == "CONTINUE"
    # A trial that has gone wrong reports the worst value, and is not the pruner's.
    assert report("e", 0.0, status="diverged") == "CONTINUE"
    states = [(trial.user_attrs["trial"], trial.state.name, trial.value) for trial in searcher.study.trials]
    assert states[:4] == [
        ("a", "COMPLETE", 0.8),
        ("b", "COMPLETE", 0.6),
        ("c", "PRUNED", 0.69),
        ("d", "COMPLETE", 0.71),
    ]


def test_which_searches_learn_and_prune() -> None:
    assert learns_from_results("optuna")
    assert not learns_from_results("random")
    assert not learns_from_results("grid")
    assert has_pruner({"class_path": "optuna", "init_args": {"pruner": "MedianPruner"}})
    assert not has_pruner("optuna")
